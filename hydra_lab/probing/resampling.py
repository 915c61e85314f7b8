"""Tests of findings by permutation: what the figure would be were it chance which value is whose.

The unit that is permuted is the one that is independent (a text, a problem, a head), never a token.
"""

import numpy as np

from hydra_lab.metrics.arrays import FloatArray

_ROUNDING = 1e-12
"""Relative size of a difference that is rounding, so that a tie counts as one."""


def sign_flip_p_value(values: FloatArray, *, num_resamplings: int, seed: int) -> float:
    """Two-sided p-value of "the mean of `values` [N] is zero", where each is a difference within one pair.

    Were there no effect, it would be chance which of a pair is subtracted from which, so the signs are flipped at random
    (Fisher 1935). 1 where every value is zero.
    """
    rng = np.random.default_rng(seed)
    sign_WN = rng.integers(2, size=(num_resamplings, len(values))) * 2.0 - 1.0
    observed = abs(float(values.mean()))
    flipped_W = np.abs(sign_WN @ values) / len(values)
    return _p_value(int((flipped_W >= observed * (1 - _ROUNDING)).sum()), num_resamplings)


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
    return _p_value(int((np.array(permuted) >= observed - _ROUNDING).sum()), num_resamplings)


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


def _p_value(num_exceeding: int, num_resamplings: int) -> float:
    """The observed order counts as one of the permutations (Phipson and Smyth 2010), so that p is never 0."""
    return (1 + num_exceeding) / (1 + num_resamplings)


def _ranks(values: FloatArray) -> FloatArray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
