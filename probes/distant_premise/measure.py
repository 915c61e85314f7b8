"""What the study asks of the model: each question after more and more filler, as it is and under interventions.

Shape suffixes: N problems, A questions, P pairs, Y blocks with attention, H key-value heads, K selected blocks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hydra_lab import metrics
from hydra_lab.cache import HydraCache
from hydra_lab.interventions import intervened
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing.continuation import read_on, with_memory_of_rows
from hydra_lab.taps import Selection
from probes.distant_premise.problems import Problems

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PIECE = 512
"""Filler tokens of each problem per forward pass."""

CUT, FORCED, OTHER_STATE = "attention cut", "premise's block forced", "ssm of another problem"


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model answers at one distance.

    Attributes:
        distance: filler tokens between pairs and question.
        layers: [Y] blocks with attention.
        score: [N, A, P] log-probability of each of the problem's values as the answer, among those values.
        is_exact: [N, A] whether the right answer is the most probable token of all.
        selected: [Y, N, A, H, K] blocks that the question's last token selects; -1 where fewer qualify.
        premise: [A] block of each asked pair's value.
        num_candidates: blocks that the question's last token may select from: 1, 2, .. of that number.
        score_under: intervention -> the same as `score` while it holds.
    """

    distance: int
    layers: tuple[int, ...]
    score: Floats
    is_exact: NDArray[np.bool_]
    selected: Ints
    premise: Ints
    num_candidates: int
    score_under: Mapping[str, Floats]


def forbidden(layer: int) -> str:
    """Name of the intervention that forbids the premise's block to the attention of block `layer`."""
    return f"forbidden in block {layer}"


def ask(
    model: HydraForCausalLM,
    problems: Problems,
    distances: Sequence[int],
    *,
    progress: Callable[[str], None] = lambda _line: None,
) -> list[Answers]:
    """Every question at every distance. The text before it is read once; interventions hold while a question
    is read."""
    _, cache = read_on(model, problems.given, last_only=True)
    answers, reached = [], 0
    for distance in distances:
        progress(f"{distance} tokens of filler, {len(problems.given)} problems")
        while reached < distance:
            end = min(reached + _PIECE, distance)
            _, cache = read_on(model, problems.filler[:, reached:end], cache, last_only=True)
            reached = end
        answers.append(_ask_at(model, problems, cache, distance))
    return answers


def _ask_at(model: HydraForCausalLM, problems: Problems, cache: HydraCache, distance: int) -> Answers:
    config = model.config
    layers = tuple(config.attention_layers)
    premise_A = problems.place // config.attention_block_size
    rolled = torch.roll(torch.arange(len(problems.given)), 1)
    other_state = with_memory_of_rows(cache, rolled.to(model.device), "ssm")
    shape = problems.questions.shape[:2]
    scores = np.zeros((*shape, problems.values.shape[1]))
    is_exact = np.zeros(shape, dtype=bool)
    selected = []
    under: dict[str, list[Floats]] = {}
    for a, question in enumerate(problems.questions.unbind(dim=1)):
        block = premise_A[a]

        def scores_with(
            changes: tuple[str, ...], memory: HydraCache, question: torch.Tensor = question
        ) -> tuple[Floats, Ints]:
            with intervened(model, *changes):
                return _value_scores(read_on(model, question, memory, last_only=True)[0], problems.values)

        with _selections(model) as seen:
            scores[:, a], best = scores_with((), cache)
        is_exact[:, a] = best == problems.values[:, problems.asked[a]]
        selected.append(np.stack([seen[layer] for layer in layers]))
        changed = {
            CUT: (("attention[*].cut()",), cache),
            FORCED: ((f"attention[*].select(blocks=[{block}])",), cache),
            OTHER_STATE: ((), other_state),
            **{
                forbidden(layer): ((f"attention[{layer}].forbid(blocks=[{block}])",), cache)
                for layer in layers
            },
        }
        for name, (changes, memory) in changed.items():
            under.setdefault(name, []).append(scores_with(changes, memory)[0])
    last = len(problems.given[0]) + distance + problems.questions.shape[2] - 1
    candidates = metrics.num_candidates(
        np.array([last]),
        window=config.attention_window,
        block_size=config.attention_block_size,
        tiled=config.attention_selection == "tile",
    )
    return Answers(
        distance=distance,
        layers=layers,
        score=scores,
        is_exact=is_exact,
        selected=np.stack(selected, axis=2),
        premise=premise_A,
        num_candidates=int(candidates[0]),
        score_under={name: np.stack(each, axis=1) for name, each in under.items()},
    )


def _value_scores(logits: torch.Tensor, values_NP: Ints) -> tuple[Floats, Ints]:
    """[N, P] log-probability of each value among the values, and [N] the most probable token of all."""
    last_NV = logits[:, -1].double()
    score = last_NV.gather(1, torch.from_numpy(values_NP).to(last_NV.device)).log_softmax(dim=-1)
    return score.cpu().numpy(), last_NV.argmax(dim=-1).cpu().numpy()


@contextmanager
def _selections(model: HydraForCausalLM) -> Iterator[dict[int, Ints]]:
    """By block with attention: [N, H, K] blocks that the last token of the latest pass selected."""
    seen: dict[int, Ints] = {}
    with ExitStack() as stack:
        stack.enter_context(model_lock(model))
        for layer in model.config.attention_layers:

            def keep(_module: object, _inputs: object, selection: Selection, layer: int = layer) -> None:
                seen[layer] = selection.blocks[:, -1].cpu().numpy()

            tap = model.model.blocks[layer].attention.selection
            stack.callback(tap.register_forward_hook(keep).remove)
        yield seen
