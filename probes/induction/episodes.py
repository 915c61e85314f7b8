"""Texts whose end can be copied from their beginning, each beside a control in which it cannot.

A sequence of random tokens is read as cues and targets by turns, and its first tokens are repeated: whoever
finds the cue's earlier occurrence can copy the target that followed it. In the control the cues of the first
occurrence are other tokens. Every target stands where it stood, so neither the frequency nor the recency of a
token differs, nor the distance at
which it is repeated: what the loss differs by is the association. Recall problems are the same with invented
    names for cues.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hydra_lab.data.names import invent_names
from hydra_lab.data.tasks import RecallProblem, make_recall_problem, query

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Token ids of several texts, padded on the right.

    Attributes:
        ids: [N, L].
        present: [N, L] 1 where a token is, 0 at padding.
    """

    ids: Tensor
    present: Tensor

    @classmethod
    def of(cls, rows: list[list[int]]) -> "Rows":
        """Rows of any lengths, padded with 0 to the longest."""
        size = max(map(len, rows))
        ids = [row + [0] * (size - len(row)) for row in rows]
        present = [[1] * len(row) + [0] * (size - len(row)) for row in rows]
        return cls(torch.tensor(ids), torch.tensor(present))

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.ids[rows], self.present[rows])


@dataclass(frozen=True, eq=False)
class Episodes:
    """N texts with something to copy, and their controls.

    Attributes:
        name: such as "random tokens, 64 apart"; unique within a study.
        distance: tokens from a target to its repetition, the mean where it varies.
        context: the beginning, with each cue before its target.
        control: the beginning with other cues.
        repeat: what follows either: cues and targets again.
        scored: [N, T] True at the targets of `repeat`.
    """

    name: str
    distance: float
    context: Rows
    control: Rows
    repeat: Rows
    scored: NDArray[np.bool_]


def random_episodes(
    vocabulary: Ints, *, num_sequences: int, distance: int, repeat: int, seed: int
) -> Episodes:
    """Sequences of `distance` random tokens whose first `repeat` ones come again.

    Args:
        vocabulary: token ids to draw from, without replacement within a sequence.

    Raises:
        ValueError: the vocabulary is too small for the distance.
    """
    rng = np.random.default_rng(seed)
    repeat = min(repeat, distance)
    needed = distance + repeat // 2
    if len(vocabulary) < needed:
        raise ValueError(
            f"distance={distance} needs {needed} different tokens, and there are {len(vocabulary)} to draw from"
        )
    drawn = np.stack([rng.permutation(vocabulary)[:needed] for _ in range(num_sequences)])
    context, fresh = drawn[:, :distance], drawn[:, distance:]
    control = context.copy()
    control[:, 0:repeat:2] = fresh
    scored = np.zeros((num_sequences, repeat), dtype=bool)
    scored[:, 1::2] = True
    return Episodes(
        name=f"random tokens, {distance} apart",
        distance=float(distance),
        context=Rows.of(context.tolist()),
        control=Rows.of(control.tolist()),
        repeat=Rows.of(context[:, :repeat].tolist()),
        scored=scored,
    )


def recall_episodes(
    tokenizer: PreTrainedTokenizerBase, *, num_problems: int, num_pairs: int, seed: int
) -> Episodes:
    """Recall problems (`hydra_lab.data.tasks`) with every pair asked once; the controls give the values to
    other names."""
    rng = random.Random(seed)
    texts: list[list[int]] = []
    controls: list[list[int]] = []
    repeats: list[list[int]] = []
    scored: list[list[bool]] = []
    distances: list[int] = []
    for _ in range(num_problems):
        problem = make_recall_problem(rng, num_pairs, filler=False)
        names = [f" {name}" for name in invent_names(rng, 3 * num_pairs)]
        others = [name for name in names if name not in problem.pairs][:num_pairs]
        other = RecallProblem(dict(zip(others, problem.pairs.values(), strict=True)), ())
        text, repeat, targets = _ids(tokenizer, "recall:"), list[int](), list[bool]()
        place: dict[str, int] = {}
        for key, value in problem.pairs.items():
            place[key] = len(text) + len(_ids(tokenizer, f"{key} ="))
            text += _ids(tokenizer, f"{key} ={value};")
        for key in rng.sample(list(problem.pairs), num_pairs):
            parts = [_ids(tokenizer, part) for part in (query(key), problem.pairs[key], ";")]
            distances.append(len(text) - place[key] + len(repeat) + len(parts[0]))
            repeat += [token for part in parts for token in part]
            targets += [n == 1 for n, part in enumerate(parts) for _token in part]
        texts.append(text)
        controls.append(_ids(tokenizer, other.given()))
        repeats.append(repeat)
        scored.append(targets)
    size = max(map(len, scored))
    marks = np.array([row + [False] * (size - len(row)) for row in scored])
    return Episodes(
        name=f"recall of {num_pairs} pairs",
        distance=float(np.mean(distances)),
        context=Rows.of(texts),
        control=Rows.of(controls),
        repeat=Rows.of(repeats),
        scored=marks,
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def whole_words(tokenizer: PreTrainedTokenizerBase) -> Ints:
    """Ids of the tokens that are a word with its leading space: what random sequences are drawn from."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    found = [token for token, text in enumerate(texts) if text[:1] == " " and text[1:].isalpha()]
    return np.array(found, dtype=np.int64)
