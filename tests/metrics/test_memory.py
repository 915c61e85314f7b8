"""Memory metrics on lookups whose values are known by hand."""

import numpy as np
import pytest

from hydra_lab import metrics


def record(addresses: np.ndarray, weights: np.ndarray, num_keys: tuple[int, int], **changes: object):
    num_samples, num_positions = addresses.shape[:2]
    fields: dict = {
        "layer": 3,
        "addresses": addresses,
        "weights": weights,
        "gate": np.full((num_samples, num_positions), 0.5),
        "tokens": np.tile(np.arange(num_positions), (num_samples, 1)),
        "length": np.full(num_samples, num_positions),
        "domains": ("facts",) * num_samples,
        "num_keys": num_keys,
    }
    return metrics.LookupRecord(**{**fields, **changes})


def test_even_use() -> None:
    even = record(np.arange(12).reshape(1, 12, 1, 1), np.ones((1, 12, 1, 1)), (3, 4))
    use = metrics.memory_use(even)
    assert use.used_share == 1.0
    assert use.kl_to_uniform == pytest.approx(0.0, abs=1e-12)
    assert use.gini == pytest.approx(0.0)
    np.testing.assert_allclose(use.coverage, use.coverage_rows / 12)
    assert use.used_share_if_uniform == pytest.approx(1 - (11 / 12) ** 12)
    assert (use.num_reads, use.num_tokens, use.num_samples, use.num_rows) == (12, 12, 1, 12)


def test_all_on_one_row() -> None:
    single = record(np.full((1, 5, 2, 1), 7), np.ones((1, 5, 2, 1)), (3, 4))
    use = metrics.memory_use(single)
    assert use.used_share == pytest.approx(1 / 12)
    assert use.kl_to_uniform == pytest.approx(np.log(12))
    assert use.gini == pytest.approx(1 - 1 / 12)
    np.testing.assert_allclose(use.coverage, 1)


def test_weights_count_and_positions_past_the_end_do_not() -> None:
    addresses = np.array([[[[0, 1]], [[0, 2]], [[3, 3]]]])
    weights = np.array([[[[0.75, 0.25]], [[0.5, 0.5]], [[0.5, 0.5]]]])
    use = metrics.memory_use(record(addresses, weights, (2, 2), length=np.array([2])))
    # mass: 1.25, 0.25, 0.5, 0
    assert use.used_share == 0.75
    share = np.array([0.625, 0.25, 0.125])
    assert use.kl_to_uniform == pytest.approx(float((share * np.log(4 * share)).sum()))
    assert use.gini == pytest.approx((-3 * 0 - 1 * 0.25 + 1 * 0.5 + 3 * 1.25) / (4 * 2))
    np.testing.assert_array_equal(use.coverage_rows, [1, 2, 3, 4])
    np.testing.assert_allclose(use.coverage, [0.625, 0.875, 1, 1])


def test_beta_by_domain_weighs_samples_not_tokens() -> None:
    gate = np.array([[0.2, 0.4, 9.0], [0.8, 0.8, 0.8], [0.1, 9.0, 9.0]])
    result = metrics.beta_by_domain(
        record(
            np.zeros((3, 3, 1, 1), int),
            np.ones((3, 3, 1, 1)),
            (2, 2),
            gate=gate,
            length=np.array([2, 3, 1]),
            domains=("facts", "facts", "code"),
        )
    )
    assert result.domains == ("facts", "code")
    np.testing.assert_allclose(result.mean, [(0.3 + 0.8) / 2, 0.1])
    np.testing.assert_allclose(result.error[0], np.std([0.3, 0.8], ddof=1) / np.sqrt(2))
    assert np.isnan(result.error[1])
    np.testing.assert_allclose(result.quantiles[:, 2], [0.8, 0.1])
    np.testing.assert_array_equal(result.num_tokens, [5, 1])


def test_top_tokens_of_an_address() -> None:
    addresses = np.array([[[[5, 1]], [[5, 2]], [[1, 5]]], [[[5, 1]], [[0, 1]], [[5, 0]]]])
    weights = np.array(
        [[[[0.9, 0.1]], [[0.6, 0.4]], [[0.7, 0.3]]], [[[0.8, 0.2]], [[0.5, 0.5]], [[1.0, 0.0]]]]
    )
    tokens = np.array([[10, 11, 11], [11, 12, 13]])
    result = metrics.top_tokens(record(addresses, weights, (2, 3), tokens=tokens, length=np.array([3, 2])), 5)
    np.testing.assert_array_equal(result.tokens, [11, 10])
    np.testing.assert_allclose(result.weight, [0.6 + 0.3 + 0.8, 0.9])
    np.testing.assert_array_equal(result.count, [3, 1])
    np.testing.assert_array_equal(result.example, [[1, 0], [0, 0]])
    assert (result.num_reads, result.num_tokens) == (4, 5)
    never = metrics.top_tokens(record(addresses, weights, (2, 3), tokens=tokens), 4)
    assert len(never.tokens) == 0 and never.num_reads == 0
    with pytest.raises(ValueError, match="address 6"):
        metrics.top_tokens(record(addresses, weights, (2, 3), tokens=tokens), 6)


def test_map_pools_and_quantises() -> None:
    addresses = np.array([0, 1, 6, 6, 6, 6]).reshape(1, 6, 1, 1)
    whole = metrics.memory_map(record(addresses, np.ones((1, 6, 1, 1)), (4, 5)))
    assert whole.cell == (1, 1) and whole.level.shape == (4, 5) and whole.level.dtype == np.uint8
    assert whole.level[1, 1] == 255 and whole.level[0, 2] == 0 and whole.peak == 4
    np.testing.assert_allclose(whole.weight[0, :2], 1, atol=0.02)
    pooled = metrics.memory_map(record(addresses, np.ones((1, 6, 1, 1)), (4, 5)), max_size=2)
    assert pooled.cell == (2, 3)
    np.testing.assert_array_equal(pooled.level > 0, [[True, False], [False, False]])
    assert pooled.peak == 6


def test_map_of_a_large_memory_is_capped() -> None:
    large = record(np.array([[[[1024 * 1024 - 1]]]]), np.ones((1, 1, 1, 1)), (1024, 1024))
    result = metrics.memory_map(large)
    assert result.level.shape == (512, 512) and result.cell == (2, 2) and result.level[-1, -1] == 255


def test_bad_addresses_are_named() -> None:
    with pytest.raises(ValueError, match=r"addresses holds 12\.\.12, expected 0\.\.11"):
        record(np.full((1, 1, 1, 1), 12), np.ones((1, 1, 1, 1)), (3, 4))
