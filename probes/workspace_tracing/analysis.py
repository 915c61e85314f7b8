"""From patched answers to findings: numpy only, so that it can be tested on data with a known answer.

A patch that merely damages the answer also brings it closer to the other one. So what counts is how much further the
premise's own change moves it than a change of another premise does, through the same slots; and that must exceed a
share of the way that is worth speaking of, because a slot that matters a little moves every answer a little.

Shape suffixes: N problems, T problems that test a slot, Y blocks with a workspace, S slots.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.metrics import mean_interval, pairing_test, sign_flip_p_value
from hydra_lab.probing import Effect, Finding, corrected
from probes.workspace_tracing.measure import Baseline, Floats

Ints = NDArray[np.int64]

FEWEST_SOLVED = 16
"""Problems that the model must solve to be traced: half of them choose a slot, the others test it."""


@dataclass(frozen=True, eq=False)
class Patched:
    """How far an answer moves when slots come from the run whose premise differs, in logits of the contrast.

    Attributes:
        own: [T] with slots from the run whose asked premise differs.
        other: [T] with slots from the run whose other premise differs.
    """

    own: Floats
    other: Floats


@dataclass(frozen=True, eq=False)
class Trace:
    """What was measured on the problems of one kind.

    Attributes:
        kind: name of the kind.
        layers: [Y] blocks with a workspace.
        baseline: of all N problems.
        choosing, testing: indices of the solved problems that choose a slot, and of those that test it; empty where
            too few are solved, and then nothing below is known.
        slot_share: [Y, S] share of the way that the answers of the choosing problems move when one slot is patched.
        chosen: [Y] the slot that moves them furthest.
        slot, block: by block, the chosen slot and all slots patched, on the testing problems.
        everything: all slots of all blocks patched.
        cut: [Y, T] fall of the contrast when the block's workspace is cut.
    """

    kind: str
    layers: tuple[int, ...]
    baseline: Baseline
    choosing: Ints
    testing: Ints
    slot_share: Floats
    chosen: Ints
    slot: tuple[Patched, ...]
    block: tuple[Patched, ...]
    everything: Patched | None
    cut: Floats

    @property
    def way(self) -> Floats:
        """[T] contrast of each testing problem less that of its changed version: the whole way, in logits."""
        return (self.baseline.contrast - self.baseline.contrast_changed)[self.testing]


def split_solved(baseline: Baseline) -> tuple[Ints, Ints]:
    """Indices of the solved problems by turns: those that choose and those that test; none where they are too few."""
    solved = np.flatnonzero(baseline.solved)
    if len(solved) < FEWEST_SOLVED:
        return solved[:0], solved[:0]
    return solved[::2], solved[1::2]


def share_of_way(moved: Floats, way: Floats) -> float:
    """How far the answers move, of the whole way: 1 where all become the other answer's."""
    return float(moved.sum() / way.sum())


