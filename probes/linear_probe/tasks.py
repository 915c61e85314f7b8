"""What is asked of a representation: labels of observed positions, with a control label for each.

A control label has nothing to do with what the task asks but could be read off the input as well (Hewitt and Liang
2019, arXiv 1909.03368): a probe that fits it too is merely strong. Shape suffixes: N samples, O observations.
"""

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hydra_lab.data.names import invent_names
from hydra_lab.data.samples import Samples
from hydra_lab.data.tasks import VALUES, RecallProblem, query

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DEEPEST = 8
_NUM_VALUES = 8
_NUM_PAIRS = 4


@dataclass(frozen=True, eq=False)
class Task:
    """Labels of some positions of some samples.

    Attributes:
        name: such as "domain".
        asks: what the probe is asked for, in words.
        control_asks: what the control label is, in words.
        kind: "class" (an index) or "number".
        samples: rows that the model reads; their scored tokens are those whose loss the causal check measures.
        row: [O] sample of each observation, rising.
        position: [O] token of each observation.
        label: [O] class index, or number.
        control: [O] control label, likewise.
        null: what the null does with the labels: "exchange" those of whole samples, "turn" the sequence round inside
            each sample (for a label that varies there), or "choose" one of `choices` at random.
        choices: [O, V] labels that each observation might as well have, for "choose".
    """

    name: str
    asks: str
    control_asks: str
    kind: Literal["class", "number"]
    samples: Samples
    row: Ints
    position: Ints
    label: Floats
    control: Floats
    null: Literal["exchange", "turn", "choose"]
    choices: Floats | None = None

    @property
    def num_classes(self) -> int:
        """Classes of the label; 1 for a number."""
        return int(self.label.max()) + 1 if self.kind == "class" else 1


def domain_task(samples: Samples, *, every: int, rng: np.random.Generator) -> Task:
    """Which domain is this text of?"""
    row, position = _observed(samples, every)
    names = list(dict.fromkeys(samples.domains))
    label = np.array([names.index(samples.domains[n]) for n in row], dtype=np.float64)
    control = _by_token(samples.tokens[row, position], label, rng)
    asks = f"the domain of the text, one of {len(names)}"
    return Task("domain", asks, _BY_TOKEN, "class", samples, row, position, label, control, "exchange")


def position_task(samples: Samples, *, every: int, rng: np.random.Generator) -> Task:
    """How far into the text is this token?"""
    row, position = _observed(samples, every)
    label = (position + 1) / every
    control = _by_token(samples.tokens[row, position], label, rng)
    asks = f"the position in the text, in steps of {every} tokens"
    return Task("position", asks, _BY_TOKEN, "number", samples, row, position, label, control, "turn")


def depth_task(tokenizer: PreTrainedTokenizerBase, *, num_problems: int, rng: np.random.Generator) -> Task:
    """How many brackets are open at the end of a string of brackets and letters?"""
    texts: list[str] = []
    label = np.zeros(num_problems)
    for number in range(num_problems):
        depth, pieces = 0, []
        for _ in range(int(rng.integers(16, 41))):
            opens = depth == 0 or (depth < DEEPEST and rng.random() < 0.5)
            depth += 1 if opens else -1
            pieces.append(f" {'(' if opens else ')'}" + str(rng.choice(VALUES)))
        texts.append("".join(pieces))
        label[number] = depth
    samples = _rows(texts, tokenizer, answers=None)
    row, position = np.arange(num_problems), samples.length - 1
    control = _by_token(samples.tokens[row, position], label, rng)
    asks = f"the number of open brackets, 0 to {DEEPEST}"
    return Task("depth", asks, _BY_TOKEN, "number", samples, row, position, label, control, "exchange")


def binding_task(tokenizer: PreTrainedTokenizerBase, *, num_problems: int, rng: np.random.Generator) -> Task:
    """Which value does the queried key have? The control asks for the value of another key of the same problem, and the
    null draws one of the problem's values: knowing which values there are is not knowing whose they are."""
    names = random.Random(int(rng.integers(2**31)))
    texts: list[str] = []
    answers: list[str] = []
    label, control = np.zeros((2, num_problems))
    choices = np.zeros((num_problems, _NUM_PAIRS))
    for number in range(num_problems):
        keys = [f" {name}" for name in invent_names(names, _NUM_PAIRS)]
        values = rng.permutation(_NUM_VALUES)[:_NUM_PAIRS]
        asked, other = rng.permutation(_NUM_PAIRS)[:2]
        problem = RecallProblem({key: VALUES[value] for key, value in zip(keys, values, strict=True)}, ())
        texts.append(problem.given() + query(keys[asked]))
        answers.append(VALUES[values[asked]])
        label[number], control[number], choices[number] = values[asked], values[other], values
    samples = _rows(texts, tokenizer, answers)
    position = samples.length - 2  # the last token before the answer
    asks = f"the value of the key that is asked for, one of {_NUM_VALUES}"
    control_asks = "the value of another key of the same problem"
    row = np.arange(num_problems)
    return Task(
        "binding", asks, control_asks, "class", samples, row, position, label, control, "choose", choices
    )  # fmt: skip


_BY_TOKEN = "a label that was drawn at random for each kind of token"


def _observed(samples: Samples, every: int) -> tuple[Ints, Ints]:
    """Row and position of the last token of every complete stretch of `every` tokens."""
    rows = [np.full(size // every, n) for n, size in enumerate(samples.length)]
    positions = [every * np.arange(1, size // every + 1) - 1 for size in samples.length]
    return np.concatenate(rows).astype(np.int64), np.concatenate(positions).astype(np.int64)


def _by_token(tokens_O: Ints, label_O: Floats, rng: np.random.Generator) -> Floats:
    """A label for each kind of token, drawn from the labels that there are."""
    kinds, index_O = np.unique(tokens_O, return_inverse=True)
    return rng.choice(label_O, size=len(kinds))[index_O]


def _rows(texts: list[str], tokenizer: PreTrainedTokenizerBase, answers: list[str] | None) -> Samples:
    """One row per text; with answers (one token each) the row goes on with its answer, and that alone is scored."""
    encoded: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if answers is not None:
        for ids, answer in zip(encoded, answers, strict=True):
            ids.append(tokenizer(answer, add_special_tokens=False)["input_ids"][-1])
    length = np.array([len(ids) for ids in encoded], dtype=np.int64)
    tokens = np.zeros((len(texts), int(length.max())), dtype=np.int64)
    scored = np.zeros_like(tokens, dtype=bool)
    for n, ids in enumerate(encoded):
        tokens[n, : len(ids)] = ids
        scored[n, len(ids) - 1 if answers is not None else 0 : len(ids)] = True
    return Samples(tokens, scored, length, ("problem",) * len(texts))
