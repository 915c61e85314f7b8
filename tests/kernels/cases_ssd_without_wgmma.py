"""Calls of the state-space kernels that use no tensor cores: float32, single steps, and states alone."""

from collections.abc import Callable

import torch

from hydra_lab.ops.ssd import kernels
from tests.kernels.cases_ssd import HEAD_DIM, HEADS, STATE_DIM, scan
from tests.kernels.compiling import forward_and_backward


def _step(dtype: torch.dtype) -> None:
    kernels.ssd_step(
        torch.empty(2, HEADS, HEAD_DIM, dtype=dtype),
        torch.empty(2, HEADS),
        torch.empty(HEADS),
        torch.empty(2, 1, STATE_DIM, dtype=dtype),
        torch.empty(2, 1, STATE_DIM, dtype=dtype),
        torch.empty(2, HEADS, HEAD_DIM, STATE_DIM),
        torch.empty(HEADS),
    )


def _state_passing(chunks: int, heads: int, values: int) -> None:
    leaves = (
        torch.empty(2, chunks, heads, values),
        torch.empty(2, chunks, heads),
        torch.empty(2, heads, values),
    )
    forward_and_backward(kernels.state_passing, *leaves)


CASES: dict[str, Callable[[], None]] = {
    "1.6b": lambda: scan(dtype=torch.float32, signals=True),
    "state size 256, head size 128": lambda: scan(dtype=torch.float32, heads=16, head_dim=128, state_dim=256),
    "odd sizes": lambda: scan(dtype=torch.float32, heads=15, groups=3, head_dim=40, state_dim=72),
    "nano": lambda: scan(
        dtype=torch.float32, length=20, heads=4, head_dim=16, state_dim=16, chunk_size=8, given_decay=True
    ),
    "nano, half precision": lambda: scan(length=20, heads=4, head_dim=16, state_dim=16, chunk_size=8),
    "step": lambda: _step(torch.bfloat16),
    "step, float32": lambda: _step(torch.float32),
    "one position": lambda: scan(length=1, given_decay=True, signals=True),
    "state_passing of the workspace": lambda: _state_passing(4, 64, 1024),
    "state_passing of the router": lambda: _state_passing(4, 1, 2048),
}

WGMMA: frozenset[str] = frozenset()
