"""The workspace path against its recurrence, written out one chunk and one token at a time."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.nn.workspace import LONGEST_MEMORY, WorkspacePath
from hydra_lab.taps import WorkspaceRead, WorkspaceWrite
from tests.helpers import listen

SLOTS, KEY, VALUE, SIZE = 5, 8, 16, 32


def path(chunk_size: int = 8) -> WorkspacePath:
    torch.manual_seed(0)
    ours = WorkspacePath(HydraConfig.from_preset("nano", workspace_chunk_size=chunk_size)).eval()
    ours.reset_parameters()
    with torch.no_grad():
        for name in (
            "write_key",
            "write_value",
            "forget_gate",
            "read_query",
            "slot_key",
            "read_gate",
            "out_proj",
        ):
            ours.get_submodule(name).get_parameter("weight").normal_(std=0.4)
        ours.slot_norm.weight.uniform_(0.5, 1.5)
    return ours


class ByHand(NamedTuple):
    """Outputs [L, D], slots after the last complete chunk [S, V], and the decisions on the way."""

    outputs: Tensor
    slots: Tensor
    read_address: Tensor
    read_gate: Tensor
    write_address: Tensor
    write_gate: Tensor


def run_by_hand(ours: WorkspacePath, hidden: Tensor) -> ByHand:
    """One row; every slot, token and chunk on its own."""
    chunk_size, length = ours.chunk_size, len(hidden)
    slots = ours.initial_slots.clone()
    outputs, addresses, gates = [], [], []
    num_chunks = -(-length // chunk_size)
    write_address, write_gate = torch.zeros(num_chunks, SLOTS, chunk_size), torch.zeros(num_chunks, SLOTS)
    for chunk in range(num_chunks):
        tokens = hidden[chunk * chunk_size : (chunk + 1) * chunk_size]
        normed = [slot / (slot.square().mean() + 1e-5).sqrt() * ours.slot_norm.weight for slot in slots]
        for token in tokens:  # reads see the slots before this chunk's write
            query = ours.read_query.weight @ token
            scores = [
                query @ (ours.slot_key.weight @ slot + name) / KEY**0.5
                for slot, name in zip(normed, ours.slot_name, strict=True)
            ]
            address = torch.stack(scores).softmax(0)
            gate = torch.sigmoid(ours.read_gate.weight[0] @ token + ours.read_gate.bias)
            value = sum(share * slot for share, slot in zip(address, normed, strict=True))
            outputs.append(ours.out_proj.weight @ (gate * value))
            addresses.append(address)
            gates.append(gate)
        keep = torch.sigmoid(ours.forget_gate.weight @ tokens.mean(0) + ours.forget_gate.bias)
        new_slots = []
        for s in range(SLOTS):
            scores = torch.stack([ours.write_query[s] @ (ours.write_key.weight @ token) for token in tokens])
            share = (scores / KEY**0.5).softmax(0)
            write_address[chunk, s, : len(tokens)] = share
            candidate = sum(
                each * (ours.write_value.weight @ token) for each, token in zip(share, tokens, strict=True)
            )
            new_slots.append(keep[s] * slots[s] + (1 - keep[s]) * candidate)
        write_gate[chunk] = 1 - keep
        if len(tokens) == chunk_size:
            slots = torch.stack(new_slots)
    return ByHand(
        torch.stack(outputs), slots, torch.stack(addresses), torch.stack(gates), write_address, write_gate
    )


@pytest.mark.parametrize(("chunk_size", "length"), [(8, 29), (8, 32), (1, 9), (5, 3), (64, 70)])
@torch.no_grad()
def test_outputs_slots_and_decisions_by_hand(chunk_size: int, length: int) -> None:
    ours = path(chunk_size)
    hidden = torch.randn(1, length, SIZE)
    written: list[WorkspaceWrite] = listen(ours.write)
    read: list[WorkspaceRead] = listen(ours.read)
    found, state = ours(hidden, Span(length), None)
    expected = run_by_hand(ours, hidden[0])
    print(f"chunk {chunk_size}, length {length}: {(found[0] - expected.outputs).abs().max():.1e}")
    torch.testing.assert_close(found[0], expected.outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.slots[0], expected.slots, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read[0].address[0], expected.read_address, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read[0].gate[0], expected.read_gate, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(written[0].address[0], expected.write_address, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(written[0].gate[0], expected.write_gate, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_at_different_positions_continue_from_their_states() -> None:
    ours = path()
    hidden = torch.randn(2, 29, SIZE)
    _, state = ours(hidden[:, :11], Span(11, None, torch.tensor([11, 6])), None)
    second = torch.stack([hidden[0, 11:27], hidden[1, 6:22]])
    found, state = ours(second, Span(16, torch.tensor([11, 6])), state)
    for row, first in enumerate((11, 6)):
        expected = run_by_hand(ours, hidden[row, : first + 16])
        torch.testing.assert_close(found[row], expected.outputs[first:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.slots[row], expected.slots, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_slots_never_decide_what_is_written() -> None:
    ours = path()
    hidden = torch.randn(1, 24, SIZE)
    written: list[WorkspaceWrite] = listen(ours.write)
    ours(hidden, Span(24), None)
    ours.initial_slots.mul_(-3.0)
    ours(hidden, Span(24), None)
    assert torch.equal(written[0].address, written[1].address)
    assert torch.equal(written[0].gate, written[1].gate)


def test_half_lives_start_spread_from_one_chunk_to_the_longest() -> None:
    ours = WorkspacePath(HydraConfig.from_preset("nano"))
    ours.reset_parameters()
    half_lives = torch.log(torch.tensor(0.5)) / torch.log(torch.sigmoid(ours.forget_gate.bias.detach()))
    torch.testing.assert_close(half_lives[[0, -1]], torch.tensor([1.0, LONGEST_MEMORY]), rtol=1e-3, atol=0)
    assert (half_lives.diff() > 0).all()


def test_every_parameter_gets_a_gradient() -> None:
    ours = path()
    output, _ = ours(torch.randn(1, 29, SIZE), Span(29), None)
    output.square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
