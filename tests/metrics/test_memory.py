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


def test_reads_are_counted_as_well_as_weighed() -> None:
    addresses = np.array([0, 0, 0, 1]).reshape(1, 4, 1, 1)
    weights = np.array([0.25, 0.25, 0.5, 1.0]).reshape(1, 4, 1, 1)
    use = metrics.memory_use(record(addresses, weights, (1, 2)))
    assert use.kl_to_uniform == pytest.approx(0.0, abs=1e-12) and use.gini == pytest.approx(0.0)
    assert use.kl_of_reads == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert use.gini_of_reads == pytest.approx((3 - 1) / (2 * 4))
    np.testing.assert_allclose(use.coverage, [0.5, 1])
    np.testing.assert_allclose(use.coverage_of_reads, [0.75, 1])


@pytest.mark.parametrize("per_row", [0.2, 3.0, 400.0])
def test_even_reads_at_random_look_as_uneven_as_stated(per_row: float) -> None:
    num_rows = 4096
    reads = np.random.default_rng(0).integers(num_rows, size=int(per_row * num_rows)).reshape(1, -1, 1, 1)
    use = metrics.memory_use(record(reads, np.ones_like(reads, dtype=float), (64, 64)))
    # one draw of thousands of rows: the spread of these means is below 3%
    assert use.kl_of_reads == pytest.approx(use.kl_of_reads_if_uniform, rel=0.05)
    assert use.gini_of_reads == pytest.approx(use.gini_of_reads_if_uniform, rel=0.03)
    assert use.used_share == pytest.approx(use.used_share_if_uniform, rel=0.03)


def test_use_by_domain_and_by_head() -> None:
    addresses = np.array([[[[0], [3]], [[1], [3]]], [[[1], [2]], [[1], [2]]]])  # [sample, position, head, k]
    weights = np.ones((2, 2, 2, 1))
    lookups = record(addresses, weights, (2, 2), domains=("facts", "code"))
    by_domain = metrics.memory_use_by_domain(lookups)
    assert by_domain.groups == ("facts", "code") and by_domain.kind == "domain"
    facts, code = by_domain.use
    # facts read rows 0 1 3 3, code 1 1 2 2
    assert (facts.used_share, code.used_share) == (3 / 4, 2 / 4)
    assert code.kl_of_reads == pytest.approx(np.log(2))
    assert (facts.num_reads, facts.num_tokens, facts.num_samples) == (4, 2, 1)
    np.testing.assert_allclose(by_domain.shared, [[1, 1 / 3], [1 / 2, 1]])
    np.testing.assert_allclose(by_domain.weight_in_common, [[1, 1 / 4], [1 / 4, 1]])
    by_head = metrics.memory_use_by_head(lookups)
    assert by_head.groups == ("0", "1")
    # head 0 reads rows 0 1 1 1, head 1 reads 3 3 2 2
    assert [use.used_share for use in by_head.use] == [0.5, 0.5]
    assert by_head.use[0].gini_of_reads == pytest.approx((-3 * 0 - 1 * 0 + 1 * 1 + 3 * 3) / (4 * 4))
    np.testing.assert_allclose(by_head.shared, np.eye(2))
    assert [use.num_reads for use in by_head.use] == [4, 4]


def test_dead_rows_and_half_keys() -> None:
    addresses = np.array([0, 2, 9, 11]).reshape(1, 4, 1, 1)  # rows (0,0) (0,2) (2,1) (2,3) of 3 x 4
    result = metrics.dead_addresses(record(addresses, np.ones((1, 4, 1, 1)), (3, 4)))
    np.testing.assert_array_equal(result.addresses, [1, 3, 4, 5, 6, 7, 8, 10])
    assert result.share == 8 / 12 and result.share_if_uniform == pytest.approx((11 / 12) ** 4)
    np.testing.assert_array_equal(result.dead_first_keys, [1])
    assert len(result.dead_second_keys) == 0
    assert result.cell == (1, 1) and result.map[1].tolist() == [1, 1, 1, 1] and result.map[0, 0] == 0
    pooled = metrics.dead_addresses(record(addresses, np.ones((1, 4, 1, 1)), (3, 4)), max_size=2)
    assert pooled.cell == (2, 2)
    np.testing.assert_allclose(
        pooled.map, [[3 / 4, 3 / 4], [1 / 2, 1 / 2]]
    )  # the last cells hold one row of keys
    used = metrics.dead_addresses(record(np.arange(12).reshape(1, 12, 1, 1), np.ones((1, 12, 1, 1)), (3, 4)))
    assert len(used.addresses) == 0 and used.share == 0


