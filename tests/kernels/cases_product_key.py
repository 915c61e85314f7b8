"""What the product-key memory launches; sizes of the preset 1.6b unless said otherwise."""

from collections.abc import Callable
from functools import partial

import torch

from hydra_lab.ops.product_key.kernels import memory_read, product_key_topk
from tests.kernels.compiling import forward_and_backward


def _search(
    dtype: torch.dtype, *, n1: int = 344, n2: int = 344, heads: int = 8, half: int = 128, top_k: int = 32
) -> None:
    query = torch.randn(1, 40, heads, 2 * half).to(dtype)
    keys1, keys2 = (torch.randn(heads, n, half).to(dtype) for n in (n1, n2))
    forward_and_backward(partial(product_key_topk, top_k=top_k), query, keys1, keys2)


def _read(dtype: torch.dtype, *, size: int = 2048, heads: int = 8, top_k: int = 32) -> None:
    addresses = torch.randint(0, 1 << 10, (1, 40, heads, top_k))
    weights = torch.rand(addresses.shape)
    forward_and_backward(memory_read, addresses, weights, torch.randn(1 << 10, size).to(dtype))


CASES: dict[str, Callable[[], None]] = {
    "search": lambda: _search(torch.float32),  # the model searches in float32
    "search, bf16": lambda: _search(torch.bfloat16),
    "search, 2**22 keys": lambda: _search(torch.float32, n1=2048, n2=2048, top_k=64),
    "search, odd": lambda: _search(torch.float32, n1=10, n2=70, heads=3, half=5, top_k=1),
    "read": lambda: _read(torch.bfloat16),
    "read, fp32": lambda: _read(torch.float32),
    "read, odd": lambda: _read(torch.bfloat16, size=200, heads=3, top_k=5),
}

WGMMA: frozenset[str] = frozenset()
"""None: scores are taken in full float32, which tensor cores do not have, and reading is bound by memory."""
