"""Rank correlations and ratios with their tests and intervals.

The unit that is permuted or redrawn is the one that is independent (a text, a problem, a head), never a token.
"""

import numpy as np

from hydra_lab.metrics.arrays import FloatArray

_ROUNDING = 1e-12
"""A correlation that falls short of the observed one by less than this equals it."""


def rank_correlation(first: FloatArray, second: FloatArray) -> float:
    """Spearman's rank correlation of two vectors, ties at their mean rank; NaN where one is constant."""
    centred = [each - each.mean() for each in (_ranks(first), _ranks(second))]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / norm if norm > 0 else float("nan")


def rank_correlation_p_value(
    first: FloatArray, second: FloatArray, *, num_resamplings: int, seed: int
) -> float:
    """One-sided p-value of a positive rank correlation: `second` is permuted. 1 where either is constant."""
    observed = rank_correlation(first, second)
    if np.isnan(observed):
        return 1.0
    rng = np.random.default_rng(seed)
    permuted = [rank_correlation(first, rng.permutation(second)) for _ in range(num_resamplings)]
    exceeding = int((np.array(permuted) >= observed - _ROUNDING).sum())
    return (1 + exceeding) / (1 + num_resamplings)


def rank_correlation_interval(
    first: FloatArray, second: FloatArray, *, num_resamplings: int, seed: int
) -> tuple[float, float]:
    """95% percentile bootstrap interval of the rank correlation over pairs; NaN where it does not exist."""
    if np.isnan(rank_correlation(first, second)):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(first), size=(num_resamplings, len(first)))
    values = np.array([rank_correlation(first[rows], second[rows]) for rows in drawn])
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def ratio_interval(
    numerator: FloatArray, denominator: FloatArray, *, num_resamplings: int, seed: int
) -> tuple[float, float]:
    """95% percentile bootstrap interval of sum(numerator) / sum(denominator) over their entries [N]; NaN where the
    denominator is zero."""
    if not denominator.any():
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(numerator), size=(num_resamplings, len(numerator)))
    values = numerator[drawn].sum(axis=1) / np.maximum(denominator[drawn].sum(axis=1), 1e-300)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _ranks(values: FloatArray) -> FloatArray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
