"""Mutual information, its null, its interval and the corrections for many tests."""

import numpy as np
import pytest

from hydra_lab import metrics


def clustered(
    rng: np.random.Generator, num_samples: int, num_experts: int, concentration: float
) -> np.ndarray:
    """[N, E] counts of 8 chunks per sample; small concentrations make a sample's chunks resemble each
    other."""
    taste = rng.dirichlet(np.full(num_experts, concentration), size=num_samples)
    return np.stack([rng.multinomial(8, each) for each in taste]).astype(float)


def test_mutual_information_of_known_tables() -> None:
    assert metrics.mutual_information(np.diag([5.0, 5.0])) == pytest.approx(np.log(2))
    assert metrics.mutual_information(np.outer([1.0, 3.0], [2.0, 5.0, 1.0])) == pytest.approx(0.0, abs=1e-12)
    # p = [[.4, .1], [.2, .3]]
    joint = np.array([[4.0, 1.0], [2.0, 3.0]])
    expected = sum(
        p * np.log(p / (row * column))
        for p, row, column in [(0.4, 0.5, 0.6), (0.1, 0.5, 0.4), (0.2, 0.5, 0.6), (0.3, 0.5, 0.4)]
    )
    assert metrics.mutual_information(joint) == pytest.approx(expected)
    assert metrics.mutual_information(np.zeros((2, 2))) == 0.0


def test_planted_dependence_on_the_group_is_found() -> None:
    group = np.repeat(np.arange(2), 20)
    counts = np.eye(2)[group] * 8
    result = metrics.information_of_groups(counts, group, num_resamplings=200)
    assert result.value == pytest.approx(np.log(2))
    assert result.p_value == pytest.approx(1 / 201)
    assert result.interval == pytest.approx((result.corrected, result.corrected))
    assert (result.num_samples, result.num_observations) == (40, 320)


def test_clustered_samples_without_structure_keep_the_false_positive_rate() -> None:
    """Chunks of a sample strongly resemble each other: shuffling chunks would reject nearly always, permuting
    whole samples rejects 5% of the time. 200 structureless data sets: more than 20 rejections have a chance
    of 0.1%."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(4), 8)
    p_values = [
        metrics.information_of_groups(
            clustered(rng, 32, 6, 0.2), group, num_resamplings=79, seed=seed
        ).p_value
        for seed in range(200)
    ]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.10


def test_bias_is_taken_off() -> None:
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(4), 8)
    results = [
        metrics.information_of_groups(clustered(rng, 32, 6, 0.5), group, num_resamplings=60, seed=seed)
        for seed in range(60)
    ]
    assert np.mean([each.value for each in results]) > 0.06
    assert abs(np.mean([each.corrected for each in results])) < 0.02


def test_interval_covers_the_truth() -> None:
    """Two groups with experts drawn 80:20 and 20:80, 8 chunks from each of 60 samples: I = 0.1927 nats."""
    truth = float(metrics.mutual_information(np.array([[0.8, 0.2], [0.2, 0.8]])))
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(2), 30)
    covered = 0
    for seed in range(100):
        counts = np.stack([rng.multinomial(8, [0.8, 0.2] if g == 0 else [0.2, 0.8]) for g in group]).astype(
            float
        )
        low, high = metrics.information_of_groups(counts, group, num_resamplings=200, seed=seed).interval
        covered += low <= truth <= high
    assert covered >= 85


def test_labels_inside_samples() -> None:
    rng = np.random.default_rng(4)
    group = np.repeat(np.arange(2), 10)
    labels = rng.integers(3, size=(20, 32))
    options = {"num_decisions": 3, "num_labels": 3, "num_resamplings": 99}
    planted = metrics.information_of_labels(labels, labels, group, **options)
    assert planted.value == pytest.approx(np.log(3), abs=0.02)
    assert planted.p_value == pytest.approx(0.01)
    absent = np.full_like(labels, -1)
    assert metrics.information_of_labels(absent, labels, group, **options).value == 0.0


def test_labels_that_only_follow_the_group_are_not_found() -> None:
    """Decision and label both depend on the group and are constant for long stretches, but not on each
    other."""
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(2), 8)
    rejections = 0
    for seed in range(200):
        runs = rng.random((2, 16, 4)) < np.where(group == 0, 0.2, 0.8)[:, None]
        decisions, labels = np.repeat(runs, 8, axis=-1).astype(int)
        result = metrics.information_of_labels(
            decisions, labels, group, num_decisions=2, num_labels=2, num_resamplings=79, seed=seed
        )
        rejections += result.p_value <= 0.05
    assert rejections <= 20


def test_preferences_of_single_cells() -> None:
    group = np.repeat(np.arange(3), 10)
    rng = np.random.default_rng(6)
    counts = np.stack(
        [rng.multinomial(8, [0.8, 0.1, 0.1] if g == 0 else [0.1, 0.45, 0.45]) for g in group]
    ).astype(float)
    p_values = metrics.benjamini_hochberg(
        metrics.group_preference_p_values(counts, group, num_resamplings=400)
    )
    assert p_values[0, 0] < 0.05
    empty = clustered(rng, 30, 3, 0.3)
    assert (metrics.holm(metrics.group_preference_p_values(empty, group, num_resamplings=400)) > 0.05).all()


def test_corrections_on_known_p_values() -> None:
    p_values = np.array([[0.01, 0.04], [0.03, 0.005]])
    np.testing.assert_allclose(metrics.holm(p_values), [[0.03, 0.06], [0.06, 0.02]])
    np.testing.assert_allclose(metrics.benjamini_hochberg(p_values), [[0.02, 0.04], [0.04, 0.02]])
    np.testing.assert_allclose(metrics.holm(np.array([0.9, 0.8])), [1.0, 1.0])


def test_interval_of_a_mean() -> None:
    low, high = metrics.mean_interval(np.random.default_rng(0).normal(size=400))
    assert low < 0.05 and high > -0.05 and high - low == pytest.approx(4 * 0.05, rel=0.15)
