"""What the kernels of `causal_conv` are compiled for; they have no matrix products."""

from collections.abc import Callable
from functools import partial

import torch

from hydra_lab.ops.causal_conv.kernels import causal_conv
from tests.kernels.compiling import forward_and_backward

CHANNELS = 2 * 2048 + 2 * 128
"""Of the 1.6b preset."""


def conv(
    dtype: torch.dtype,
    length: int,
    *,
    channels: int = CHANNELS,
    width: int = 4,
    state: bool = True,
    bias: bool = True,
    activation: str | None = "silu",
) -> None:
    """A forward and a backward pass."""
    x, weight = torch.empty(2, length, channels, dtype=dtype), torch.empty(channels, width)
    initial = torch.empty(2, channels, width - 1, dtype=dtype) if state else None
    leaves = [x, weight, *([initial] if initial is not None else [])]

    def run(
        x: torch.Tensor, weight: torch.Tensor, *initial: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.full((2,), length) if state else None
        filters = torch.empty(channels) if bias else None
        return causal_conv(x, weight, filters, initial[0] if initial else None, lengths, activation)

    forward_and_backward(run, *leaves)


CASES: dict[str, Callable[[], None]] = {
    "1.6b": partial(conv, torch.bfloat16, 200, state=False),
    "1.6b, continued": partial(conv, torch.bfloat16, 200),
    "1.6b, float32": partial(conv, torch.float32, 200),
    "1.6b, a step": partial(conv, torch.bfloat16, 1),
    "no bias, no activation, width 2": partial(
        conv, torch.bfloat16, 200, width=2, bias=False, activation=None
    ),
    "odd channels": partial(conv, torch.bfloat16, 33, channels=5),
}

WGMMA: frozenset[str] = frozenset()
