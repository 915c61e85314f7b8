# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# What `triton.jit` turns into kernels cannot be typed.
"""Weighted sums of rows of a table by index, and their transpose.

    out[n] = sum over e of weight[n, e] table[row[n, e]]

is how values are read from the memory, and how the gradient of a query collects the half-keys that were chosen. The
gradient of the table is the transpose: row by row, the sum over the entries that point at it, found by inverting the
index (`hydra_lab.ops.inverse`). Sums are taken in float32, always in the same order.

Shape suffixes: N bags, E entries of a bag and D channels of a row (in kernels, of a tile), A rows of the table, M
pieces of the inverse index, P partial sums.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_lab.ops.inverse import invert

_PIECE = 256
"""Entries of the inverse index that one program adds up."""
_CHANNELS = 512
"""Most channels of a tile."""
_TILE_BYTES = 1 << 14
"""Size of a tile of rows: eight loads of 16 bytes are in flight in each of the 128 threads."""


@triton.jit(do_not_specialize=["num_entries"])
def _read_rows_kernel(
    row_ptr,
    weight_ptr,
    table_ptr,
    out_ptr,
    num_entries,
    num_channels,
    table_row,
    out_row,
    channel_tiles,
    E: tl.constexpr,
    D: tl.constexpr,
):
    """One program per (bag, tile of channels)."""
    bag = (tl.program_id(0) // channel_tiles).to(tl.int64)
    channel_D = (tl.program_id(0) % channel_tiles) * D + tl.arange(0, D)
    in_row_D = channel_D < num_channels
    sum_ED = tl.zeros((E, D), tl.float32)
    for first in range(0, num_entries, E):
        entry_E = first + tl.arange(0, E)
        some_E = entry_E < num_entries
        row_E = tl.load(row_ptr + bag * num_entries + entry_E, mask=some_E, other=0)
        weight_E = tl.load(weight_ptr + bag * num_entries + entry_E, mask=some_E, other=0.0).to(tl.float32)
        value_ED = tl.load(
            table_ptr + row_E[:, None] * table_row + channel_D[None, :],
            mask=some_E[:, None] & in_row_D[None, :],
            other=0.0,
        )
        sum_ED += weight_E[:, None] * value_ED.to(tl.float32)
    tl.store(out_ptr + bag * out_row + channel_D, tl.sum(sum_ED, axis=0), mask=in_row_D)


@triton.jit(do_not_specialize=["num_entries", "entry_tiles"])
def _weight_gradient_kernel(
    row_ptr,
    table_ptr,
    d_out_ptr,
    d_weight_ptr,
    num_entries,
    num_channels,
    table_row,
    d_out_row,
    entry_tiles,
    E: tl.constexpr,
    D: tl.constexpr,
):
    """One program per (bag, tile of entries): the product of the bag's gradient and each row that it read."""
    bag = (tl.program_id(0) // entry_tiles).to(tl.int64)
    entry_E = (tl.program_id(0) % entry_tiles) * E + tl.arange(0, E)
    some_E = entry_E < num_entries
    row_E = tl.load(row_ptr + bag * num_entries + entry_E, mask=some_E, other=0)
    sum_ED = tl.zeros((E, D), tl.float32)
    for first in range(0, num_channels, D):
        channel_D = first + tl.arange(0, D)
        in_row_D = channel_D < num_channels
        value_ED = tl.load(
            table_ptr + row_E[:, None] * table_row + channel_D[None, :],
            mask=some_E[:, None] & in_row_D[None, :],
            other=0.0,
        )
        d_out_D = tl.load(d_out_ptr + bag * d_out_row + channel_D, mask=in_row_D, other=0.0)
        sum_ED += d_out_D.to(tl.float32)[None, :] * value_ED.to(tl.float32)
    tl.store(d_weight_ptr + bag * num_entries + entry_E, tl.sum(sum_ED, axis=1), mask=some_E)


@triton.jit
def _sum_of_piece(
    piece,
    order_ptr,
    start_ptr,
    stop_ptr,
    weight_ptr,
    source_ptr,
    source_row,
    num_entries,
    channel_D,
    in_row_D,
    E: tl.constexpr,
    D: tl.constexpr,
):
    """[E, D] the weighted sum of the bags whose entries the piece holds, E of them side by side."""
    stop = tl.load(stop_ptr + piece)
    sum_ED = tl.zeros((E, D), tl.float32)
    for first in range(tl.load(start_ptr + piece), stop, E):
        place_E = first + tl.arange(0, E)
        some_E = place_E < stop
        entry_E = tl.load(order_ptr + place_E, mask=some_E, other=0)
        weight_E = tl.load(weight_ptr + entry_E, mask=some_E, other=0.0).to(tl.float32)
        source_ED = tl.load(
            source_ptr + (entry_E // num_entries)[:, None] * source_row + channel_D[None, :],
            mask=some_E[:, None] & in_row_D[None, :],
            other=0.0,
        )
        sum_ED += weight_E[:, None] * source_ED.to(tl.float32)
    return sum_ED


@triton.jit(do_not_specialize=["num_entries"])
def _partial_kernel(
    piece_ptr,
    order_ptr,
    start_ptr,
    stop_ptr,
    weight_ptr,
    source_ptr,
    partial_ptr,
    num_entries,
    num_channels,
    source_row,
    channel_tiles,
    E: tl.constexpr,
    D: tl.constexpr,
):
    """One program per (partial sum, tile of channels): the sum of a piece that is not the first one of its row."""
    partial = (tl.program_id(0) // channel_tiles).to(tl.int64)
    piece = tl.load(piece_ptr + partial)
    if piece < 0:
        return
    channel_D = (tl.program_id(0) % channel_tiles) * D + tl.arange(0, D)
    in_row_D = channel_D < num_channels
    sum_ED = _sum_of_piece(
        piece, order_ptr, start_ptr, stop_ptr, weight_ptr, source_ptr, source_row, num_entries, channel_D, in_row_D,
        E, D,
    )  # fmt: skip
    tl.store(partial_ptr + partial * num_channels + channel_D, tl.sum(sum_ED, axis=0), mask=in_row_D)


@triton.jit(do_not_specialize=["num_entries"])
def _add_kernel(
    target_ptr,
    run_ptr,
    before_ptr,
    order_ptr,
    start_ptr,
    stop_ptr,
    weight_ptr,
    source_ptr,
    partial_ptr,
    out_ptr,
    num_entries,
    num_channels,
    source_row,
    out_row,
    channel_tiles,
    E: tl.constexpr,
    D: tl.constexpr,
):
    """One program per (piece, tile of channels): the first piece of each row, then the sums of its other pieces."""
    piece = (tl.program_id(0) // channel_tiles).to(tl.int64)
    run = tl.load(run_ptr + piece)
    if run == 0:
        return
    channel_D = (tl.program_id(0) % channel_tiles) * D + tl.arange(0, D)
    in_row_D = channel_D < num_channels
    sum_ED = _sum_of_piece(
        piece, order_ptr, start_ptr, stop_ptr, weight_ptr, source_ptr, source_row, num_entries, channel_D, in_row_D,
        E, D,
    )  # fmt: skip
    before = tl.load(before_ptr + piece)
    for first in range(0, run - 1, E):
        other_E = first + tl.arange(0, E)
        sum_ED += tl.load(
            partial_ptr + (before + other_E)[:, None] * num_channels + channel_D[None, :],
            mask=(other_E < run - 1)[:, None] & in_row_D[None, :],
            other=0.0,
        )
    target = tl.load(target_ptr + piece)
    tl.store(out_ptr + target * out_row + channel_D, tl.sum(sum_ED, axis=0), mask=in_row_D)


def _tile(num_entries: int, num_channels: int, itemsize: int) -> tuple[int, int]:
    """Rows E and channels D of a tile."""
    D = min(_CHANNELS, max(16, triton.next_power_of_2(num_channels)))
    return max(1, min(_TILE_BYTES // (itemsize * D), triton.next_power_of_2(num_entries))), D


def read_rows(row_NE: Tensor, weight_NE: Tensor, table_AD: Tensor, *, out: Tensor) -> None:
    """`out[n] = sum over e of weight[n, e] table[row[n, e]]`.

    Args:
        row_NE: [N, E] int64 rows of the table, contiguous.
        weight_NE: [N, E] weight of each, contiguous.
        table_AD: [A, D], each row contiguous.
        out: [N, D] is overwritten; each row contiguous.
    """
    (num_bags, num_entries), num_channels = row_NE.shape, table_AD.shape[1]
    if out.numel() == 0:
        return
    E, D = _tile(num_entries, num_channels, table_AD.element_size())
    tiles = triton.cdiv(num_channels, D)
    _read_rows_kernel[(num_bags * tiles,)](
        row_NE, weight_NE, table_AD, out, num_entries, num_channels, table_AD.stride(0), out.stride(0), tiles,
        E=E, D=D, num_warps=4,
    )  # fmt: skip


def weight_gradient(row_NE: Tensor, table_AD: Tensor, d_out_ND: Tensor, *, out: Tensor) -> None:
    """The gradient of `read_rows` towards its weights, `out[n, e] = d_out[n] . table[row[n, e]]`.

    Args:
        row_NE, table_AD: as there.
        d_out_ND: [N, D], each row contiguous.
        out: [N, E] is overwritten; contiguous.
    """
    (num_bags, num_entries), num_channels = row_NE.shape, table_AD.shape[1]
    if out.numel() == 0:
        return
    E, D = _tile(num_entries, num_channels, table_AD.element_size())
    tiles = triton.cdiv(num_entries, E)
    _weight_gradient_kernel[(num_bags * tiles,)](
        row_NE, table_AD, d_out_ND, out, num_entries, num_channels, table_AD.stride(0), d_out_ND.stride(0), tiles,
        E=E, D=D, num_warps=4,
    )  # fmt: skip


def add_to_rows(row_NE: Tensor, weight_NE: Tensor, source_ND: Tensor, *, out: Tensor) -> None:
    """The transpose of `read_rows`: `out[a] = sum over (n, e) with row[n, e] = a of weight[n, e] source[n]`.

    Args:
        row_NE, weight_NE: as there.
        source_ND: [N, D], each row contiguous.
        out: [A, D] of which the rows that `row_NE` names are overwritten, and no others; each row contiguous.
    """
    num_entries, (num_rows, num_channels) = row_NE.shape[1], out.shape
    if row_NE.numel() == 0 or num_channels == 0:
        return
    inverse = invert(row_NE.flatten(), num_rows, _PIECE)
    num_pieces, num_partial = inverse.target.shape[0], row_NE.numel() // _PIECE
    E, D = _tile(_PIECE, num_channels, source_ND.element_size())
    tiles = triton.cdiv(num_channels, D)
    options: dict[str, Any] = {"E": E, "D": D, "num_warps": 4}

    # A row that more than one piece points at: the first piece is for the program that writes the row, the others
    # leave partial sums, numbered in their order. Their number is at most `num_partial`.
    partial_PD = torch.empty(num_partial, num_channels, dtype=torch.float32, device=out.device)
    is_later = (inverse.target >= 0) & (inverse.run == 0)
    before = is_later.cumsum(0)
    if num_partial > 0:
        place = torch.where(is_later, before - 1, num_partial)
        piece_P = before.new_full((num_partial + 1,), -1)
        piece_P.scatter_(0, place, torch.arange(num_pieces, device=out.device))
        _partial_kernel[(num_partial * tiles,)](
            piece_P, inverse.order, inverse.start, inverse.stop, weight_NE, source_ND, partial_PD,
            num_entries, num_channels, source_ND.stride(0), tiles, **options,
        )  # fmt: skip
    _add_kernel[(num_pieces * tiles,)](
        inverse.target, inverse.run, before, inverse.order, inverse.start, inverse.stop, weight_NE, source_ND,
        partial_PD, out, num_entries, num_channels, source_ND.stride(0), out.stride(0), tiles, **options,
    )  # fmt: skip


def memory_read(addresses: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """See `hydra_lab.ops.product_key.memory_read`."""
    apply = cast(Callable[..., Tensor], _Read.apply)  # pyright: ignore[reportUnknownMemberType]
    return apply(addresses, weights, values)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, addresses: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        rows, length = addresses.shape[:2]
        row_NE, weight_NE = (x.reshape(rows * length, -1).contiguous() for x in (addresses, weights))
        values = values if values.stride(-1) == 1 else values.contiguous()
        out = torch.empty(rows * length, values.shape[1], dtype=values.dtype, device=values.device)
        read_rows(row_NE, weight_NE, values, out=out)
        ctx.save_for_backward(row_NE, weight_NE, values)
        ctx.shape = weights.shape
        return out.view(rows, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        row_NE, weight_NE, values = ctx.saved_tensors
        d_out_ND = grad_outputs[0].reshape(row_NE.shape[0], -1).contiguous()
        d_weights = d_values = None
        if ctx.needs_input_grad[1]:
            d_weights = torch.empty_like(weight_NE)
            weight_gradient(row_NE, values, d_out_ND, out=d_weights)
            d_weights = d_weights.view(ctx.shape)
        if ctx.needs_input_grad[2]:
            d_values = torch.zeros(values.shape, dtype=values.dtype, device=values.device)
            add_to_rows(row_NE, weight_NE, d_out_ND, out=d_values)
        return None, d_weights, d_values
