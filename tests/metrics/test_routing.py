"""Routing metrics on four samples whose routing is written out by hand."""

import numpy as np
import pytest

from hydra_lab import metrics

# One block, 4 experts, top-2, chunks of 4 tokens. Samples of 12, 8, 5 and 4 tokens: 3, 2, 2 and 1 chunks.
EXPERTS = np.array(
    [
        [[0, 1], [0, 1], [1, 2]],
        [[0, 2], [2, 0], [3, 3]],  # the third entries of the shorter samples are not theirs
        [[1, 0], [1, 2], [3, 3]],
        [[0, 1], [3, 3], [3, 3]],
    ]
)[None]
LENGTH = np.array([12, 8, 5, 4])


def record(weights: np.ndarray | None = None) -> metrics.RoutingRecord:
    return metrics.RoutingRecord(
        layers=(2,),
        experts=EXPERTS,
        num_experts=4,
        chunk_size=4,
        length=LENGTH,
        domains=("code", "code", "prose", "prose"),
        weights=weights,
    )


def test_load_counts_every_choice_and_the_dead_expert() -> None:
    load = metrics.expert_load(record())
    # chunks: 01 01 12 | 02 20 | 10 12 | 01  -> expert 0: 6, 1: 6, 2: 4, 3: 0 of 16 choices
    np.testing.assert_allclose(load.share, [[6 / 16, 6 / 16, 4 / 16, 0]])
    np.testing.assert_allclose(load.first_share, [[4 / 8, 3 / 8, 1 / 8, 0]])
    np.testing.assert_array_equal(load.dead, [[False, False, False, True]])
    np.testing.assert_allclose(load.imbalance, [6 / 4])  # the mean counts the unused expert: 16 / 4
    assert (load.num_chunks, load.num_samples) == (8, 4)


def test_load_of_uniform_and_of_one_expert() -> None:
    uniform = metrics.RoutingRecord((0,), np.arange(4).reshape(1, 1, 4, 1), 4, 1, np.array([4]), ("a",))
    assert metrics.expert_load(uniform).entropy == pytest.approx(1.0)
    assert metrics.expert_load(uniform).imbalance == pytest.approx(1.0)
    single = metrics.RoutingRecord((0,), np.zeros((1, 1, 4, 1), int), 4, 1, np.array([4]), ("a",))
    assert metrics.expert_load(single).entropy == pytest.approx(0.0)
    assert metrics.expert_load(single).imbalance == pytest.approx(4.0)


def test_by_domain() -> None:
    result = metrics.expert_by_domain(record())
    assert result.domains == ("code", "prose")
    np.testing.assert_allclose(result.share, [[[0.4, 0.3, 0.3, 0], [2 / 6, 3 / 6, 1 / 6, 0]]])
    np.testing.assert_allclose(result.lift[0, 0, 1], np.log2(0.3 / 0.4))
    assert np.isnan(result.lift[0, 0, 3])
    np.testing.assert_array_equal(result.num_chunks, [5, 3])
    np.testing.assert_array_equal(result.num_samples, [2, 2])


def test_by_chunk_counts_only_the_samples_that_are_that_long() -> None:
    result = metrics.expert_by_chunk(record())
    np.testing.assert_array_equal(result.num_samples, [4, 3, 1])
    np.testing.assert_allclose(result.share[0, 0], [4 / 8, 3 / 8, 1 / 8, 0])
    np.testing.assert_allclose(result.share[0, 2], [0, 0.5, 0.5, 0])


