# pyright: basic, reportMissingImports=false
# (causal-conv1d is an optional extra, for GPUs, and without types)
"""The causal convolution on the CUDA kernels of an installed causal-conv1d, which mamba-ssm uses for it.

Written from the source of causal-conv1d 1.7.0: `causal_conv1d_interface.py` and the checks of its arguments in
`csrc/causal_conv1d.cpp`. Its backward pass is deterministic only under `torch.use_deterministic_algorithms`.
"""

import torch
from torch import Tensor

WIDTHS = (2, 3, 4)
"""Filters that it is compiled for."""

CHANNEL_MULTIPLE = 8
"""Of the number of channels and of the strides of an input whose channels lie side by side."""


def causal_conv(
    x_BLD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    length: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.causal_conv.causal_conv`.

    Raises:
        ValueError: rows of their own `length`, or a width or number of channels that causal-conv1d does not have.
    """
    channels, width = weight_DW.shape
    if length is not None:
        raise ValueError(
            "backend 'mamba_ssm' has no rows of their own length (padding): use backend='triton' or 'torch'"
        )
    if width not in WIDTHS:
        raise ValueError(f"backend 'mamba_ssm' has filters of width {WIDTHS}, not {width}")
    if channels % CHANNEL_MULTIPLE:
        raise ValueError(
            f"backend 'mamba_ssm' wants a multiple of {CHANNEL_MULTIPLE} channels, got {channels}"
        )
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    if bias_D is not None:
        bias_D = bias_D.to(weight_DW.dtype)
    before = None if initial_state is None else initial_state.to(x_BLD.dtype)
    gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_BLD, weight_DW, bias_D, before)
    )
    if (
        x_BLD.shape[1] == 1 and before is not None and not gradients
    ):  # decoding; the state is written in place
        state = before.clone()
        y_BD = causal_conv1d_update(x_BLD[:, 0].contiguous(), state, weight_DW, bias_D, activation)
        return y_BD.unsqueeze(1), state
    if x_BLD.stride(2) != 1 or x_BLD.stride(0) % CHANNEL_MULTIPLE or x_BLD.stride(1) % CHANNEL_MULTIPLE:
        x_BLD = x_BLD.contiguous()
    channels_last = None if before is None else before.transpose(1, 2).contiguous().transpose(1, 2)
    y_BDL = causal_conv1d_fn(
        x_BLD.transpose(1, 2), weight_DW, bias_D, initial_states=channels_last, activation=activation
    )
    return y_BDL.transpose(1, 2), _last_inputs(x_BLD, before, width)


def _last_inputs(x_BLD: Tensor, before: Tensor | None, width: int) -> Tensor:
    """[B, D, W - 1] the last inputs, those before the first position included."""
    last_BWD = x_BLD[:, -(width - 1) :]
    missing = width - 1 - last_BWD.shape[1]
    if missing:
        rows, _, channels = x_BLD.shape
        earlier = (
            x_BLD.new_zeros(rows, missing, channels)
            if before is None
            else before[..., -missing:].transpose(1, 2)
        )
        last_BWD = torch.cat([earlier, last_BWD], dim=1)
    return last_BWD.transpose(1, 2).clone()
