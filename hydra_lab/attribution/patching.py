"""Activation patching: put what one run computed into another, and see what that does to a metric.

Shape suffixes: N pairs of texts, L positions, V vocabulary, Z sites, P positions that are patched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_lab.attribution.progress import Report, counting
from hydra_lab.attribution.rows import IntArray, ints
from hydra_lab.attribution.sites import Site
from hydra_lab.capture.record import check_inputs
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import requested

Metric = Callable[[Tensor], Tensor]
"""Logits [N, L, V] in the columns of the input -> [N], one number per pair of texts."""

Direction = Literal["denoising", "noising"]


@dataclass(frozen=True, eq=False)
class ActivationPatching:
    """A metric while a site of one run carries what the other run computed there.

    Axes: Z sites, P positions (1 where the whole row was patched at once), N pairs of texts.

    Attributes:
        sites: [Z] names, as in `hydra_lab.attribution.sites`.
        positions: [P] index in the row of the patched token; None where the whole row was patched at once.
        direction: "denoising": clean values are put into the corrupted run, which shows what suffices; "noising":
            corrupted values into the clean run, which shows what is needed.
        value: [Z, P, N] the metric, in its own unit.
        clean, corrupted: [N] the metric of the two runs as they are.
        ids: [N, L] tokens of the run that was patched, in the columns of the input.
    """

    sites: tuple[str, ...]
    positions: tuple[int, ...] | None
    direction: Direction
    value: NDArray[np.float64]
    clean: NDArray[np.float64]
    corrupted: NDArray[np.float64]
    ids: IntArray

    def recovery(self) -> NDArray[np.float64]:
        """[Z, P] where the mean over the pairs lies between the corrupted run (0) and the clean one (1); NaN where the
        two do not differ. It may lie beyond either."""
        return recovered(self.value, self.clean, self.corrupted)


def logit_difference(first: int | Tensor, second: int | Tensor, position: int = -1) -> Metric:
    """The usual metric: by how much the logit of `first` exceeds that of `second` in one column of the input.

    Args:
        first, second: a token id, or one per pair of texts [N].
        position: column of the input.
    """

    def difference(logits_NLV: Tensor) -> Tensor:
        at = logits_NLV[:, position].float()
        size = (len(at),)
        chosen = [torch.as_tensor(each, device=at.device).expand(size)[:, None] for each in (first, second)]
        return (at.gather(1, chosen[0]) - at.gather(1, chosen[1]))[:, 0]

    return difference


def activation_patching(
    model: HydraForCausalLM,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric,
    *,
    sites: Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    direction: Direction = "denoising",
    mask: Tensor | None = None,
    batch_size: int = 16,
    progress: Report = True,
) -> ActivationPatching:
    """Patch each site in turn and read a metric; both directions are explained by Heimersheim and Nanda 2024
    (arXiv 2404.15255).

    Args:
        clean, corrupted: [N, L] token ids of N pairs of texts, equally long token by token.
        metric: logits [N, L, V] of the patched run -> [N]; see `logit_difference`.
        sites: "embedding", "layers.2" (the residual stream after the block), "layers.2.moe" (what a path adds),
            "layers.2.moe.routing" (a decision); None for the residual stream after every block.
        positions: tokens to patch one at a time, counted from each row's first token; None patches the whole row at
            once. A decision is replaced whole, because its fields speak of chunks as well as of tokens.
        direction: see `ActivationPatching`.
        mask: [N, L] nonzero where a token is present, the same for both texts of a pair; None: all.
        batch_size: rows per forward pass, about.
        progress: True for a bar on standard error, or a function that receives the numbers of passes done and to do.

    Raises:
        ValueError: texts of different shapes, a site or position that is not there, positions for a decision, or a
            metric that does not give one number per pair.
    """
    clean, mask = check_inputs(model, clean, mask)
    corrupted, _ = check_inputs(model, corrupted, mask)
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"the texts of a pair must be equally long, got {list(clean.shape)} and {list(corrupted.shape)}"
        )
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction {direction!r} is not one of denoising, noising")
    names = [f"layers.{i}" for i in range(len(model.model.blocks))] if sites is None else list(sites)
    places = [Site.find(model, name) for name in names]
    _check_positions(places, positions, clean, mask)
    source, destination = (clean, corrupted) if direction == "denoising" else (corrupted, clean)
    num_pairs = len(clean)
    singles = [None] if positions is None else list(positions)
    copies = max(1, batch_size // num_pairs)
    groups = [singles[first : first + copies] for first in range(0, len(singles), copies)]

    taps = [place.module for place in places if place.kind == "decision"]
    value = np.full((len(places), len(singles), num_pairs), np.nan)
    with (
        model_lock(model),
        torch.no_grad(),
        requested(taps),
        counting("patching", 2 + len(places) * len(groups), progress) as advance,
    ):
        kept, source_logits = run_and_keep(model, places, source, mask)
        advance(1)
        destination_logits = model(input_ids=destination, attention_mask=mask, use_cache=False).logits
        advance(1)
        for z, place in enumerate(places):
            done = 0
            for group in groups:
                logits = _patched(model, place, kept[place.name], destination, mask, group)
                for each in logits.unflatten(0, (len(group), num_pairs)):
                    value[z, done] = measured(metric, each)
                    done += 1
                advance(1)
    of_source, of_destination = measured(metric, source_logits), measured(metric, destination_logits)
    of_clean, of_corrupted = (
        (of_source, of_destination) if direction == "denoising" else (of_destination, of_source)
    )
    return ActivationPatching(
        sites=tuple(names),
        positions=None if positions is None else tuple(positions),
        direction=direction,
        value=value,
        clean=of_clean,
        corrupted=of_corrupted,
        ids=ints(destination),
    )


def run_and_keep(
    model: HydraForCausalLM, places: Sequence[Site], ids: Tensor, mask: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """What the model computes at each site, by its name, and its logits.

    Raises:
        ValueError: a site carries nothing, because its path is switched off.
    """
    kept: dict[str, Any] = {}

    def keeper(name: str) -> Callable[[Any], None]:
        def keep(value: Any) -> None:
            kept[name] = value

        return keep

    handles = [place.hook(keeper(place.name)) for place in places]
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    silent = [place.name for place in places if place.name not in kept]
    if silent:
        raise ValueError(f"{', '.join(silent)} carries nothing: the path is switched off (set_path_scale)")
    return kept, logits


def measured(metric: Metric, logits_NLV: Tensor) -> NDArray[np.float64]:
    """[N] the metric, checked."""
    found = metric(logits_NLV)
    if found.shape != (len(logits_NLV),):
        raise ValueError(
            f"the metric must give one number for each of the {len(logits_NLV)} pairs, got {list(found.shape)}"
        )
    return found.double().cpu().numpy()


def recovered(
    value: NDArray[np.float64], clean: NDArray[np.float64], corrupted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where the mean over the last axis lies between the means of the corrupted run (0) and of the clean one (1)."""
    gap = clean.mean() - corrupted.mean()
    return (value.mean(axis=-1) - corrupted.mean()) / (gap if gap != 0 else np.nan)