def test_by_position_is_the_mean_weight_on_each_expert() -> None:
    weights = np.zeros((1, 4, 12, 2))
    weights[..., 0], weights[..., 1] = 0.75, 0.25
    result = metrics.expert_by_position(record(weights), num_bins=3)
    np.testing.assert_array_equal(result.edges, [0, 4, 8, 12])
    np.testing.assert_array_equal(result.num_tokens, [16, 9, 4])
    # positions 0-3: choices 01, 02, 10, 01
    np.testing.assert_allclose(
        result.weight[0, 0], [(3 * 0.75 + 0.25) / 4, (0.75 + 2 * 0.25) / 4, 0.25 / 4, 0]
    )
    # positions 4-7: 01 for 4 tokens, 20 for 4, 12 for 1
    np.testing.assert_allclose(result.weight[0, 1], [4 / 9, (1 + 0.75) / 9, (3 + 0.25) / 9, 0])
    np.testing.assert_allclose(np.nansum(result.weight, axis=-1), 1)
    with pytest.raises(ValueError, match="token weights"):
        metrics.expert_by_position(record())


def test_co_activation_counts_all_pairs_of_the_top_k() -> None:
    experts = np.array([[[[0, 1, 2]], [[0, 1, 3]]]])  # ranks 0 and 2 are a pair too
    three = metrics.RoutingRecord((0,), experts, 4, 4, np.array([4, 4]), ("a", "a"))
    result = metrics.co_activation(three)
    expected = np.array([[1, 1, 0.5, 0.5], [1, 1, 0.5, 0.5], [0.5, 0.5, 0.5, 0], [0.5, 0.5, 0, 0.5]])
    np.testing.assert_allclose(result.probability[0], expected)
    off = ~np.eye(4, dtype=bool)
    assert result.probability[0][off].sum() == pytest.approx(3 * 2)
    # pairs 6; products of loads: 2 * (1 + 4 * 0.5 + 0.25) = 6.5
    np.testing.assert_allclose(result.lift[0, 0, 1], 1 / (1 * 6 / 6.5))
    np.testing.assert_allclose(result.lift[0, 2, 3], 0)
    assert np.isnan(result.lift[0, 0, 0])


def test_lift_is_one_where_every_pair_is_equally_common() -> None:
    pairs = np.array([[i, j] for i in range(4) for j in range(i)])
    even = metrics.RoutingRecord((0,), pairs[None, :, None], 4, 4, np.full(6, 4), ("a",) * 6)
    lift = metrics.co_activation(even).lift[0]
    np.testing.assert_allclose(lift[~np.eye(4, dtype=bool)], 1)


def test_switch_rate() -> None:
    result = metrics.switch_rate(record())
    # successive first choices: 0 0 1 | 0 2 | 1 1 -> 2 of 4 differ; sets: 0, 1/2, 0, 1/2 replaced
    np.testing.assert_allclose(result.first, [2 / 4])
    np.testing.assert_allclose(result.replaced, [1 / 4])
    np.testing.assert_allclose(result.first_by_domain, [[2 / 3, 0]])
    np.testing.assert_array_equal(result.num_pairs, [3, 1])
    np.testing.assert_allclose(result.first_if_independent, [1 - (16 + 9 + 1) / 64])


def test_map_of_one_sample() -> None:
    weights = np.zeros((1, 4, 12, 2))
    weights[0, 2, :5, 0] = [1, 0.5, 0.5, 0, 0.25]
    result = metrics.routing_map(record(weights), sample=2)
    np.testing.assert_array_equal(result.experts, [[[1, 0], [1, 2]]])
    np.testing.assert_allclose(result.weights[0, :, 0], [0.5, 0.25])
    assert result.num_tokens == 5
    with pytest.raises(ValueError, match="sample 7"):
        metrics.routing_map(record(), sample=7)


def test_bad_records_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"expected 0\.\.1"):
        metrics.RoutingRecord((2,), EXPERTS, 2, 4, LENGTH, ("a",) * 4)
    with pytest.raises(ValueError, match="longest sample has 4"):
        metrics.RoutingRecord((2,), EXPERTS, 4, 3, LENGTH, ("a",) * 4)
    with pytest.raises(ValueError, match="3 labels"):
        metrics.RoutingRecord((2,), EXPERTS, 4, 4, LENGTH, ("a",) * 3)
    with pytest.raises(ValueError, match="experts"):
        metrics.RoutingRecord((2, 3), EXPERTS, 4, 4, LENGTH, ("a",) * 4)
