"""Calls of the sparse attention kernels that use no tensor cores: float32, and single queries."""

from collections.abc import Callable

import torch

from tests.kernels.cases_sparse_attention import attention

CASES: dict[str, Callable[[], None]] = {
    "1.6b": attention(1100, dtype=torch.float32),
    "decoding": attention(1, cached=2000, dtype=torch.float32, mass=True, backward=False),
    "decoding in a window of 65,536 keys": attention(
        1, cached=65536, window=65536, mass=True, backward=False
    ),
    "the same, heads of 128 channels": attention(
        1, cached=65536, window=65536, head_size=128, heads=(1, 1), backward=False
    ),
}

WGMMA: frozenset[str] = frozenset()
