"""Paired tests against exact enumeration, and their false-positive rate on data without structure."""

import itertools

import numpy as np
import pytest

from hydra_lab.metrics import mcnemar_p_value, pairing_test, sign_flip_p_value


def test_sign_flips_approach_the_exact_p_value() -> None:
    differences = np.array([0.5, 1.0, -0.2, 0.8, 0.1, 0.4])
    sums = np.array([np.dot(signs, differences) for signs in itertools.product((-1, 1), repeat=6)])
    one_sided = (sums >= differences.sum() - 1e-12).mean()
    two_sided = (np.abs(sums) >= differences.sum() - 1e-12).mean()
    # 20,000 flips: standard error of the share below 0.002
    assert sign_flip_p_value(differences, num_resamplings=20_000) == pytest.approx(one_sided, abs=0.006)
    assert sign_flip_p_value(differences, two_sided=True, num_resamplings=20_000) == pytest.approx(
        two_sided, abs=0.008
    )
    assert sign_flip_p_value(-differences, num_resamplings=2000) > 0.8
    assert sign_flip_p_value(np.zeros(9)) == 1.0


def test_pairing_approaches_the_exact_p_value() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 5)) + 0.8 * np.eye(5)
    means = np.array([scores[range(5), order].mean() for order in itertools.permutations(range(5))])
    found = pairing_test(scores, np.zeros(5, dtype=np.int64), num_resamplings=20_000)
    assert found.value == pytest.approx(np.trace(scores) / 5)
    assert found.null_value == pytest.approx(means.mean(), abs=0.02)
    assert found.p_value == pytest.approx((means >= found.value - 1e-12).mean(), abs=0.008)


def test_partners_are_exchanged_inside_groups_only() -> None:
    """The scores know the group and nothing else: no evidence within groups, plenty without them."""
    group = np.repeat([0, 1], 6)
    scores = (group[:, None] == group).astype(float)
    assert pairing_test(scores, group).p_value == 1.0
    assert pairing_test(scores, np.zeros(12, dtype=np.int64)).p_value < 0.01


def test_mcnemar_is_a_binomial_tail() -> None:
    before = np.array([True] * 8 + [False] * 2 + [True] * 5)
    after = np.array([False] * 8 + [True] * 2 + [True] * 5)
    # 8 lost and 2 gained: P(at least 8 of 10 coins) = (45 + 10 + 1) / 1024
    assert mcnemar_p_value(before, after) == pytest.approx(56 / 1024)
    assert mcnemar_p_value(before, before) == 1.0


def test_false_positive_rates() -> None:
    """At 5%, 200 structureless data sets give 10 claims; more than 20 have a chance of 0.1%."""
    rng = np.random.default_rng(1)
    group = np.zeros(12, dtype=np.int64)
    flips = sum(
        sign_flip_p_value(rng.standard_t(2, size=12), num_resamplings=99, seed=seed) <= 0.05
        for seed in range(200)
    )
    pairs = sum(
        pairing_test(rng.gamma(0.5, size=(12, 12)), group, num_resamplings=99, seed=seed).p_value <= 0.05
        for seed in range(200)
    )
    assert flips <= 20 and pairs <= 20
