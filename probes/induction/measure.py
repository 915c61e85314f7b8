"""What the study asks of the model: its loss on what could be copied, with each path cut on the repeat only.

Shape suffixes: N sequences, T tokens of the repeat.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing.continuation import read_on
from hydra_lab.taps import PATHS
from probes.induction.episodes import Episodes, Rows

Floats = NDArray[np.float64]
Cut = tuple[tuple[str, int | None], ...]
"""Paths that are cut together: (path, block or None for every block that has it)."""


@dataclass(frozen=True, eq=False)
class CopyGain:
    """What finding the earlier occurrence is worth, per sequence.

    Attributes:
        name, distance: of the episodes.
        loss: [N] mean loss on the targets after the context that holds them behind their cues, nats per token.
        intact: [N] loss after the control less `loss`: the gain, nats per token.
        under: cut -> [N] the gain with those paths cut while the repeat is read.
    """

    name: str
    distance: float
    loss: Floats
    intact: Floats
    under: Mapping[Cut, Floats]

    def lost(self, cut: Cut) -> Floats:
        """[N] how much of the gain goes with the cut, nats per token."""
        return self.intact - self.under[cut]


def path_cuts(model: HydraForCausalLM) -> list[Cut]:
    """Every path, cut in all blocks that have it."""
    return [((path, None),) for path in PATHS if model.config.layers_with(path)]


def block_cuts(model: HydraForCausalLM) -> list[Cut]:
    """Every path of every block, cut alone."""
    return [((path, layer),) for path in PATHS for layer in model.config.layers_with(path)]


def pair_cuts(model: HydraForCausalLM) -> list[Cut]:
    """Every two paths, cut together in all blocks that have them."""
    singles = path_cuts(model)
    return [first + second for n, first in enumerate(singles) for second in singles[n + 1 :]]


def copy_gain(
    model: HydraForCausalLM,
    episodes: Episodes,
    cuts: Iterable[Cut],
    *,
    batch_size: int,
    progress: Callable[[str], None] = lambda _line: None,
) -> CopyGain:
    """Loss after context and control, as it is and under each cut.

    Contexts are read with the model as it is; a cut holds while the repeat is read, so it takes from the
    model what the path does there, not what it has stored.
    """
    progress(f"{episodes.name}: {len(episodes.scored)} sequences")
    cuts = list(cuts)
    losses = {side: {cut: [] for cut in [(), *cuts]} for side in ("context", "control")}
    for start in range(0, len(episodes.scored), batch_size):
        rows = slice(start, start + batch_size)
        repeat, scored = episodes.repeat[rows], episodes.scored[rows]
        for side, beginning in (("context", episodes.context[rows]), ("control", episodes.control[rows])):
            _, cache = read_on(model, beginning.ids, attention_mask=beginning.present, last_only=True)
            for cut in losses[side]:
                with ExitStack() as stack:
                    stack.enter_context(model_lock(model))
                    for path, layer in cut:
                        stack.enter_context(model.cut(path, None if layer is None else [layer]))
                    logits, _ = read_on(model, repeat.ids, cache, attention_mask=repeat.present)
                losses[side][cut].append(_target_loss(logits, repeat, scored))
    context, control = (
        {cut: np.concatenate(parts) for cut, parts in losses[side].items()} for side in losses
    )
    gain = {cut: control[cut] - context[cut] for cut in context}
    return CopyGain(episodes.name, episodes.distance, context[()], gain[()], {cut: gain[cut] for cut in cuts})


def _target_loss(logits: torch.Tensor, repeat: Rows, scored_NT: NDArray[np.bool_]) -> Floats:
    """[N] mean loss on the targets, nats."""
    nll_NT = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), repeat.ids[:, 1:].to(logits.device), reduction="none"
    )
    scored = scored_NT[:, 1 : repeat.ids.shape[1]]
    return (nll_NT.double().cpu().numpy() * scored).sum(axis=1) / scored.sum(axis=1)
