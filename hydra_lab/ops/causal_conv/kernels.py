# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
# (what `triton.jit` turns into kernels cannot be typed)
"""Triton kernels of the causal convolution, forward and backward. See the README beside this.

Shape suffixes: B rows, L positions, D channels, W width of the filter; in the kernels T positions and D channels of a
tile. Input u of a row is `x[u]` for u >= 0 and `initial_state[u + W - 1]` before; output t reads the inputs
t - (W - 1) .. t.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_POSITIONS = 16
TILE_CHANNELS = 64
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def causal_conv(
    x_BLD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    length: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.causal_conv.causal_conv`. Sums are taken in float32.

    Raises:
        ValueError: a dtype is none of float32, bfloat16 and float16.
    """
    for name, tensor in {
        "x": x_BLD,
        "weight": weight_DW,
        "bias": bias_D,
        "initial_state": initial_state,
    }.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(f"backend 'triton' has no {tensor.dtype}, which is the dtype of {name}")
    return _Convolution.apply(x_BLD, weight_DW, bias_D, initial_state, length, activation == "silu")


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        length: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, positions, channels = x.shape
        width = weight.shape[1]
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        y = torch.empty(rows, positions, channels, dtype=x.dtype, device=x.device)
        final = torch.empty(rows, channels, width - 1, dtype=x.dtype, device=x.device)
        tile, tiles = _tiles(positions, width)
        forward_kernel[(rows * tiles, triton.cdiv(channels, TILE_CHANNELS))](
            x, weight, bias, initial, length, y, final,
            positions, channels, tiles, *x.stride(), *_strides(initial),
            SILU=silu, **tile,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, initial, length)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        x, weight, bias, initial, length = ctx.saved_tensors
        grad_y, grad_final = grad_outputs
        rows, positions, channels = x.shape
        width = weight.shape[1]
        grad_sums = grad_weight = grad_bias = None
        if grad_y is not None:
            tile, tiles = _tiles(positions, width)
            # The gradient of the sums before the activation, and each tile's part of those of the filters.
            grad_sums = torch.empty(rows, positions, channels, dtype=torch.float32, device=x.device)
            parts = torch.empty(rows * tiles, width + 1, channels, dtype=torch.float32, device=x.device)
            sums_backward_kernel[(rows * tiles, triton.cdiv(channels, TILE_CHANNELS))](
                x, weight, bias, initial, grad_y, grad_sums, parts,
                positions, channels, tiles, *x.stride(), *_strides(initial), *grad_y.stride(),
                SILU=ctx.silu, **tile,
            )  # fmt: skip
            total = parts.sum(dim=0)
            grad_weight = total[:width].t().to(weight.dtype)
            grad_bias = None if bias is None else total[width].to(bias.dtype)
        grad_x = torch.empty(rows, positions, channels, dtype=x.dtype, device=x.device)
        grad_initial = (
            None if initial is None else torch.empty(initial.shape, dtype=initial.dtype, device=x.device)
        )
        tile, tiles = _tiles(positions + width - 1, width)
        inputs_backward_kernel[(rows * tiles, triton.cdiv(channels, TILE_CHANNELS))](
            weight, length, grad_sums, grad_final, grad_x, grad_initial,
            positions, channels, tiles, *_strides(grad_final), **tile,
        )  # fmt: skip
        return grad_x, grad_weight, grad_bias, grad_initial, None, None


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()


def _tiles(positions: int, width: int) -> tuple[dict[str, int], int]:
    """Block sizes and warps, and how many tiles cover the positions; a decode step has one position."""
    size = min(TILE_POSITIONS, triton.next_power_of_2(positions))
    return {"W": width, "T": size, "D": TILE_CHANNELS, "num_warps": 4 if size > 8 else 2}, triton.cdiv(
        positions, size
    )


