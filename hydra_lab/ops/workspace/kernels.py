# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# What `triton.jit` turns into kernels cannot be typed.
"""The workspace read, its gate included, chunk by chunk, and its gradients.

With `A` [T, S] the addresses of a chunk's tokens, `g` [T, 1] their gates, `M` [S, V] its slots:

    Y  = g * (A M)
    dM = (g * A)' dY
    D  = dY M',    dA = g * D,    dg = sum over s of A * D

Shape suffixes: B rows, L positions, C chunks, S slots, V size of a slot; in kernels T tokens, S slots and V channels
of a tile.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _tokens_of_tile(offset_ptr, row, chunk, tile, chunk_size, length, T: tl.constexpr):
    """Place of a tile's first token among those of all rows, and which tokens [T] the chunk and the row have.

    Places are 64 bits wide; what is added to them within a tile (or a chunk's slots) fits into 32.
    """
    first = chunk * chunk_size + tile * T
    if offset_ptr is not None:
        first -= tl.load(offset_ptr + row).to(tl.int64)
    token_T = tl.arange(0, T)
    inside_T = (tile * T + token_T < chunk_size) & (first + token_T >= 0) & (first + token_T < length)
    return row * length + first, inside_T


@triton.jit(do_not_specialize=["length", "chunk_size", "num_chunks", "token_tiles"])
def _read_kernel(
    address_ptr,
    gate_ptr,
    slots_ptr,
    offset_ptr,  # None where all rows start with a chunk
    out_ptr,
    length,
    chunk_size,
    num_chunks,
    token_tiles,
    value_tiles,
    num_slots,
    num_values,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
):
    """One program per (row, chunk, tile of its tokens, tile of channels)."""
    program = tl.program_id(0)
    value_V = (program % value_tiles) * V + tl.arange(0, V)
    tile = (program // value_tiles) % token_tiles
    chunk_of_all = (program // value_tiles // token_tiles).to(tl.int64)
    row = chunk_of_all // num_chunks
    slots_ptr += chunk_of_all * num_slots * num_values
    place, some_T = _tokens_of_tile(offset_ptr, row, chunk_of_all % num_chunks, tile, chunk_size, length, T)
    token_T = tl.arange(0, T)
    read_TV = tl.zeros((T, V), tl.float32)
    for first in range(0, num_slots, S):
        slot_S = first + tl.arange(0, S)
        some_S = slot_S < num_slots
        address_TS = tl.load(
            address_ptr + place * num_slots + token_T[:, None] * num_slots + slot_S[None, :],
            mask=some_T[:, None] & some_S[None, :],
            other=0.0,
        )
        slots_SV = tl.load(
            slots_ptr + slot_S[:, None] * num_values + value_V[None, :],
            mask=some_S[:, None] & (value_V < num_values)[None, :],
            other=0.0,
        )
        read_TV = tl.dot(address_TS.to(DTYPE), slots_SV.to(DTYPE), read_TV, input_precision=PRECISION)
    gate_T = tl.load(gate_ptr + place + token_T, mask=some_T, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + place * num_values + token_T[:, None] * num_values + value_V[None, :],
        gate_T[:, None] * read_TV,
        mask=some_T[:, None] & (value_V < num_values)[None, :],
    )


@triton.jit(do_not_specialize=["length", "chunk_size", "num_chunks", "token_tiles"])
def _address_gradient_kernel(
    address_ptr,
    gate_ptr,
    slots_ptr,
    offset_ptr,
    d_out_ptr,
    d_address_ptr,
    d_gate_ptr,
    length,
    chunk_size,
    num_chunks,
    token_tiles,
    num_slots,
    num_values,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
):
    """One program per (row, chunk, tile of its tokens)."""
    tile = tl.program_id(0) % token_tiles
    chunk_of_all = (tl.program_id(0) // token_tiles).to(tl.int64)
    row = chunk_of_all // num_chunks
    slots_ptr += chunk_of_all * num_slots * num_values
    place, some_T = _tokens_of_tile(offset_ptr, row, chunk_of_all % num_chunks, tile, chunk_size, length, T)
    token_T = tl.arange(0, T)
    gate_T = tl.load(gate_ptr + place + token_T, mask=some_T, other=0.0).to(tl.float32)
    d_gate_T = tl.zeros((T,), tl.float32)
    for first in range(0, num_slots, S):
        slot_S = first + tl.arange(0, S)
        some_S = slot_S < num_slots
        product_TS = tl.zeros((T, S), tl.float32)
        for channel in range(0, num_values, V):
            value_V = channel + tl.arange(0, V)
            some_V = value_V < num_values
            d_out_TV = tl.load(
                d_out_ptr + place * num_values + token_T[:, None] * num_values + value_V[None, :],
                mask=some_T[:, None] & some_V[None, :],
                other=0.0,
            )
            slots_VS = tl.load(
                slots_ptr + slot_S[None, :] * num_values + value_V[:, None],
                mask=some_S[None, :] & some_V[:, None],
                other=0.0,
            )
            product_TS = tl.dot(d_out_TV.to(DTYPE), slots_VS.to(DTYPE), product_TS, input_precision=PRECISION)
        in_tile_TS = token_T[:, None] * num_slots + slot_S[None, :]
        inside_TS = some_T[:, None] & some_S[None, :]
        address_TS = tl.load(address_ptr + place * num_slots + in_tile_TS, mask=inside_TS, other=0.0).to(
            tl.float32
        )
        d_gate_T += tl.sum(address_TS * product_TS, axis=1)
        tl.store(d_address_ptr + place * num_slots + in_tile_TS, gate_T[:, None] * product_TS, mask=inside_TS)
    tl.store(d_gate_ptr + place + token_T, d_gate_T, mask=some_T)


@triton.jit(do_not_specialize=["length", "chunk_size", "num_chunks"])
def _slots_gradient_kernel(
    address_ptr,
    gate_ptr,
    offset_ptr,
    d_out_ptr,
    d_slots_ptr,
    length,
    chunk_size,
    num_chunks,
    slot_tiles,
    value_tiles,
    num_slots,
    num_values,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
):
    """One program per (row, chunk, tile of slots, tile of channels)."""
    program = tl.program_id(0)
    value_V = (program % value_tiles) * V + tl.arange(0, V)
    slot_S = (program // value_tiles) % slot_tiles * S + tl.arange(0, S)
    chunk_of_all = (program // value_tiles // slot_tiles).to(tl.int64)
    row = chunk_of_all // num_chunks
    d_slots_ptr += chunk_of_all * num_slots * num_values
    some_S, some_V = slot_S < num_slots, value_V < num_values
    token_T = tl.arange(0, T)
    d_slots_SV = tl.zeros((S, V), tl.float32)
    for tile in range(0, tl.cdiv(chunk_size, T)):
        place, some_T = _tokens_of_tile(
            offset_ptr, row, chunk_of_all % num_chunks, tile, chunk_size, length, T
        )
        gate_T = tl.load(gate_ptr + place + token_T, mask=some_T, other=0.0).to(tl.float32)
        address_ST = tl.load(
            address_ptr + place * num_slots + token_T[None, :] * num_slots + slot_S[:, None],
            mask=some_T[None, :] & some_S[:, None],
            other=0.0,
        ).to(tl.float32)
        d_out_TV = tl.load(
            d_out_ptr + place * num_values + token_T[:, None] * num_values + value_V[None, :],
            mask=some_T[:, None] & some_V[None, :],
            other=0.0,
        )
        weight_ST = (address_ST * gate_T[None, :]).to(DTYPE)
        d_slots_SV = tl.dot(weight_ST, d_out_TV.to(DTYPE), d_slots_SV, input_precision=PRECISION)
    tl.store(
        d_slots_ptr + slot_S[:, None] * num_values + value_V[None, :],
        d_slots_SV,
        mask=some_S[:, None] & some_V[None, :],
    )


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _tile(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))


def workspace_read(
    address_BLS: Tensor, gate_BL1: Tensor, slots_BCSV: Tensor, *, chunk_size: int, offset: Tensor | None
) -> Tensor:
    """See `hydra_lab.ops.workspace.workspace_read`."""
    device = slots_BCSV.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else slots_BCSV.dtype
    apply = cast(Callable[..., Tensor], _Read.apply)  # pyright: ignore[reportUnknownMemberType]
    return apply(address_BLS, gate_BL1, slots_BCSV, chunk_size, offset, dtype)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        address_BLS: Tensor,
        gate_BL1: Tensor,
        slots_BCSV: Tensor,
        chunk_size: int,
        offset: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        num_rows, num_chunks, num_slots, num_values = slots_BCSV.shape
        length = address_BLS.shape[1]
        address_BLS, gate_BL1, slots_BCSV = (x.contiguous() for x in (address_BLS, gate_BL1, slots_BCSV))
        offset = offset if offset is None else offset.contiguous()
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        odd = (
            num_slots % 16 > 0 or num_values % 16 > 0
        )  # every element has an address of its own in a register
        ctx.options = {
            "DTYPE": _DTYPES[dtype],
            "PRECISION": "tf32" if tf32 else "ieee",
            "T": _tile(chunk_size, 64),
            "S": _tile(num_slots, 64),
            "V": _tile(num_values, 16 if odd else 64),
            "num_warps": 4,
            "num_stages": 1 if odd else 2,
        }
        T, V = ctx.options["T"], ctx.options["V"]
        token_tiles, value_tiles = triton.cdiv(chunk_size, T), triton.cdiv(num_values, V)
        out = torch.empty(num_rows, length, num_values, dtype=dtype, device=slots_BCSV.device)
        if out.numel() > 0:
            _read_kernel[(num_rows * num_chunks * token_tiles * value_tiles,)](
                address_BLS, gate_BL1, slots_BCSV, offset, out, length, chunk_size, num_chunks, token_tiles,
                value_tiles, num_slots, num_values, **ctx.options,
            )  # fmt: skip
        ctx.save_for_backward(address_BLS, gate_BL1, slots_BCSV, offset)
        ctx.chunk_size = chunk_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        address_BLS, gate_BL1, slots_BCSV, offset = ctx.saved_tensors
        d_out = grad_outputs[0].contiguous()
        num_rows, num_chunks, num_slots, num_values = slots_BCSV.shape
        length, chunk_size, options = address_BLS.shape[1], ctx.chunk_size, ctx.options
        d_address = d_gate = d_slots = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            d_address, d_gate = torch.empty_like(address_BLS), torch.empty_like(gate_BL1)
            if d_gate.numel() > 0:
                token_tiles = triton.cdiv(chunk_size, options["T"])
                _address_gradient_kernel[(num_rows * num_chunks * token_tiles,)](
                    address_BLS, gate_BL1, slots_BCSV, offset, d_out, d_address, d_gate, length, chunk_size,
                    num_chunks, token_tiles, num_slots, num_values, **options,
                )  # fmt: skip
        if ctx.needs_input_grad[2]:
            d_slots = torch.empty_like(slots_BCSV)
            if d_slots.numel() > 0:
                slot_tiles = triton.cdiv(num_slots, options["S"])
                value_tiles = triton.cdiv(num_values, options["V"])
                _slots_gradient_kernel[(num_rows * num_chunks * slot_tiles * value_tiles,)](
                    address_BLS, gate_BL1, offset, d_out, d_slots, length, chunk_size, num_chunks, slot_tiles,
                    value_tiles, num_slots, num_values, **options,
                )  # fmt: skip
        return d_address, d_gate, d_slots, None, None, None