def _patched(
    model: HydraForCausalLM,
    place: Site,
    source: Any,
    destination: Tensor,
    mask: Tensor | None,
    positions: Sequence[int | None],
) -> Tensor:
    """Logits [G N, L, V] of the run with the site patched at each of G positions (None: all at once)."""
    copies = len(positions)

    def patch(value: Any) -> Any:
        if positions[0] is None:
            return source
        patched = value.unflatten(0, (copies, -1)).clone()
        for copy, position in enumerate(positions):
            patched[copy, :, position] = source[:, position]
        return patched.flatten(0, 1)

    handle = place.hook(patch)
    try:
        return model(
            input_ids=destination.repeat(copies, 1),
            attention_mask=None if mask is None else mask.repeat(copies, 1),
            use_cache=False,
        ).logits
    finally:
        handle.remove()


def _check_positions(
    places: Sequence[Site], positions: Sequence[int] | None, ids: Tensor, mask: Tensor | None
) -> None:
    if positions is None:
        return
    decisions = [place.name for place in places if place.kind == "decision"]
    if decisions:
        raise ValueError(f"a decision is replaced whole: leave out positions, or {', '.join(decisions)}")
    shortest = ids.shape[1] if mask is None else int((mask != 0).sum(dim=1).min())
    wrong = [position for position in positions if not 0 <= position < shortest]
    if wrong or not positions:
        raise ValueError(f"positions {wrong} are not among the tokens 0 to {shortest - 1} of every row")
