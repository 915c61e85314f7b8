"""What the kernels of `sparse_attention` are compiled for: the sizes of the 1.6b preset, and others."""

from collections.abc import Callable

import torch
from torch import Tensor

from hydra_lab.ops.sparse_attention.kernels import sparse_attention
from tests.kernels.compiling import forward_and_backward

WGMMA = frozenset({"forward_kernel", "query_kernel", "block_kernel", "key_kernel"})


def attention(
    length: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (8, 2),
    head_size: int = 64,
    window: int = 1024,
    block_size: int = 64,
    num_selected: int = 16,
    cached: int = 0,
    mass: bool = False,
    backward: bool = True,
) -> Callable[[], None]:
    """A call at the given sizes; with `cached` keys before the queries, which then have a `start`."""

    def call() -> None:
        q = torch.randn(2, length, heads[0], head_size, dtype=dtype)
        k = torch.randn(2, cached + length, heads[1], head_size, dtype=dtype)
        blocks = torch.zeros(2, length, heads[1], num_selected, dtype=torch.int64)
        start = torch.full((2,), cached) if cached else None

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            options = {"start": start, "window": window, "block_size": block_size, "scale": head_size**-0.5}
            return sparse_attention(q, k, v, blocks, mass=mass, **options).y

        if backward:
            forward_and_backward(run, q, k, k)
        else:
            run(q, k, k)

    return call


CASES: dict[str, Callable[[], None]] = {
    "1.6b": attention(1100),
    "1.6b, with mass": attention(1100, mass=True),
    "1.6b, continued": attention(80, cached=2000, mass=True),
    "1.6b, decoding": attention(1, cached=2000, mass=True, backward=False),
    "29m": attention(300, heads=(5, 5), window=256, num_selected=4),
    "heads of 128 channels, blocks of 128 keys": attention(1100, head_size=128, block_size=128),
    "no block outside the window": attention(80),
    "nothing selected": attention(1100, num_selected=0),
}
