"""What the kernel tests share: where they run, in which precisions, and how near the oracle they must come."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
"""The interpreter's bf16 arithmetic is silently wrong, so half precision is tested on a GPU only."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error over the largest value of the tensor compared: the same maths in fp32; in bf16, products of values with
8 bits, rounded again between two matrix products."""

LENGTHS = (1, 63, 64, 65, 500)

Results = dict[str, Tensor]
Run = Callable[[Mapping[str, Tensor]], Results]


def outputs_and_gradients(run: Run, inputs: Mapping[str, Tensor]) -> Results:
    """What `run` returns for `inputs`, and the gradient of a fixed random combination of it towards each float input.

    Args:
        run: from inputs by name to outputs by name; integer outputs take no part in the gradient.
        inputs: tensors; those of a float dtype become leaves.
    """
    leaves = {
        name: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    outputs = run(leaves)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs.values():
        if output.requires_grad:
            factor = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            loss = loss + (output.cpu().double() * factor).sum()
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted], allow_unused=True)
    results = {name: output.detach() for name, output in outputs.items()}
    for name, gradient in zip(wanted, gradients, strict=True):
        results[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return results


def placed(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`inputs` on the device of the tests, floats in `dtype`."""
    return {
        name: tensor.to(DEVICE, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


def assert_agree(actual: Results, expected: Results, dtype: torch.dtype) -> None:
    """Every result has the shape of the oracle's and lies within the tolerance of `dtype`; integers are equal.

    A gradient that is exactly zero, as a query's is that sees one key, is a sum of terms that cancel: their rounding is
    measured by the size of the other gradients.
    """
    assert actual.keys() == expected.keys()
    gradients = [want for name, want in expected.items() if name.startswith("gradient of") and want.numel()]
    largest = max((want.abs().max().item() for want in gradients), default=1.0)
    for name, want in expected.items():
        got = actual[name].cpu()
        assert got.shape == want.shape, f"{name}: {list(got.shape)} instead of {list(want.shape)}"
        if not want.is_floating_point():
            assert torch.equal(got, want), f"{name} differs"
            continue
        scale = want.abs().max().clamp(min=1e-3).item() if want.numel() else 1.0
        if name.startswith("gradient of") and not want.any():
            scale = max(scale, largest)
        error = (got.double() - want.double()).abs().max().item() / scale if want.numel() else 0.0
        assert error <= TOLERANCES[dtype], f"{name}: relative error {error:.2e}"


def assert_same_bits(run: Run, inputs: Mapping[str, Tensor]) -> None:
    """Two runs give equal outputs and gradients, to the last bit."""
    first, second = (outputs_and_gradients(run, inputs) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} is not the same twice"


def strided(tensor: Tensor) -> Tensor:
    """The same values at other strides: every other entry of a larger tensor, its last two axes exchanged."""
    if tensor.ndim < 2:
        return torch.stack([tensor, torch.full_like(tensor, 3)], dim=-1).flatten()[::2]
    wide = torch.stack([tensor, torch.full_like(tensor, 3)], dim=-1).flatten(-2)[..., ::2]
    return wide.transpose(-1, -2).contiguous().transpose(-1, -2)