def share_interval(moved: Floats, way: Floats, *, num_resamplings: int, seed: int) -> tuple[float, float]:
    """95% bootstrap interval of `share_of_way` over problems."""
    drawn = np.random.default_rng(seed).integers(len(way), size=(num_resamplings, len(way)))
    shares = moved[drawn].sum(axis=1) / way[drawn].sum(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


Draft = tuple[Finding, Callable[[Finding], str]]
"""A finding, and what to say of it once its p-values are corrected."""


def findings(
    traces: list[Trace], *, least_share: float, num_resamplings: int, seed: int
) -> tuple[Finding, ...]:
    """Every finding, with raw p-values; the sentences go by the corrected ones."""
    drafts: list[Draft] = []
    for trace in traces:
        test = _Test(trace, least_share, num_resamplings, seed)
        drafts.append(test.solved())
        drafts += [test.slot(y) for y in range(len(trace.layers))]
    made = [finding for finding, _ in drafts]
    return tuple(
        replace(finding, verdict=say(fixed))
        for finding, fixed, (_, say) in zip(made, corrected(made), drafts, strict=True)
    )


@dataclass(frozen=True, eq=False)
class _Test:
    """The findings about one trace."""

    trace: Trace
    least_share: float
    num_resamplings: int
    seed: int

    def solved(self) -> Draft:
        """Does the answer follow the premise, and does it follow the premise's slots?"""
        trace, baseline = self.trace, self.trace.baseline
        solved = baseline.solved.astype(float)
        test = pairing_test(
            (baseline.hits & baseline.hits_changed).astype(float),
            np.zeros(len(solved), dtype=np.int64),
            num_resamplings=self.num_resamplings,
            seed=self.seed,
        )
        effect = None
        if trace.everything is not None:
            effect = self._effect(
                trace.everything.own - trace.everything.other,
                "all slots of all blocks from the run with the other premise: how far the answer moves",
            )

        def say(fixed: Finding) -> str:
            said = f"{trace.kind}: {100 * fixed.estimate:.0f}% of the problems are solved whatever the premise says"
            if fixed.causal is None:
                return f"{said}; too few to trace ({FEWEST_SOLVED} are needed)."
            moved = f"its slots, all together, move the answer {_percent(fixed.causal.estimate)} of the way"
            if is_shown(fixed.causal):
                return f"{said}; the workspace carries the premise: {moved}."
            if self._is_below(fixed.causal.interval):
                return f"{said}; the workspace does not carry the premise: {moved}."
            return f"{said}; that the workspace carries the premise is not shown: {moved}."

        finding = Finding(
            name=f"{trace.kind}: answers that follow the premise",
            estimate=float(solved.mean()),
            unit="share of problems",
            interval=mean_interval(solved, num_resamplings=self.num_resamplings, seed=self.seed),
            null="premises swapped at random among the problems",
            null_value=test.null_value,
            p_value=test.p_value,
            n=len(solved),
            n_unit="problems",
            verdict="",
            causal=effect,
        )
        return finding, say

    def slot(self, y: int) -> Draft:
        """Does one slot of a block hold the premise?"""
        trace, layer = self.trace, self.trace.layers[y]
        name = f"{trace.kind}: block {layer}, the slot that moves the answer most"
        null = (
            "the premise's own change moves the answer no further than another premise's, and "
            f"{self.least_share:.0%} of the way"
        )
        if trace.everything is None:
            blank = Finding(
                name=name,
                estimate=float("nan"),
                unit="share of the way to the other answer",
                interval=(float("nan"), float("nan")),
                null=null,
                null_value=self.least_share,
                n=0,
                n_unit="problems",
                verdict="",
                layer=layer,
            )
            return (
                blank,
                lambda _fixed: f"{trace.kind}, block {layer}: not traced, too few problems are solved.",
            )
        moved, together = trace.slot[y], trace.block[y]
        all_share = share_of_way(together.own - together.other, trace.way)
        patch = self._effect(moved.own - moved.other, "")

        def say(fixed: Finding) -> str:
            where = f"{trace.kind}, block {layer}"
            slot = f"slot {trace.chosen[y]}"
            if fixed.is_claimed():
                said = f"{where}: {slot} holds the premise and alone moves the answer"
            elif self._is_below(fixed.interval):
                said = f"{where}: no slot holds the premise; the best one ({slot}) moves the answer"
            else:
                said = (
                    f"{where}: no slot is shown to hold the premise; the best one ({slot}) moves the answer"
                )
            said += f" {_percent(fixed.estimate)} of the way, all slots of the block {_percent(all_share)}"
            assert fixed.causal is not None
            fall = f"the answer's lead falls by {_percent(fixed.causal.estimate)} of the way"
            if is_shown(fixed.causal):
                return f"{said}. Without this workspace {fall}."
            return f"{said}. Cutting this workspace is not shown to matter: {fall}."

        finding = Finding(
            name=name,
            estimate=patch.estimate,
            unit="share of the way to the other answer",
            interval=patch.interval,
            null=null,
            null_value=self.least_share,
            p_value=patch.p_value,
            n=len(trace.testing),
            n_unit="solved problems that did not choose the slot",
            verdict="",
            causal=self._effect(trace.cut[y], "the block's workspace cut: how far the answer's lead falls"),
            layer=layer,
        )
        return finding, say

    def _is_below(self, interval: tuple[float, float]) -> bool:
        """Whether an interval excludes what counts as holding a premise."""
        return interval[1] < self.least_share

    def _effect(self, moved: Floats, description: str) -> Effect:
        settings: dict[str, Any] = {"num_resamplings": self.num_resamplings, "seed": self.seed}
        way = self.trace.way
        return Effect(
            description=description,
            estimate=share_of_way(moved, way),
            unit="share of the way to the other answer",
            interval=share_interval(moved, way, **settings),
            p_value=sign_flip_p_value(moved - self.least_share * way, **settings),
        )


def is_shown(effect: Effect) -> bool:
    """Whether the corrected p-value of an effect allows the claim."""
    return effect.p_corrected is not None and effect.p_corrected <= 0.05


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%".replace("-0.0%", "0.0%")
