"""Causal depthwise convolution: each channel of a position sees its own last W inputs.

Shape suffixes: B rows, L positions, D channels, W width of the filter.
"""

from typing import Literal

from torch import Tensor

from hydra_lab.ops.backend import Backend, implementation
from hydra_lab.ops.checks import check_shape

__all__ = ["causal_conv"]


def causal_conv(
    x_BLD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    *,
    initial_state: Tensor | None = None,
    length: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`y_t = activation(bias + sum over w of weight[w] x_{t - (W - 1) + w})`, per channel.

    Args:
        x_BLD: [B, L, D] inputs; a row's valid positions come first.
        weight_DW: [D, W] filters; the last tap is the current position.
        bias_D: [D], or None.
        initial_state: [B, D, W - 1] the inputs before the first position, oldest first, or None for zeros.
        length: [B] integers in 0..L, valid positions of each row, or None where all are valid.
        activation: "silu" or None.
        backend: see `hydra_lab.ops.backend`; None for what `use_backend` says, else the fastest measured one.

    Returns:
        (y [B, L, D] in the dtype of `x_BLD`, meaningless past a row's length;
        final_state [B, D, W - 1], the last W - 1 valid inputs of each row, taken from `initial_state` (or zeros) where
        the row has fewer).

    Raises:
        ValueError: shapes that do not fit, an unknown activation or a backend that cannot run this.
    """
    check_shape("x_BLD", x_BLD, (None, None, None), "[B, L, D]")
    rows, _, channels = x_BLD.shape
    check_shape("weight_DW", weight_DW, (channels, None), "[D, W]")
    width = weight_DW.shape[1]
    if width < 1:
        raise ValueError(f"weight_DW must have at least one tap, got shape {list(weight_DW.shape)}")
    if bias_D is not None:
        check_shape("bias_D", bias_D, (channels,), "[D]")
    if initial_state is not None:
        check_shape("initial_state", initial_state, (rows, channels, width - 1), "[B, D, W - 1]")
    if length is not None:
        check_shape("length", length, (rows,), "[B]")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    run = implementation("causal_conv", backend, x_BLD).causal_conv
    return run(x_BLD, weight_DW, bias_D, initial_state, length, activation)
