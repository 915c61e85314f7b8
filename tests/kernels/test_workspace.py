"""The kernels of the workspace's read against the read of one token after another."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.ops.workspace import workspace_read
from tests.kernels.checking import (
    DEVICE,
    DTYPES,
    LENGTHS,
    Results,
    Run,
    assert_agree,
    assert_same_bits,
    outputs_and_gradients,
    placed,
    strided,
)


def problem(
    length: int, chunk_size: int, *, num_slots: int = 5, slot_size: int = 7, rows: int = 2, spare: int = 0
) -> Results:
    """`spare` chunks more than the tokens need, of slots that are NaN."""
    generator = torch.Generator().manual_seed(length)
    num_chunks = -(-length // chunk_size)
    shapes = {
        "address": (rows, length, num_slots),
        "gate": (rows, length, 1),
        "slots": (rows, num_chunks + spare, num_slots, slot_size),
    }
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    inputs["slots"][:, num_chunks:] = torch.nan
    return inputs


def read(backend: Any, chunk_size: int, offset: Tensor | None = None) -> Run:
    def run(inputs: Mapping[str, Tensor]) -> Results:
        address, gate, slots = (inputs[name] for name in ("address", "gate", "slots"))
        placed_offset = None if offset is None else offset.to(slots.device)
        return {
            "read": workspace_read(
                address, gate, slots, chunk_size=chunk_size, offset=placed_offset, backend=backend
            )
        }

    return run


def check(inputs: Results, dtype: torch.dtype, chunk_size: int, offset: Tensor | None = None) -> None:
    rounded = placed(inputs, dtype)
    exact = {name: x.cpu().double() for name, x in rounded.items()}
    actual = outputs_and_gradients(read("triton", chunk_size, offset), rounded)
    expected = outputs_and_gradients(read("reference", chunk_size, offset), exact)
    assert_agree(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_agrees_with_the_reference(length: int, dtype: torch.dtype) -> None:
    check(problem(length, 64), dtype, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "chunk_size", "num_slots", "slot_size"),
    [
        (65, 8, 16, 16),
        (63, 70, 5, 7),  # a chunk of two tiles
        (150, 150, 70, 20),  # slots of two tiles
        (40, 32, 64, 96),  # channels of two tiles
        (20, 16, 3, 33),
        (9, 1, 4, 5),
        (1, 64, 1, 1),
    ],
)
def test_agrees_with_the_reference_at_other_sizes(
    length: int, chunk_size: int, num_slots: int, slot_size: int, dtype: torch.dtype
) -> None:
    check(problem(length, chunk_size, num_slots=num_slots, slot_size=slot_size), dtype, chunk_size)


@pytest.mark.parametrize("length", [1, 7, 8, 65])
def test_rows_that_begin_inside_a_chunk(length: int) -> None:
    inputs = problem(length + 7, 8, rows=4)
    for name in ("address", "gate"):
        inputs[name] = inputs[name][:, :length]
    check(inputs, torch.float32, 8, torch.tensor([0, 3, 7, 1]))


def test_chunks_without_tokens_are_not_looked_at() -> None:
    """Their slots may be garbage; their gradient is zero."""
    inputs = placed(problem(16, 8, spare=2), torch.float32)
    found = outputs_and_gradients(read("triton", 8), inputs)
    assert not any(x.isnan().any() for x in found.values())
    assert (found["gradient of slots"][:, 2:] == 0).all() and found["gradient of slots"][:, :2].all()


def test_only_the_gradients_asked_for() -> None:
    inputs = placed(problem(16, 8), torch.float32)
    expected = outputs_and_gradients(read("triton", 8), inputs)
    for name in inputs:
        leaves = {other: x.detach().requires_grad_(other == name) for other, x in inputs.items()}
        out = read("triton", 8)(leaves)["read"]
        factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (out.cpu().double() * factor).sum().backward()
        for other, leaf in leaves.items():
            assert (leaf.grad is None) == (other != name)
        gradient = leaves[name].grad
        assert gradient is not None and torch.equal(gradient, expected[f"gradient of {name}"])


def test_other_strides_give_the_same_results() -> None:
    inputs = placed(problem(29, 8), torch.float32)
    expected = outputs_and_gradients(read("triton", 8), inputs)
    actual = outputs_and_gradients(read("triton", 8), {name: strided(x) for name, x in inputs.items()})
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


def test_same_bits_twice() -> None:
    assert_same_bits(read("triton", 8), placed(problem(29, 8), torch.float32))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's bf16 arithmetic is wrong")
def test_autocast_reads_in_half_precision() -> None:
    inputs = placed(problem(65, 64, num_slots=64, slot_size=64), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = outputs_and_gradients(read("triton", 64), inputs)
    assert actual["read"].dtype == torch.bfloat16
    for name in inputs:
        assert actual[f"gradient of {name}"].dtype == torch.float32
    exact = {name: x.cpu().double() for name, x in inputs.items()}
    assert_agree(actual, outputs_and_gradients(read("reference", 64), exact), torch.bfloat16)


def test_mixed_precision_reads_in_the_precision_of_the_slots() -> None:
    inputs = placed(problem(20, 8), torch.float32)
    inputs["slots"] = inputs["slots"].half()
    actual = outputs_and_gradients(read("triton", 8), inputs)
    dtypes = {name: x.dtype for name, x in actual.items()}
    assert dtypes == {
        "read": torch.float16,
        "gradient of address": torch.float32,
        "gradient of gate": torch.float32,
        "gradient of slots": torch.float16,
    }
    exact = {name: x.cpu().double() for name, x in inputs.items()}
    assert_agree(
        actual, outputs_and_gradients(read("reference", 8), exact), torch.bfloat16
    )  # float16 products


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 9 GiB of GPU memory")
def test_slots_beyond_32_bit_offsets() -> None:
    """The slots of the last chunk lie 2**32 elements behind those of the first."""
    chunks = 1 + (1 << 16)
    slots = torch.zeros(1, chunks, 64, 1024, dtype=torch.float16, device=DEVICE)
    slots[0, -1] = 2.0
    address = torch.full((1, chunks, 64), 1 / 64, dtype=torch.float16, device=DEVICE, requires_grad=True)
    gate = torch.ones(1, chunks, 1, dtype=torch.float16, device=DEVICE)
    out = workspace_read(address, gate, slots, chunk_size=1, backend="triton")
    assert (out[0, -1] == 2.0).all() and not out[0, :-1].any()
    out[0, -1].sum().backward()
    assert address.grad is not None and (address.grad[0, -1] == 2048.0).all()


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="no float64"):
        read("triton", 8)(problem(9, 8))
