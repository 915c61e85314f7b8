"""Entropy of reads and writes, and the age of what is read: on values known by hand, against the recurrence itself, and
on a model whose writes are planted."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from hydra_lab import metrics
from hydra_lab.capture.in_memory import capture_batch
from tests.helpers import lively_model, random_ids


def workspace(**changes: Any) -> metrics.WorkspaceRecord:
    """One sample of eight tokens in chunks of four, two slots."""
    fields: dict[str, Any] = {
        "layer": 1,
        "read_address": np.full((1, 8, 2), 0.5),
        "read_gate": np.ones((1, 8)),
        "write_gate": np.full((1, 2, 2), 0.5),
        "length": np.array([8]),
        "chunk_size": 4,
    }
    return metrics.WorkspaceRecord(**{**fields, **changes})


def test_write_entropy_of_one_token_two_tokens_and_all() -> None:
    address = np.zeros((1, 10, 2))
    address[0, :8, 0] = 0.25  # both chunks: the mean of four tokens
    address[0, 2, 1] = 1.0  # the first chunk: one token
    address[0, 5:7, 1] = 0.5  # the second: two of four tokens, half of ln 4
    address[0, 8:] = 0.5  # a chunk that is never written
    record = workspace(
        read_address=np.zeros((1, 10, 2)),
        read_gate=np.zeros((1, 10)),
        write_gate=np.zeros((1, 3, 2)),
        write_address=address,
        length=np.array([10]),
    )
    result = metrics.write_entropy(record)
    np.testing.assert_allclose(result.entropy, [1.0, 0.25])
    np.testing.assert_allclose(result.quantiles, [[1.0, 1.0], [0.025, 0.475]])
    assert (result.num_chunks, result.chunk_size, result.num_samples) == (2, 4, 1)


def test_write_entropy_needs_addresses_and_whole_chunks() -> None:
    with pytest.raises(ValueError, match="holds no write addresses"):
        metrics.write_entropy(workspace())
    with pytest.raises(ValueError, match="no sample has a whole chunk of 4 tokens"):
        metrics.write_entropy(workspace(write_address=np.ones((1, 8, 2)), length=np.array([3])))
    with pytest.raises(ValueError, match="a choice of one"):
        each = np.full((1, 8, 2), 0.5)
        metrics.write_entropy(workspace(write_address=np.ones((1, 8, 2)), write_gate=each, chunk_size=1))
    with pytest.raises(ValueError, match="write_gate has 2 chunks of 1 tokens, read_address 8 positions"):
        workspace(chunk_size=1)
    with pytest.raises(ValueError, match="write_address has shape"):
        workspace(write_address=np.ones((1, 8, 3)))


def test_read_entropy_of_one_slot_and_of_all() -> None:
    address = np.zeros((2, 4, 4))
    address[0] = np.eye(4)  # four tokens, each reads one slot, and none the same
    address[1, :2] = 0.25  # two tokens that read all slots
    address[1, 2:] = np.nan
    gate = np.array([[1.0, 1.0, 1.0, 1.0], [0.25, 0.75, np.nan, np.nan]])
    record = workspace(
        read_address=address, read_gate=gate, write_gate=np.zeros((2, 1, 4)), length=np.array([4, 2])
    )
    result = metrics.read_entropy(record, num_bins=2)
    np.testing.assert_allclose(result.by_position, [0.5, 0.0], atol=1e-12)
    assert result.mean == pytest.approx(2 / 6)
    assert result.mean_gated == pytest.approx(1 / 5)
    assert result.of_mean == pytest.approx(1.0)
    assert result.num_slots == 4 and result.num_tokens.tolist() == [4, 2]


def test_half_of_a_slot_is_overwritten_at_every_chunk() -> None:
    address = np.zeros((1, 8, 2))
    address[0, 6, 0] = 1.0  # one token, in the fourth chunk, reads slot 0 ...
    address[0, 7, 1] = 0.5  # ... and one reads slot 1, half as much
    gate = np.full((1, 4, 2), 0.5)
    gate[0, :, 1] = [
        1.0,
        0.0,
        0.0,
        1.0,
    ]  # slot 1 is written once, by the first chunk, and (too late) by the last
    record = workspace(read_address=address, write_gate=gate, chunk_size=2)
    result = metrics.read_lag(record)
    assert result.edges.tolist() == [1, 2, 4]  # lags 1 and 2 to 3; then what the slots started with
    np.testing.assert_allclose(result.share, [[1 / 2, 1 / 4 + 1 / 8, 1 / 8], [0, 1, 0]])
    np.testing.assert_allclose(result.mean_lag, [(1 / 2 + 2 / 4 + 3 / 8) / (7 / 8), 3.0])
    np.testing.assert_allclose(result.slot_share, [2 / 3, 1 / 3])
    np.testing.assert_allclose(result.share_if_even, [1 / 4, 2 / 4, 1 / 4])


def test_read_lag_is_what_the_recurrence_makes_of_unit_candidates() -> None:
    rng = np.random.default_rng(0)
    num_samples, num_chunks, size, num_slots = 3, 7, 5, 4
    length = np.array([35, 23, 9])
    address = rng.dirichlet(np.ones(num_slots), size=(num_samples, num_chunks * size))
    read_gate = rng.random((num_samples, num_chunks * size))
    write_gate = rng.random((num_samples, num_chunks, num_slots))
    expected = np.zeros((num_slots, num_chunks))  # by lag; lag 0 stands for the start
    for n in range(num_samples):
        slots = np.zeros((num_slots, num_chunks + 1))  # how much of each chunk's candidate is in the slot
        slots[:, num_chunks] = 1.0
        for t in range(length[n]):
            c = t // size
            if t % size == 0 and c > 0:
                gate = write_gate[n, c - 1, :, None]
                slots = (1 - gate) * slots + gate * np.eye(num_chunks + 1)[c - 1]
            weight = address[n, t] * read_gate[n, t]
            for lag in range(1, c + 1):
                expected[:, lag] += weight * slots[:, c - lag]
            expected[:, 0] += weight * slots[:, num_chunks]
        address[n, length[n] :] = read_gate[n, length[n] :] = np.nan
        write_gate[n, -(-length[n] // size) :] = np.nan
    record = metrics.WorkspaceRecord(1, address, read_gate, write_gate, length, size)
    result = metrics.read_lag(record)
    total = expected.sum(axis=1, keepdims=True)
    binned = [expected[:, 1], expected[:, 2:4].sum(axis=1), expected[:, 4:].sum(axis=1), expected[:, 0]]
    np.testing.assert_allclose(result.share, np.stack(binned, axis=1) / total)
    lag = (expected @ np.arange(num_chunks)) / expected[:, 1:].sum(axis=1)
    np.testing.assert_allclose(result.mean_lag, lag)
    np.testing.assert_allclose(result.share.sum(axis=1), 1)
    np.testing.assert_allclose(result.share_if_even.sum(), 1)


def test_what_is_never_read_has_no_age() -> None:
    address = np.zeros((1, 8, 2))
    address[..., 0] = 1.0
    result = metrics.read_lag(workspace(read_address=address, write_gate=np.zeros((1, 2, 2))))
    np.testing.assert_allclose(result.share[0], [0, 1])  # nothing was ever written: all is from the start
    assert np.isnan(result.share[1]).all() and np.isnan(result.mean_lag).all()
    with pytest.raises(ValueError, match="no sample has a token after its first chunk of 4"):
        metrics.read_lag(workspace(length=np.array([4])))


def test_a_write_planted_in_a_model_is_found_at_its_lag() -> None:
    model = lively_model()
    size = model.config.workspace_chunk_size
    ids = random_ids(model.config, 2, 5 * size)

    def write_once(_module: Any, _args: Any, decision: Any) -> Any:
        gate = decision.gate * 0
        gate[:, 1] = 1.0  # the second chunk overwrites every slot, and nothing else is ever written
        return decision._replace(gate=gate)

    handle = model.get_submodule("model.layers.1.workspace.write").register_forward_hook(write_once)
    try:
        capture = capture_batch(model, ids, signals=["workspace"])
    finally:
        handle.remove()
    record = metrics.workspace_record(capture, 1)
    result = metrics.read_lag(record)
    weight = (record.read_address * record.read_gate[..., None]).astype(np.float64).sum(axis=0)
    by_chunk = weight.reshape(5, size, -1).sum(
        axis=1
    )  # chunks 0 and 1 read the start, chunks 2, 3, 4 lags 1, 2, 3
    expected = np.stack(
        [by_chunk[2], by_chunk[3] + by_chunk[4], 0 * by_chunk[0], by_chunk[0] + by_chunk[1]], 1
    )
    np.testing.assert_allclose(
        result.share, expected / by_chunk.sum(axis=0)[:, None], rtol=2e-3
    )  # 16-bit reads


def test_entropies_of_a_captured_model_are_those_of_its_taps() -> None:
    model = lively_model()
    size = model.config.workspace_chunk_size
    capture = capture_batch(model, random_ids(model.config, 2, 3 * size + 3), signals=["workspace"])
    written = capture["workspace"]["write_address"].isel(layer=0).to_numpy()
    record = dataclasses.replace(metrics.workspace_record(capture, 1), write_address=written)
    result = metrics.write_entropy(record)
    assert result.num_chunks == 6 and (0 < result.entropy).all() and (result.entropy < 1).all()
    cells = written[:, : 3 * size].astype(np.float64).reshape(2, 3, size, -1)
    expected = -(cells * np.log(cells)).sum(axis=2).mean(axis=(0, 1)) / np.log(size)
    np.testing.assert_allclose(result.entropy, expected, atol=2e-3)  # 16-bit weights do not sum to 1 exactly
    read = metrics.read_entropy(record)
    assert 0 < read.mean <= read.of_mean <= 1
