"""Workspace, state-space, attention and path-use metrics on values known by hand."""

import dataclasses
import json

import numpy as np
import pytest

from hydra_lab import metrics


def test_slot_reads_are_means_over_the_tokens_that_exist() -> None:
    read = np.zeros((2, 4, 2))
    read[0] = [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    read[1] = [[0, 1], [0, 1], [7, 7], [7, 7]]  # two tokens only
    gate = np.array([[0.2, 0.4, 0.6, 0.8], [0.0, 0.2, 9, 9]])
    record = metrics.WorkspaceRecord(1, read, gate, np.full((2, 2, 2), 0.5), np.array([4, 2]), 2)
    result = metrics.slot_reads(record, num_bins=2)
    np.testing.assert_array_equal(result.edges, [0, 2, 4])
    np.testing.assert_allclose(result.read, [[1.5 / 4, 2.5 / 4], [0, 1]])
    np.testing.assert_allclose(result.gate, [0.2, 0.7])
    np.testing.assert_array_equal(result.num_tokens, [4, 2])


def test_slot_writes_count_whole_chunks_only() -> None:
    gate = np.array([[[0.5, 0.0, 1.0], [0.5, 0.0, 1.0]], [[0.5, 0.0, 1.0], [9.0, 9.0, 9.0]]])
    record = metrics.WorkspaceRecord(1, np.zeros((2, 8, 3)), np.zeros((2, 8)), gate, np.array([8, 7]), 4)
    result = metrics.slot_writes(record)
    np.testing.assert_allclose(result.strength, [0.5, 0.0, 1.0])
    np.testing.assert_allclose(result.retention, [0.5, 1.0, 0.0])
    np.testing.assert_allclose(result.half_life, [4.0, np.inf, 0.0])  # halved once per chunk of 4 tokens
    assert result.num_chunks == 3
    with pytest.raises(ValueError, match="no sample has a whole chunk"):
        metrics.slot_writes(
            metrics.WorkspaceRecord(1, np.zeros((1, 3, 3)), np.zeros((1, 3)), gate[:1], np.array([3]), 4)
        )


def test_half_life_in_tokens() -> None:
    decay = np.stack([np.full((1, 6), -np.log(2) / 10), np.zeros((1, 6))], axis=-1)
    decay[:, 5:] = -99.0  # past the end
    record = metrics.StateRecord(0, np.ones((1, 2, 2)), decay, np.array([5]), 4)
    result = metrics.half_life(record)
    np.testing.assert_allclose(result.half_life, [10.0, np.inf])
    np.testing.assert_allclose(result.quantiles[0], [10.0, 10.0])
    assert result.num_tokens == 5


def test_state_norms_are_means_over_the_samples_that_reach_the_chunk_end() -> None:
    norms = np.array([[[1.0], [2.0]], [[3.0], [50.0]]])
    record = metrics.StateRecord(0, norms, np.zeros((2, 8, 1)), np.array([8, 6]), 4)
    result = metrics.state_norms(record)
    np.testing.assert_array_equal(result.position, [4, 8])
    np.testing.assert_allclose(result.mean[:, 0], [2.0, 2.0])
    np.testing.assert_allclose(result.spread[0, 0], np.sqrt(2))
    assert np.isnan(result.spread[1, 0])
    np.testing.assert_array_equal(result.num_samples, [2, 1])


def test_state_norms_keep_a_common_partial_last_chunk() -> None:
    norms = np.array([[[1.0], [2.0]]])
    result = metrics.state_norms(metrics.StateRecord(0, norms, np.zeros((1, 6, 1)), np.array([6]), 4))
    np.testing.assert_array_equal(result.position, [4, 6])
    np.testing.assert_allclose(result.mean[:, 0], [1.0, 2.0])


def test_candidates_of_a_query() -> None:
    # window 4, blocks of 2: at t = 9, blocks 0..3 are complete; block j >= 1 must start at or before 5:
    # blocks 1, 2
    found = metrics.num_candidates(np.array([0, 5, 6, 7, 8, 9]), window=4, block_size=2)
    np.testing.assert_array_equal(found, [0, 0, 1, 1, 2, 2])
    brute = [[j for j in range(1, 100) if j < t // 3 and j * 3 <= t - 7] for t in range(60)]
    np.testing.assert_array_equal(
        metrics.num_candidates(np.arange(60), window=7, block_size=3), [len(each) for each in brute]
    )
    tiled = [
        [j for j in range(1, 100) if j < t // 3 and j * 3 <= (t // 3 * 3) + 3 - 1 - 7] for t in range(60)
    ]
    np.testing.assert_array_equal(
        metrics.num_candidates(np.arange(60), window=7, block_size=3, tiled=True),
        [len(each) for each in tiled],
    )


def test_selection_distance_and_share() -> None:
    # one sample of 10 tokens, one head, one place; window 4, blocks of 2
    blocks = np.full((1, 12, 1, 1), -1)
    blocks[0, 6:10, 0, 0] = [1, 1, 2, 1]
    blocks[0, 10:] = 4  # past the end
    result = metrics.selection_use(metrics.SelectionRecord(2, blocks, np.array([10]), 4, 2))
    np.testing.assert_allclose(result.mean_distance, [(4 + 5 + 4 + 7) / 4])
    np.testing.assert_array_equal(result.edges[:4], [0, 2, 4, 8])
    np.testing.assert_allclose(result.share[0, 2], 1.0)
    np.testing.assert_allclose(result.selected_share, [4 / 6])
    np.testing.assert_allclose(result.filled, [4 / 10])
    assert (result.num_queries, result.num_with_candidates) == (10, 4)
    np.testing.assert_allclose(result.share_if_uniform.sum(), 1)


def test_uniform_selection_meets_its_own_baseline() -> None:
    rng = np.random.default_rng(0)
    candidates = metrics.num_candidates(np.arange(64), window=8, block_size=4)
    blocks = np.full((400, 64, 1, 1), -1)
    for t, count in enumerate(candidates):
        if count:
            blocks[:, t, 0, 0] = rng.integers(1, count + 1, size=400)
    result = metrics.selection_use(metrics.SelectionRecord(0, blocks, np.full(400, 64), 8, 4))
    np.testing.assert_allclose(result.share[0], result.share_if_uniform, atol=0.01)  # 20,000 draws


def path_use(**changes: object) -> metrics.PathUse:
    fields: dict = {
        "layers": (0, 1),
        "paths": ("ssm", "moe", "memory"),
        "share": np.array([[0.6, 0.4, np.nan], [0.9, 0.02, 0.08]]),
        "cosine": np.array([[0.9, 0.5, np.nan], [1.0, 0.1, 0.2]]),
        "domains": ("code", "prose"),
        "loss": np.array([2.0, 3.0]),
        "loss_increase": np.array([[5.0, 4.0], [0.1, 0.3], [0.001, 0.019]]),
        "loss_increase_error": np.zeros((3, 2)),
        "num_samples": np.array([4, 4]),
        "num_tokens": np.array([400, 400]),
    }
    return metrics.PathUse(**{**fields, **changes})


def test_path_use_says_where_a_path_is_idle() -> None:
    use = path_use()
    assert not use.is_idle("moe") and not use.is_idle("moe", 0)
    assert use.is_idle("moe", 1)  # 2% of the update
    assert use.is_idle("memory")  # 8% of the update, but cutting it costs 0.019
    assert use.layers_with("memory") == (1,)
    assert use.cost_of("moe") == (0.3, "prose")
    assert "2 to 40%" in use.describe("moe") and "0.30 nats/token (prose)" in use.describe("moe")
    assert use.describe("moe", 1).startswith("IDLE PATH")
    with pytest.raises(ValueError, match="unknown path 'x'"):
        use.share_of("x", 0)
    with pytest.raises(ValueError, match="unknown block 7"):
        use.share_of("ssm", 7)
    with pytest.raises(ValueError, match="loss_increase has shape"):
        path_use(loss_increase=np.zeros((2, 2)))


def test_path_use_goes_through_json() -> None:
    use = path_use()
    again = metrics.PathUse.from_dict(json.loads(json.dumps(use.to_dict())))
    for field in dataclasses.fields(use):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(use, field.name))
    with pytest.raises(ValueError, match="path use lacks loss"):
        metrics.PathUse.from_dict({key: value for key, value in use.to_dict().items() if key != "loss"})
