"""The workspace read against one token after another."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.ops.workspace import workspace_read

TOLERANCE = 1e-5
"""float32 against the oracle in float64, relative to the largest value of the tensor compared."""
SLOTS, SIZE, CHUNK = 3, 4, 8


def problem(
    length: int, *, offset: list[int] | None = None, rows: int = 3
) -> tuple[list[Tensor], dict[str, Any]]:
    """(address, gate, slots) in float64, and the options."""
    generator = torch.Generator().manual_seed(length)
    num_chunks = -(-(length + max(offset or [0])) // CHUNK)
    shapes = [(rows, length, SLOTS), (rows, length, 1), (rows, num_chunks, SLOTS, SIZE)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tensors, {"chunk_size": CHUNK, "offset": None if offset is None else torch.tensor(offset)}


@pytest.mark.parametrize("offset", [None, [0, 3, 7]])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 65])
def test_fast_path_equals_the_reference(length: int, offset: list[int] | None) -> None:
    tensors, options = problem(length, offset=offset)
    results: list[list[Tensor]] = []
    runs: list[tuple[Any, torch.dtype]] = [("reference", torch.float64), ("torch", torch.float32)]
    for backend, dtype in runs:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        address, gate, slots = leaves
        read = workspace_read(address, gate, slots, **options, backend=backend)
        results.append([read.detach(), *torch.autograd.grad(read.double().sin().sum(), leaves)])
    for name, expected, actual in zip(["read", "address", "gate", "slots"], *results, strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


def test_the_reference_by_its_definition() -> None:
    (address, gate, slots), options = problem(19, offset=[2, 0, 5])
    read = workspace_read(address, gate, slots, **options, backend="reference")
    for b, t, v in torch.cartesian_prod(*[torch.arange(size) for size in read.shape]).tolist():
        chunk = (int(options["offset"][b]) + t) // CHUNK
        expected = gate[b, t, 0] * sum(address[b, t, s] * slots[b, chunk, s, v] for s in range(SLOTS))
        torch.testing.assert_close(read[b, t, v], expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_agree_with_finite_differences(backend: str) -> None:
    tensors, options = problem(9, offset=[2, 0], rows=2)
    options["backend"] = backend
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *inputs: workspace_read(*inputs, **options), leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_chunks_without_tokens_are_not_looked_at(backend: str) -> None:
    tensors, options = problem(16)
    options["backend"] = backend
    address, gate, slots = tensors
    more = torch.cat([slots, torch.full_like(slots, torch.nan)], dim=1)
    expected = workspace_read(address, gate, slots, **options)
    assert torch.equal(workspace_read(address, gate, more, **options), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address_BLS": torch.zeros(3, 9, 2)}, "address_BLS must have shape"),
        ({"gate_BL1": torch.zeros(3, 9)}, "gate_BL1 must have shape"),
        ({"gate_BL1": torch.zeros(3, 8, 1)}, "gate_BL1 must have shape"),
        ({"slots_BCSV": torch.zeros(3, 2, 3)}, "slots_BCSV must have shape"),
        ({"slots_BCSV": torch.zeros(3, 1, 3, 4)}, "holds 1 chunks of 8 tokens, too few for 9 tokens"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"offset": torch.zeros(2, dtype=torch.int64)}, "offset must have shape"),
        ({"backend": "fast"}, "backend must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    (address, gate, slots), options = problem(9)
    arguments: dict[str, Any] = {"address_BLS": address, "gate_BL1": gate, "slots_BCSV": slots}
    with pytest.raises(ValueError, match=message):
        workspace_read(**(arguments | options | change))