def facts_record() -> metrics.LookupRecord:
    """Four prompts of two tokens: 0 and 1 read the same rows, 2 and 3 share half of theirs."""
    addresses = np.array([[[0, 1], [2, 3]], [[0, 1], [3, 2]], [[4, 5], [6, 7]], [[4, 5], [8, 9]]])[:, :, None]
    weights = np.tile([0.75, 0.25], (4, 2, 1, 1))
    return record(addresses, weights, (3, 4))


def test_overlap_of_facts() -> None:
    result = metrics.address_overlap(facts_record(), ["Rome", "Rome", "Oslo", "Oslo"], num_resamplings=99)
    np.testing.assert_array_equal(result.num_rows, [4, 4, 4, 4])
    np.testing.assert_allclose(result.jaccard[0], [1, 1, 0, 0])
    np.testing.assert_allclose(result.jaccard[2, 3], 2 / 6)
    # shares of prompt 0: 3 1 3 1 of 8 on rows 0..3, of prompt 1: 3 1 1 3
    np.testing.assert_allclose(result.weighted[0, 1], (3 + 1 + 1 + 1) / 8)
    np.testing.assert_allclose(result.weighted[2, 3], (3 + 1) / 8)
    assert result.same == pytest.approx(((1 + 1 / 3) / 2, (6 / 8 + 4 / 8) / 2))
    assert result.different == (0, 0) and result.num_pairs == (2, 4)
    # of the 3 ways to pair four prompts one is the true one
    assert result.p_value == pytest.approx((1 / 3, 1 / 3), abs=0.15)
    first = np.array([[True, False]] * 4)
    only_first = metrics.address_overlap(facts_record(), ["a", "a", "b", "b"], where=first, num_resamplings=9)
    np.testing.assert_allclose(only_first.jaccard[2, 3], 1)
    assert only_first.num_tokens == 4


def test_planted_overlap_is_found_and_its_absence_is_not() -> None:
    rng = np.random.default_rng(1)
    facts = [f"fact {n % 8}" for n in range(24)]
    own = rng.integers(256, size=(8, 4))
    reads = rng.integers(256, size=(24, 3, 2, 4))
    weights = rng.dirichlet(np.ones(4), size=(24, 3, 2))
    planted = reads.copy()
    planted[:, 2, 0] = own[np.arange(24) % 8]
    found = metrics.address_overlap(record(planted, weights, (16, 16)), facts, num_resamplings=199)
    assert max(found.p_value) == pytest.approx(1 / 200)
    assert found.same[0] > found.different[0] + 0.05
    p_values = [
        metrics.address_overlap(
            record(rng.integers(256, size=reads.shape), weights, (16, 16)),
            facts,
            num_resamplings=39,
            seed=seed,
        ).p_value[0]
        for seed in range(100)
    ]
    assert (
        np.mean(np.array(p_values) <= 0.05) <= 0.12
    )  # 5% expected; more than 12 of 100 has a chance of 0.2%


def test_overlap_needs_something_to_compare() -> None:
    with pytest.raises(ValueError, match="3 facts for 4 prompts"):
        metrics.address_overlap(facts_record(), ["a", "b", "c"])
    for facts in (["a"] * 4, list("abcd")):
        with pytest.raises(ValueError, match="about the same fact and about different ones"):
            metrics.address_overlap(facts_record(), facts)
    with pytest.raises(ValueError, match="prompt 2 has no token"):
        metrics.address_overlap(facts_record(), list("aabb"), where=np.eye(4, 2, dtype=bool))


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
