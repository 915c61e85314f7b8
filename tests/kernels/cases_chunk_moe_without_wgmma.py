"""Calls of the expert kernels that use no warpgroup instructions: float32, and fewer than 64 rows at a time."""

from collections.abc import Callable
from functools import partial

import torch

from tests.kernels.cases_chunk_moe import run

CASES: dict[str, Callable[[], None]] = {
    "29m, fp32": partial(run, torch.float32, hidden=320, expert=640),
    "few tokens of short chunks, bf16": partial(run, torch.bfloat16, length=64, chunk_size=16),
    "one token of 4 rows, bf16": partial(run, torch.bfloat16, rows=4, length=1, trains=False),
}

WGMMA: frozenset[str] = frozenset()
