# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (what `triton.jit` turns into kernels cannot be typed)
"""The recurrence over states from chunk to chunk, forward and backward.

Shape suffixes: B rows, C chunks (the scan's tiles), E ends (states that are asked for, after every so many chunks),
H heads, M values of a state, K blocks of M.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 512
"""Values of a state that one program carries from chunk to chunk: small, so that many programs read at once."""


@triton.jit(do_not_specialize=["num_chunks", "every"])
def pass_states_kernel(
    update_ptr,
    kept_ptr,
    initial_ptr,  # None for zeros
    entering_ptr,
    final_ptr,
    ends_ptr,  # None where nobody asked for them
    squares_ptr,  # the same
    update_row,
    update_chunk,
    update_head,
    initial_row,
    initial_head,
    num_chunks,
    every,
    num_heads: tl.constexpr,
    num_values: tl.constexpr,
    M: tl.constexpr,
):
    """state = kept_c state + update_c, for c = 0, 1, ...

    update [B, C, H, M], kept [B, C, H] -> entering [B, C, H, M], final [B, H, M], and after every so many chunks the
    state [B, E, H, M] and the sum of its squares over each block [B, E, H, K]. `entering` may be `update`: each value
    is read before it is overwritten. One program per (row, head, block of M).
    """
    num_blocks: tl.constexpr = (num_values + M - 1) // M
    pid = tl.program_id(0).to(tl.int64)
    block, row_head = pid % num_blocks, pid // num_blocks
    row, head = row_head // num_heads, row_head % num_heads
    m = block * M + tl.arange(0, M)
    inside = m < num_values
    state = tl.zeros((M,), dtype=tl.float32)
    if initial_ptr is not None:
        initial_at = row * initial_row + head * initial_head
        state = tl.load(initial_ptr + initial_at + m, mask=inside, other=0.0).to(tl.float32)
    update_ptr += row * update_row + head * update_head
    chunk_head = row * num_chunks * num_heads + head
    num_ends = num_chunks // every
    end_head = row * num_ends * num_heads + head
    update = tl.load(update_ptr + m, mask=inside, other=0.0).to(tl.float32)
    for chunk in range(num_chunks):
        # The next update is on its way while this one is added.
        next_at = tl.minimum(chunk + 1, num_chunks - 1).to(tl.int64) * update_chunk
        following = tl.load(update_ptr + next_at + m, mask=inside, other=0.0).to(tl.float32)
        tl.store(entering_ptr + chunk_head * num_values + m, state, mask=inside)
        state = tl.load(kept_ptr + chunk_head) * state + update
        update = following
        chunk_head += num_heads
        if (chunk + 1) % every == 0:
            if ends_ptr is not None:
                tl.store(ends_ptr + end_head * num_values + m, state, mask=inside)
            if squares_ptr is not None:
                tl.store(squares_ptr + end_head * num_blocks + block, tl.sum(state * state, axis=0))
            end_head += num_heads
    tl.store(final_ptr + row_head * num_values + m, state, mask=inside)


@triton.jit(do_not_specialize=["num_chunks", "every"])
def pass_states_backward_kernel(
    grad_entering_ptr,
    grad_final_ptr,  # None for zeros
    grad_ends_ptr,  # the same
    kept_ptr,
    entering_ptr,
    grad_leaving_ptr,
    grad_kept_ptr,
    grad_initial_ptr,
    num_chunks,
    every,
    num_heads: tl.constexpr,
    num_values: tl.constexpr,
    M: tl.constexpr,
):
    """The same recurrence for gradients, from the last chunk to the first: grad = kept_c grad + grad_entering_c.

    `grad_leaving` [B, C, H, M] is the gradient of the state that leaves each chunk, through all that follows from it,
    and so of the chunk's update; `grad_kept` [B, C, H, K] that of the logarithm of what is kept, from each block.
    `grad_leaving` may be `grad_entering`. One program per (row, head, block of M).
    """
    num_blocks: tl.constexpr = (num_values + M - 1) // M
    pid = tl.program_id(0).to(tl.int64)
    block, row_head = pid % num_blocks, pid // num_blocks
    row, head = row_head // num_heads, row_head % num_heads
    m = block * M + tl.arange(0, M)
    inside = m < num_values
    grad = tl.zeros((M,), dtype=tl.float32)
    if grad_final_ptr is not None:
        grad = tl.load(grad_final_ptr + row_head * num_values + m, mask=inside, other=0.0).to(tl.float32)
    chunk_head = (row + 1) * num_chunks * num_heads + head
    end_head = (row + 1) * (num_chunks // every) * num_heads + head
    for index in range(num_chunks):
        chunk_head -= num_heads
        at = chunk_head * num_values + m
        grad_entering = tl.load(grad_entering_ptr + at, mask=inside, other=0.0).to(tl.float32)
        entering = tl.load(entering_ptr + at, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(kept_ptr + chunk_head)
        if grad_ends_ptr is not None:
            if (num_chunks - index) % every == 0:
                end_head -= num_heads
                grad += tl.load(grad_ends_ptr + end_head * num_values + m, mask=inside, other=0.0)
        tl.store(grad_leaving_ptr + at, grad, mask=inside)
        grad = kept * grad
        tl.store(grad_kept_ptr + chunk_head * num_blocks + block, tl.sum(grad * entering, axis=0))
        grad += grad_entering
    tl.store(grad_initial_ptr + row_head * num_values + m, grad, mask=inside)


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor with its last axis side by side in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Passed(NamedTuple):
    """What comes of passing states: entering [B, C, H, M], final [B, H, M], ends [B, E, H, M], squares [B, E, H]."""

    entering: Tensor
    final: Tensor
    ends: Tensor | None
    squares: Tensor | None


def pass_states(
    update_BCHM: Tensor,
    kept_BCH: Tensor,
    initial_BHM: Tensor | None,
    entering_BCHM: Tensor,
    *,
    every: int = 1,
    ends: bool = False,
    squares: bool = False,
) -> Passed:
    rows, chunks, heads, values = update_BCHM.shape
    block = min(BLOCK, triton.next_power_of_2(values))
    blocks = triton.cdiv(values, block)
    final = kept_BCH.new_empty(rows, heads, values)
    ends_BEHM = kept_BCH.new_empty(rows, chunks // every, heads, values) if ends else None
    squares_BEHK = kept_BCH.new_empty(rows, chunks // every, heads, blocks) if squares else None
    pass_states_kernel[(rows * heads * blocks,)](
        update_BCHM,
        kept_BCH,
        initial_BHM,
        entering_BCHM,
        final,
        ends_BEHM,
        squares_BEHK,
        *update_BCHM.stride()[:3],
        *((0, 0) if initial_BHM is None else initial_BHM.stride()[:2]),
        chunks,
        every,
        num_heads=heads,
        num_values=values,
        M=block,
        num_warps=2,
    )
    return Passed(entering_BCHM, final, ends_BEHM, None if squares_BEHK is None else squares_BEHK.sum(dim=-1))


def pass_states_backward(
    grad_entering_BCHM: Tensor,
    grad_final_BHM: Tensor | None,
    grad_ends_BEHM: Tensor | None,
    kept_BCH: Tensor,
    entering_BCHM: Tensor,
    grad_leaving_BCHM: Tensor,
    *,
    every: int = 1,
) -> tuple[Tensor, Tensor]:
    """Fill in `grad_leaving`; returns the gradients of log kept [B, C, H, K], in blocks, and of the initial state."""
    rows, chunks, heads, values = entering_BCHM.shape
    block = min(BLOCK, triton.next_power_of_2(values))
    blocks = triton.cdiv(values, block)
    grad_kept_BCHK = kept_BCH.new_empty(rows, chunks, heads, blocks)
    grad_initial_BHM = kept_BCH.new_empty(rows, heads, values)
    pass_states_backward_kernel[(rows * heads * blocks,)](
        grad_entering_BCHM,
        grad_final_BHM,
        grad_ends_BEHM,
        kept_BCH,
        entering_BCHM,
        grad_leaving_BCHM,
        grad_kept_BCHK,
        grad_initial_BHM,
        chunks,
        every,
        num_heads=heads,
        num_values=values,
        M=block,
        num_warps=2,
    )
    return grad_kept_BCHK, grad_initial_BHM


class StatePassing(torch.autograd.Function):
    """update [B, C, H, M], log_decay [B, C, H], initial [B, H, M] -> entering [B, C, H, M] and final [B, H, M]."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, log_decay: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.exp(log_decay.float()).contiguous()
        entering = torch.empty(update.shape, dtype=torch.float32, device=update.device)
        passed = pass_states(rows_of(update), kept, rows_of(initial), entering)
        ctx.save_for_backward(kept, entering)
        ctx.dtypes = update.dtype, log_decay.dtype, initial.dtype
        return entering, passed.final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        kept, entering = ctx.saved_tensors
        grad_entering, grad_final = (grad.contiguous() for grad in grad_outputs)
        update_dtype, log_decay_dtype, initial_dtype = ctx.dtypes
        grad_update = torch.empty_like(entering, dtype=update_dtype)
        grad_kept, grad_initial = pass_states_backward(
            grad_entering, grad_final, None, kept, entering, grad_update
        )
        return grad_update, grad_kept.sum(dim=-1).to(log_decay_dtype), grad_initial.to(initial_dtype)
