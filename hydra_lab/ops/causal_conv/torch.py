"""The causal convolution as W shifted products, on slices that stay in the processor's cache.

torch's depthwise `conv1d` takes several times as long on a CPU, most of all in its backward pass.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

SLICE_ELEMENTS = 1 << 17
"""On a CPU, the size of the pieces that are worked on one after another."""


def causal_conv(
    x_BLD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    length: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.causal_conv.causal_conv`."""
    rows, positions, _ = x_BLD.shape
    before = weight_DW.shape[1] - 1
    if initial_state is None:
        extended_BLD = F.pad(x_BLD, (0, 0, before, 0))
    else:
        extended_BLD = torch.cat([initial_state.transpose(1, 2).to(x_BLD.dtype), x_BLD], dim=1)
    apply = cast(Callable[..., Tensor], _Convolution.apply)  # pyright: ignore[reportUnknownMemberType]
    y_BLD = apply(extended_BLD, weight_DW, bias_D, activation)
    if length is None:
        final_BWD = extended_BLD[:, positions:].clone()  # a view would keep all of it
    else:
        taps = torch.arange(before, device=x_BLD.device)
        row = torch.arange(rows, device=x_BLD.device)
        final_BWD = extended_BLD[row[:, None], length[:, None] + taps]
    return y_BLD, final_BWD.transpose(1, 2)


class _Convolution(torch.autograd.Function):
    """`y_t = activation(bias + sum over w of weight[w] x_{t+w})`: x [B, L + W - 1, D] -> y [B, L, D], dtype of x.

    Sums are taken in the precision of the weight, so that half-precision inputs are rounded once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.activation = activation
        width, weight_WD = weight.shape[1], weight.t().contiguous()
        y = x.new_empty(x.shape[0], x.shape[1] - width + 1, x.shape[2])
        for row, at in _slices(y):
            sums = _sums(x[row, at.start : at.stop + width - 1].to(weight.dtype), weight_WD, bias)
            y[row, at] = F.silu(sums, inplace=True) if activation == "silu" else sums
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("causal_conv with backend='torch' has no second derivative")
        x, weight, bias = ctx.saved_tensors
        grad_y: Tensor = grad_outputs[0]
        width, weight_WD = weight.shape[1], weight.t().contiguous()
        grad_x = torch.zeros_like(x)
        grad_weight_WD, grad_bias_D = weight.new_zeros(width, x.shape[2]), weight.new_zeros(x.shape[2])
        for row, at in _slices(grad_y):
            x_slice = x[row, at.start : at.stop + width - 1].to(weight.dtype)
            grad = grad_y[row, at].to(weight.dtype)
            if ctx.activation == "silu":
                grad = torch.ops.aten.silu_backward(grad, _sums(x_slice, weight_WD, bias))
            size = at.stop - at.start
            grad_x_slice = torch.zeros_like(x_slice)
            for w in range(width):
                grad_x_slice[:, w : w + size].addcmul_(grad, weight_WD[w])
                grad_weight_WD[w] += (grad * x_slice[:, w : w + size]).sum((0, 1))
            grad_bias_D += grad.sum((0, 1))
            grad_x[row, at.start : at.stop + width - 1] += grad_x_slice
        return grad_x, grad_weight_WD.t(), None if bias is None else grad_bias_D.to(bias.dtype), None


def _slices(y: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and positions of the output to work on at once."""
    rows, length, channels = y.shape
    elements = SLICE_ELEMENTS if y.device.type == "cpu" else y.numel()
    positions = max(1, min(length, elements // channels))
    together = max(1, min(rows, elements // (positions * channels)))
    for row in range(0, rows, together):
        for start in range(0, length, positions):
            yield slice(row, min(row + together, rows)), slice(start, min(start + positions, length))


def _sums(x: Tensor, weight_WD: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution before its activation; W - 1 positions fewer than x."""
    width = weight_WD.shape[0]
    length = x.shape[1] - width + 1
    sums = x[:, :length] * weight_WD[0]
    for w in range(1, width):
        sums.addcmul_(x[:, w : w + length], weight_WD[w])
    return sums if bias is None else sums.add_(bias)