@triton.jit
def _tile_of(tiles, T: tl.constexpr):
    """Row and positions of a program."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    t_T = (tl.program_id(0) % tiles).to(tl.int64) * T + tl.arange(0, T)
    return row, t_T


@triton.jit
def _inputs(
    x_ptr, initial_ptr, row, u_T, d_D, in_D, positions,
    x_row, x_position, x_channel, initial_row, initial_channel, initial_tap, W: tl.constexpr,
):  # fmt: skip
    """[T, D] inputs u of a row, in float32; 0 past its end, and before its beginning where there is no state."""
    x_ptrs = x_ptr + row * x_row + u_T[:, None] * x_position + d_D[None, :] * x_channel
    x_TD = tl.load(x_ptrs, mask=((u_T >= 0) & (u_T < positions))[:, None] & in_D[None, :], other=0.0)
    x_TD = x_TD.to(tl.float32)
    if initial_ptr is not None:
        tap_T = u_T + (W - 1)
        ptrs = initial_ptr + row * initial_row + d_D[None, :] * initial_channel + tap_T[:, None] * initial_tap
        before_TD = tl.load(ptrs, mask=((u_T < 0) & (tap_T >= 0))[:, None] & in_D[None, :], other=0.0)
        x_TD += before_TD.to(tl.float32)
    return x_TD


@triton.jit
def _sums(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, row, t_T, d_D, in_D, positions,
    x_row, x_position, x_channel, initial_row, initial_channel, initial_tap,
    W: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[T, D] the convolution before its activation."""
    sums_TD = tl.zeros((T, D), dtype=tl.float32)
    if bias_ptr is not None:
        sums_TD += tl.load(bias_ptr + d_D, mask=in_D, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        x_TD = _inputs(
            x_ptr, initial_ptr, row, t_T + (w - (W - 1)), d_D, in_D, positions,
            x_row, x_position, x_channel, initial_row, initial_channel, initial_tap, W,
        )  # fmt: skip
        weight_D = tl.load(weight_ptr + d_D * W + w, mask=in_D, other=0.0).to(tl.float32)
        sums_TD += weight_D[None, :] * x_TD
    return sums_TD


@triton.jit(do_not_specialize=["positions", "tiles"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, length_ptr, y_ptr, final_ptr,
    positions, channels, tiles,
    x_row, x_position, x_channel, initial_row, initial_channel, initial_tap,
    SILU: tl.constexpr, W: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile; the last tile of a row also writes its final state, so that a decode step is one launch."""
    row, t_T = _tile_of(tiles, T)
    d_D = tl.program_id(1) * D + tl.arange(0, D)
    in_D = d_D < channels
    y_TD = _sums(
        x_ptr, weight_ptr, bias_ptr, initial_ptr, row, t_T, d_D, in_D, positions,
        x_row, x_position, x_channel, initial_row, initial_channel, initial_tap, W, T, D,
    )  # fmt: skip
    if SILU:
        y_TD = y_TD * tl.sigmoid(y_TD)
    y_ptrs = y_ptr + (row * positions + t_T[:, None]) * channels + d_D[None, :]
    tl.store(y_ptrs, y_TD, mask=(t_T < positions)[:, None] & in_D[None, :])
    if tl.program_id(0) % tiles == tiles - 1:
        end = positions.to(tl.int64)
        if length_ptr is not None:
            end = tl.load(length_ptr + row).to(tl.int64)
        for j in tl.static_range(W - 1):
            u_1 = end - (W - 1) + j + tl.zeros((1,), dtype=tl.int64)
            last_1D = _inputs(
                x_ptr, initial_ptr, row, u_1, d_D, in_D, positions,
                x_row, x_position, x_channel, initial_row, initial_channel, initial_tap, W,
            )  # fmt: skip
            final_ptrs = final_ptr + (row * channels + d_D[None, :]) * (W - 1) + j
            tl.store(final_ptrs, last_1D, mask=in_D[None, :])


@triton.jit(do_not_specialize=["positions", "tiles"])
def sums_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, grad_y_ptr, grad_sums_ptr, parts_ptr,
    positions, channels, tiles,
    x_row, x_position, x_channel, initial_row, initial_channel, initial_tap, grad_row, grad_position, grad_channel,
    SILU: tl.constexpr, W: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums of a tile, and what the tile adds to those of each tap (parts 0 .. W-1) and the bias."""
    row, t_T = _tile_of(tiles, T)
    d_D = tl.program_id(1) * D + tl.arange(0, D)
    in_D = d_D < channels
    mask_TD = (t_T < positions)[:, None] & in_D[None, :]
    grad_ptrs = grad_y_ptr + row * grad_row + t_T[:, None] * grad_position + d_D[None, :] * grad_channel
    grad_TD = tl.load(grad_ptrs, mask=mask_TD, other=0.0).to(tl.float32)
    if SILU:
        sums_TD = _sums(
            x_ptr, weight_ptr, bias_ptr, initial_ptr, row, t_T, d_D, in_D, positions,
            x_row, x_position, x_channel, initial_row, initial_channel, initial_tap, W, T, D,
        )  # fmt: skip
        sigmoid_TD = tl.sigmoid(sums_TD)
        grad_TD *= sigmoid_TD * (1 + sums_TD * (1 - sigmoid_TD))
    tl.store(
        grad_sums_ptr + (row * positions + t_T[:, None]) * channels + d_D[None, :], grad_TD, mask=mask_TD
    )
    parts_ptrs = parts_ptr + tl.program_id(0).to(tl.int64) * (W + 1) * channels + d_D
    for w in tl.static_range(W):
        x_TD = _inputs(
            x_ptr, initial_ptr, row, t_T + (w - (W - 1)), d_D, in_D, positions,
            x_row, x_position, x_channel, initial_row, initial_channel, initial_tap, W,
        )  # fmt: skip
        tl.store(parts_ptrs + w * channels, tl.sum(grad_TD * x_TD, axis=0), mask=in_D)
    tl.store(parts_ptrs + W * channels, tl.sum(grad_TD, axis=0), mask=in_D)


@triton.jit(do_not_specialize=["positions", "tiles"])
def inputs_backward_kernel(
    weight_ptr, length_ptr, grad_sums_ptr, grad_final_ptr, grad_x_ptr, grad_initial_ptr,
    positions, channels, tiles, final_row, final_channel, final_tap,
    W: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradient of the inputs u of a tile, from -(W - 1) on: through the W outputs that read u, and the final state."""
    row, t_T = _tile_of(tiles, T)
    u_T = t_T - (W - 1)
    d_D = tl.program_id(1) * D + tl.arange(0, D)
    in_D = d_D < channels
    grad_TD = tl.zeros((T, D), dtype=tl.float32)
    if grad_sums_ptr is not None:
        for w in tl.static_range(W):
            t = u_T + (W - 1 - w)
            ptrs = grad_sums_ptr + (row * positions + t[:, None]) * channels + d_D[None, :]
            of_sums_TD = tl.load(ptrs, mask=((t >= 0) & (t < positions))[:, None] & in_D[None, :], other=0.0)
            grad_TD += (
                tl.load(weight_ptr + d_D * W + w, mask=in_D, other=0.0).to(tl.float32)[None, :] * of_sums_TD
            )
    if grad_final_ptr is not None:
        end = positions.to(tl.int64)
        if length_ptr is not None:
            end = tl.load(length_ptr + row).to(tl.int64)
        tap_T = u_T - end + (W - 1)
        ptrs = grad_final_ptr + row * final_row + d_D[None, :] * final_channel + tap_T[:, None] * final_tap
        kept_T = (tap_T >= 0) & (tap_T < W - 1)
        grad_TD += tl.load(ptrs, mask=kept_T[:, None] & in_D[None, :], other=0.0).to(tl.float32)
    grad_x_ptrs = grad_x_ptr + (row * positions + u_T[:, None]) * channels + d_D[None, :]
    tl.store(grad_x_ptrs, grad_TD, mask=((u_T >= 0) & (u_T < positions))[:, None] & in_D[None, :])
    if grad_initial_ptr is not None:
        ptrs = grad_initial_ptr + (row * channels + d_D[None, :]) * (W - 1) + t_T[:, None]
        tl.store(ptrs, grad_TD, mask=(u_T < 0)[:, None] & in_D[None, :])
