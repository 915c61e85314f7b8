"""Calls of the state-space kernels in half precision at the sizes of the 1.6b preset.

That is 64 heads of 64 values, one group, state size 128.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hydra_lab.ops.ssd import kernels
from tests.kernels.compiling import forward_and_backward

HEADS, HEAD_DIM, STATE_DIM = 64, 64, 128


def scan(
    *,
    length: int = 256,
    heads: int = HEADS,
    groups: int = 1,
    head_dim: int = HEAD_DIM,
    state_dim: int = STATE_DIM,
    chunk_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    given_decay: bool = False,
    signals: bool = False,
    bare: bool = False,
) -> None:
    """`ssd`, forward and backward; `bare` is without skip weights and initial state."""

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Tensor
    ) -> tuple[Tensor | None, ...]:
        D, initial = (None, None) if bare else rest[:2]
        decay = rest[-1] if given_decay else None
        return kernels.ssd(x, dt, A, B, C, D, decay, initial, None, chunk_size, signals, signals)

    forward_and_backward(
        run,
        torch.empty(2, length, heads, head_dim, dtype=dtype),
        torch.empty(2, length, heads),
        torch.empty(heads),
        torch.empty(2, length, groups, state_dim, dtype=dtype),
        torch.empty(2, length, groups, state_dim, dtype=dtype),
        torch.empty(heads),
        torch.empty(2, heads, head_dim, state_dim),
        torch.empty(2, length, heads),
    )


CASES: dict[str, Callable[[], None]] = {
    "1.6b": lambda: scan(signals=True),
    "1.6b, given decay": lambda: scan(given_decay=True),
    "1.6b, chunks of 200": lambda: scan(chunk_size=200, length=400, signals=True),
    "no skip, no initial state": lambda: scan(bare=True),
    "state size 256, head size 128": lambda: scan(heads=16, head_dim=128, state_dim=256),
    "29m": lambda: scan(heads=10, state_dim=64),
    "odd sizes": lambda: scan(heads=15, groups=3, head_dim=40, state_dim=72),
    "float16": lambda: scan(dtype=torch.float16),
}

WGMMA = frozenset(
    {
        "tile_states_kernel",
        "scan_kernel",
        "grad_inputs_kernel",
        "grad_pairs_kernel",
        "grad_projections_kernel",
    }
)
