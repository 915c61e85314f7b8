"""What the selection of blocks launches; sizes of the preset 1.6b unless said otherwise."""

from collections.abc import Callable
from typing import Any

import torch

from hydra_lab.ops.sparse_attention.select_kernels import select_blocks


def _select(
    dtype: torch.dtype,
    *,
    heads: int = 32,
    key_heads: int = 8,
    head_size: int = 64,
    num_selected: int = 16,
    serves: int = 1,
    start: torch.Tensor | None = None,
) -> None:
    sizes: dict[str, Any] = {"window": 1024, "block_size": 64, "num_selected": num_selected, "serves": serves}
    q = torch.randn(1, 96, heads, head_size).to(dtype)
    means = torch.randn(1, 70, key_heads, head_size).to(dtype)
    select_blocks(q, means, start=start, **sizes)


CASES: dict[str, Callable[[], None]] = {
    "bf16, by tile": lambda: _select(torch.bfloat16, serves=64),
    "bf16, by token": lambda: _select(torch.bfloat16),
    "fp32": lambda: _select(torch.float32),
    "decoding": lambda: _select(torch.bfloat16, start=torch.tensor([4000])),
    "29m": lambda: _select(torch.bfloat16, heads=5, key_heads=5, num_selected=4),
    "odd": lambda: _select(torch.bfloat16, heads=3, key_heads=1, head_size=40, num_selected=1),
    "many": lambda: _select(torch.bfloat16, num_selected=64),
}

WGMMA: frozenset[str] = frozenset()
"""None: scores are taken in full float32, which tensor cores do not have."""
