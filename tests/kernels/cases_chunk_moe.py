"""Calls whose kernels are compiled for an H100: `chunk_moe` at the sizes of the 1.6b preset, and at others."""

from collections.abc import Callable
from functools import partial

import torch

from hydra_lab.ops.chunk_moe.kernels import chunk_moe
from tests.kernels.compiling import forward_and_backward


def run(
    dtype: torch.dtype,
    *,
    rows: int = 2,
    length: int = 512,
    chunk_size: int = 64,
    num_experts: int = 8,
    top_k: int = 2,
    hidden: int = 2048,
    expert: int = 1024,
    trains: bool = True,
) -> None:
    """One forward and backward pass, or the forward pass alone."""
    num_chunks = -(-length // chunk_size)
    experts = torch.zeros(rows, num_chunks, top_k, dtype=torch.int64)
    offset, lengths = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), length)

    def call(x: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        return chunk_moe(x, experts, weights, *matrices, chunk_size=chunk_size, offset=offset, length=lengths)

    floats = [
        torch.zeros(shape, dtype=dtype)
        for shape in (
            (rows, length, hidden),
            (rows, length, top_k),
            (num_experts, 2 * expert, hidden),
            (num_experts, hidden, expert),
        )
    ]
    if trains:
        forward_and_backward(call, *floats)
    else:
        call(*floats)


CASES: dict[str, Callable[[], None]] = {
    "1.6b, bf16": partial(run, torch.bfloat16),
    "29m, bf16": partial(run, torch.bfloat16, hidden=320, expert=640),
    "chunks of 128, bf16": partial(run, torch.bfloat16, chunk_size=128),
    "odd sizes, bf16": partial(run, torch.bfloat16, chunk_size=100, hidden=200, expert=200, top_k=3),
    "forward only, bf16": partial(run, torch.bfloat16, trains=False),
    "few tokens, bf16": partial(run, torch.bfloat16, length=128),
}

WGMMA = frozenset({"gate_up", "down", "activation_gradient", "input_gradient", "weight_gradient"})
