"""Several seeds of one study as one list of findings."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from hydra_lab.probing.findings import Effect, Finding

Item = TypeVar("Item")


def combined_p_value(p_values: Sequence[float]) -> float:
    """One p-value from several of the same hypothesis, valid however they depend on each other.

    Twice their median, at most 1 (Rüger 1978): seeds share the model and the samples, so their p-values are far from
    independent. A single one is handed back as it is.
    """
    if len(p_values) == 1:
        return p_values[0]
    return min(1.0, 2.0 * float(np.median(p_values)))


def combine(runs: Sequence[Sequence[Finding]]) -> tuple[Finding, ...]:
    """The findings of one study under several seeds, as one per name.

    Estimate: the median over the seeds. Interval: from the lowest low to the highest high. p: `combined_p_value`; a
    seed that did not report the finding counts as p = 1. Sentences, and everything else that a seed may change, are
    those of the seed whose estimate lies nearest to the median.

    Args:
        runs: findings by seed, with raw p-values.
    """
    if len(runs) == 1:
        return tuple(runs[0])
    names = dict.fromkeys(finding.name for run in runs for finding in run)
    by_name = [{finding.name: finding for finding in run} for run in runs]
    return tuple(_combine([run.get(name) for run in by_name]) for name in names)


def _combine(reports: Sequence[Finding | None]) -> Finding:
    known = [report for report in reports if report is not None]
    middle = _nearest_to_median(known, lambda finding: finding.estimate)
    effects = [report.causal for report in known if report.causal is not None]
    return dataclasses.replace(
        middle,
        estimate=_median([finding.estimate for finding in known]),
        null_value=_median([finding.null_value for finding in known]),
        interval=_hull([finding.interval for finding in known]),
        p_value=_p_value([report and report.p_value for report in reports]),
        p_corrected=None,
        n=min(finding.n for finding in known),
        causal=_combine_effects(effects, len(reports)) if effects else None,
    )


def _combine_effects(effects: list[Effect], num_seeds: int) -> Effect:
    middle = _nearest_to_median(effects, lambda effect: effect.estimate)
    missing: list[float | None] = [None] * (num_seeds - len(effects))
    return dataclasses.replace(
        middle,
        estimate=_median([effect.estimate for effect in effects]),
        interval=_hull([effect.interval for effect in effects]),
        p_value=_p_value([effect.p_value for effect in effects] + missing),
        p_corrected=None,
    )


def _p_value(p_values: Sequence[float | None]) -> float | None:
    if all(p is None for p in p_values):
        return None
    return combined_p_value([1.0 if p is None else p for p in p_values])


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.median(known)) if known else math.nan


def _hull(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    lows = [low for low, _ in intervals if not math.isnan(low)]
    highs = [high for _, high in intervals if not math.isnan(high)]
    return min(lows, default=math.nan), max(highs, default=math.nan)


def _nearest_to_median(items: Sequence[Item], estimate: Callable[[Item], float]) -> Item:
    middle = _median([estimate(item) for item in items])
    distances = [abs(estimate(item) - middle) for item in items]
    return items[int(np.argmin([math.inf if math.isnan(each) else each for each in distances]))]
