"""Records taken from a capture equal what the taps carried."""

import numpy as np
import pytest
import torch

from hydra_lab import metrics
from hydra_lab.capture import record
from hydra_lab.capture.in_memory import InMemoryCapture, capture_batch
from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM

LENGTH = np.array([29, 18, 5])


@pytest.fixture(scope="module")
def model() -> HydraForCausalLM:
    torch.manual_seed(0)
    return HydraForCausalLM(HydraConfig.from_preset("nano")).eval()


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(29) < torch.from_numpy(LENGTH)[:, None]
    ids = torch.randint(97, (3, 29), generator=torch.Generator().manual_seed(1))
    return ids * mask, mask.long()


@pytest.fixture(scope="module")
def capture(model: HydraForCausalLM, batch: tuple[torch.Tensor, torch.Tensor]) -> InMemoryCapture:
    return capture_batch(model, *batch, domains=("code", "prose", "prose"))


def test_records_hold_what_the_taps_carried(
    model: HydraForCausalLM, batch: tuple[torch.Tensor, torch.Tensor], capture: InMemoryCapture
) -> None:
    recording = record(model, *batch)
    routing = metrics.routing_record(capture)
    assert routing.layers == (0, 2) and routing.domains == ("code", "prose", "prose")
    np.testing.assert_array_equal(routing.length, LENGTH)
    for y, layer in enumerate(routing.layers):
        tap = recording[f"layers.{layer}.moe.routing"]
        for row, (length, chunks) in enumerate(zip(LENGTH, routing.chunks, strict=True)):
            np.testing.assert_array_equal(routing.experts[y, row, :chunks], tap.experts[row, :chunks])
            assert routing.weights is not None
            np.testing.assert_allclose(routing.weights[y, row, :length], tap.weights[row, :length], atol=1e-3)
    lookup = metrics.lookup_record(capture, 2)
    tap = recording["layers.2.memory.lookup"]
    np.testing.assert_array_equal(lookup.addresses[1, :18], tap.addresses[1, :18])
    np.testing.assert_allclose(lookup.gate[0], tap.gate[0, :, 0], atol=1e-3)
    np.testing.assert_array_equal(lookup.tokens[1, :18], batch[0][1, :18])
    workspace = metrics.workspace_record(capture, 3)
    read = recording["layers.3.workspace.read"]
    np.testing.assert_allclose(workspace.read_address[0], read.address[0], atol=1e-3)
    state = metrics.state_record(capture, 1)
    np.testing.assert_allclose(state.norms[0], recording["layers.1.ssm.state"].norms[0], rtol=1e-5)
    selection = metrics.selection_record(capture, 1)
    np.testing.assert_array_equal(selection.blocks[0], recording["layers.1.attention.selection"].blocks[0])
    assert (selection.window, selection.block_size, selection.tiled) == (8, 4, False)


def test_every_metric_runs_on_a_capture(capture: InMemoryCapture) -> None:
    routing = metrics.routing_record(capture)
    np.testing.assert_allclose(metrics.expert_load(routing).share.sum(axis=-1), 1)
    np.testing.assert_allclose(metrics.expert_by_domain(routing).share.sum(axis=-1), 1)
    np.testing.assert_allclose(metrics.expert_by_chunk(routing).share.sum(axis=-1), 1)
    np.testing.assert_allclose(metrics.expert_by_position(routing).weight.sum(axis=-1), 1, atol=1e-3)
    assert metrics.co_activation(routing).num_chunks == 4 + 3 + 1
    assert (metrics.switch_rate(routing).num_pairs == [3, 2]).all()
    lookup = metrics.lookup_record(capture, 2)
    assert metrics.memory_use(lookup).num_tokens == LENGTH.sum()
    assert np.isfinite(metrics.beta_by_domain(lookup).mean).all()
    assert metrics.memory_map(lookup).level.shape == (8, 8)
    workspace = metrics.workspace_record(capture, 1)
    np.testing.assert_allclose(metrics.slot_reads(workspace).read.sum(axis=-1), 1, atol=1e-3)
    assert metrics.slot_writes(workspace).num_chunks == 3 + 2
    state = metrics.state_record(capture, 0)
    assert np.isfinite(metrics.half_life(state).half_life).all()
    assert metrics.state_norms(state).mean.shape == (4, 4)
    selection = metrics.selection_use(metrics.selection_record(capture, 3))
    expected = metrics.num_candidates(np.arange(29), window=8, block_size=4)
    per_row = [np.minimum(2, expected[:length]).sum() / expected[:length].sum() for length in LENGTH[:1]]
    assert selection.selected_share.max() <= 1 and per_row[0] <= 1
    assert selection.num_queries == LENGTH.sum()


def test_some_samples_only(capture: InMemoryCapture) -> None:
    assert metrics.routing_record(capture, samples=slice(1, 3)).domains == ("prose", "prose")
    assert metrics.routing_record(capture, samples=[2], weights=False).length.tolist() == [5]
    assert metrics.lookup_record(capture, 2, samples=[0, 2]).domains == ("code", "prose")


def test_captured_path_use_knows_shares_but_no_cost(capture: InMemoryCapture) -> None:
    use = metrics.captured_path_use(capture)
    np.testing.assert_allclose(np.nansum(use.share, axis=1), 1, rtol=1e-4)
    assert use.is_idle("moe", 0)  # a new model's experts add nothing yet
    assert "not measured" in use.describe("ssm") and not use.is_idle("ssm")


def test_wrong_blocks_and_padding_are_named(
    model: HydraForCausalLM, batch: tuple[torch.Tensor, torch.Tensor], capture: InMemoryCapture
) -> None:
    with pytest.raises(ValueError, match="block 0 has no memory; blocks 2 have"):
        metrics.lookup_record(capture, 0)
    with pytest.raises(ValueError, match="pads on the left"):
        capture_batch(model, batch[0], batch[1].flip(1))
    with pytest.raises(ValueError, match="1 domains for 3 rows"):
        capture_batch(model, *batch, domains=["a"])
