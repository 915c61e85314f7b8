"""Rank correlations and ratios with their tests and intervals."""

import numpy as np
import pytest

from hydra_lab.probing.resampling import (
    rank_correlation,
    rank_correlation_interval,
    rank_correlation_p_value,
    ratio_interval,
)

RESAMPLING = {"num_resamplings": 199, "seed": 0}


def test_rank_correlation_by_hand() -> None:
    a = np.array([1.0, 2.0, 2.0, np.inf])
    assert rank_correlation(a, np.array([10.0, 20.0, 20.0, 30.0])) == pytest.approx(1.0)
    assert rank_correlation(a, np.array([3.0, 2.0, 2.0, 1.0])) == pytest.approx(-1.0)
    assert rank_correlation(a, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.9486833)  # sqrt(0.9)
    assert np.isnan(rank_correlation(a, np.ones(4)))


def test_a_constant_is_no_evidence() -> None:
    a = np.arange(6.0)
    assert rank_correlation_p_value(a, np.ones(6), **RESAMPLING) == 1.0
    assert np.isnan(rank_correlation_interval(a, np.ones(6), **RESAMPLING)).all()


def test_a_correlation_is_found_and_its_opposite_is_not() -> None:
    a = np.arange(12.0)
    assert rank_correlation_p_value(a, a**3, **RESAMPLING) == 1 / 200
    assert rank_correlation_p_value(a, -a, **RESAMPLING) == 1.0
    low, high = rank_correlation_interval(a, a + np.random.default_rng(0).normal(size=12), **RESAMPLING)
    assert 0.5 < low < high <= 1.0


def test_level_of_the_correlation_test() -> None:
    """200 pairs of unrelated vectors: 10 false claims expected at 5%, more than 19 have a chance of 0.3%."""
    rng = np.random.default_rng(0)
    claims = 0
    for seed in range(200):
        first, second = rng.normal(size=(2, 10))
        claims += rank_correlation_p_value(first, second, num_resamplings=99, seed=seed) <= 0.05
    assert claims <= 19


def test_interval_of_a_ratio() -> None:
    denominator = np.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(ratio_interval(0.5 * denominator, denominator, **RESAMPLING), (0.5, 0.5))
    low, high = ratio_interval(np.array([0.0, 2.0, 0.0, 4.0]), denominator, **RESAMPLING)
    assert 0.0 <= low < 0.6 < high <= 1.0
    assert np.isnan(ratio_interval(denominator, np.zeros(4), **RESAMPLING)).all()
