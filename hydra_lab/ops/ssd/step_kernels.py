# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (what `triton.jit` turns into kernels cannot be typed)
"""A single step of the recurrence in one launch: what decoding runs for each token.

Shape suffixes: B rows, H heads, G groups, P head dimension, N state dimension, K blocks of P.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_lab.ops.ssd.chunk_kernels import LOG2_E
from hydra_lab.ops.ssd.state_kernels import rows_of

BLOCK = 2048
"""Values of a state that one program updates."""


@triton.jit
def step_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    log_decay_ptr,  # None for dt A
    B_ptr,
    C_ptr,
    D_ptr,  # None for no skip
    state_ptr,  # None for zeros
    y_ptr,
    new_state_ptr,
    squares_ptr,  # None where nobody asked for them
    x_row,
    x_head,
    dt_row,
    dt_head,
    log_decay_row,
    log_decay_head,
    B_row,
    B_group,
    C_row,
    C_group,
    state_row,
    state_head,
    state_p,
    num_heads: tl.constexpr,
    num_groups: tl.constexpr,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """h = exp(log decay) h + dt x B^T, y = h C + D x, and the sum of h's squares over this block [B, H, K].

    One program per (row and head, block of the head dimension); it holds all N values of its rows of the state.
    """
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // num_heads, row_head % num_heads
    group = head // (num_heads // num_groups)
    p = tl.program_id(1) * P + tl.arange(0, P)
    n = tl.arange(0, N)
    is_p, is_n = p < head_dim, n < state_dim
    inside = is_p[:, None] & is_n[None, :]
    dt = tl.load(dt_ptr + row * dt_row + head * dt_head).to(tl.float32)
    if log_decay_ptr is None:
        log_decay = dt * tl.load(A_ptr + head).to(tl.float32)
    else:
        log_decay = tl.load(log_decay_ptr + row * log_decay_row + head * log_decay_head).to(tl.float32)
    x = tl.load(x_ptr + row * x_row + head * x_head + p, mask=is_p, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + row * B_row + group * B_group + n, mask=is_n, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + row * C_row + group * C_group + n, mask=is_n, other=0.0).to(tl.float32)
    state = (dt * x)[:, None] * B[None, :]
    if state_ptr is not None:
        state_at = row * state_row + head * state_head + p.to(tl.int64)[:, None] * state_p + n[None, :]
        before = tl.load(state_ptr + state_at, mask=inside, other=0.0).to(tl.float32)
        state += tl.exp2(log_decay * LOG2_E) * before
    new_state_at = row_head * head_dim * state_dim + p[:, None] * state_dim + n[None, :]
    tl.store(new_state_ptr + new_state_at, state, mask=inside)
    y = tl.sum(state * C[None, :], axis=1)
    if D_ptr is not None:
        y += tl.load(D_ptr + head).to(tl.float32) * x
    tl.store(y_ptr + row_head * head_dim + p, y, mask=is_p)
    if squares_ptr is not None:
        squares_at = row_head * tl.num_programs(1) + tl.program_id(1)
        tl.store(squares_ptr + squares_at, tl.sum(tl.sum(state * state, axis=1), axis=0))


class Step(torch.autograd.Function):
    """One position: x [B, H, P], dt [B, H], A [H], B and C [B, G, N], state [B, H, P, N] or None for zeros, D [H] or
    None, log_decay [B, H] or None for dt A -> y [B, H, P], new state, its squared norms [B, H] if asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor | None,
        D: Tensor | None,
        log_decay: Tensor | None,
        squared_norms: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, heads, head_dim = x.shape
        groups, state_dim = B.shape[1:]
        ctx.save_for_backward(x, dt, A, B, C, state, D, log_decay)
        ctx.set_materialize_grads(False)
        x, A, B, C = rows_of(x), A.contiguous(), rows_of(B), rows_of(C)
        state = None if state is None else rows_of(state)
        N = triton.next_power_of_2(state_dim)
        P = max(1, min(triton.next_power_of_2(head_dim), BLOCK // N))
        blocks = triton.cdiv(head_dim, P)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        new_state = x.new_empty(rows, heads, head_dim, state_dim, dtype=torch.float32)
        squares_BHK = x.new_empty(rows, heads, blocks, dtype=torch.float32) if squared_norms else None
        step_kernel[(rows * heads, blocks)](
            x,
            dt,
            A,
            log_decay,
            B,
            C,
            None if D is None else D.contiguous(),
            state,
            y,
            new_state,
            squares_BHK,
            *x.stride()[:2],
            *dt.stride(),
            *((0, 0) if log_decay is None else log_decay.stride()),
            *B.stride()[:2],
            *C.stride()[:2],
            *((0, 0, 0) if state is None else state.stride()[:3]),
            num_heads=heads,
            num_groups=groups,
            head_dim=head_dim,
            state_dim=state_dim,
            P=P,
            N=N,
            num_warps=4,
        )
        squares = None if squares_BHK is None else squares_BHK.sum(dim=-1)
        if squares is not None:
            ctx.mark_non_differentiable(squares)
        return y, new_state, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The formulas as they stand, in torch: a single step is trained on by nobody who is in a hurry."""
        inputs = ctx.saved_tensors
        grad_y, grad_state, _ = grad_outputs
        with torch.autocast(inputs[0].device.type, enabled=False):
            x, dt, A, B, C = (tensor.float() for tensor in inputs[:5])
            state, D, log_decay = (None if tensor is None else tensor.float() for tensor in inputs[5:])
            rows, heads, head_dim = x.shape
            groups, state_dim = B.shape[1:]
            by_group = (rows, groups, heads // groups, head_dim)
            grad_y = torch.zeros_like(x) if grad_y is None else grad_y.float()
            B_BHN = B.repeat_interleave(heads // groups, dim=1)
            C_BHN = C.repeat_interleave(heads // groups, dim=1)
            grad_h = grad_y[..., None] * C_BHN[:, :, None]
            if grad_state is not None:
                grad_h = grad_h + grad_state
            decayed = torch.zeros_like(grad_h)
            decay_BH = torch.exp(dt * A if log_decay is None else log_decay)
            if state is not None:
                decayed = decay_BH[..., None, None] * state
            h = decayed + (dt[..., None] * x)[..., None] * B_BHN[:, :, None]
            grad_decay_BH = (grad_h * decayed).sum((-2, -1))
            grad_dt_x = (grad_h * B_BHN[:, :, None]).sum(-1)
            grad_x = dt[..., None] * grad_dt_x
            grad_dt = (x * grad_dt_x).sum(-1)
            grad_A = grad_D = grad_log_decay = None
            if log_decay is None:
                grad_A, grad_dt = (grad_decay_BH * dt).sum(0), grad_dt + grad_decay_BH * A
            else:
                grad_log_decay = grad_decay_BH
            if D is not None:
                grad_x, grad_D = grad_x + D[:, None] * grad_y, (grad_y * x).sum((0, 2))
            matrices = (*by_group, state_dim)
            grad_B = (grad_h.view(matrices) * (dt[..., None] * x).view(*by_group, 1)).sum((2, 3))
            grad_C = (h.view(matrices) * grad_y.reshape(*by_group, 1)).sum((2, 3))
            grad_before = None if state is None else decay_BH[..., None, None] * grad_h
        grads = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_before, grad_D, grad_log_decay)
        cast = (None if grad is None else grad.to(of.dtype) for grad, of in zip(grads, inputs, strict=True))
        return *cast, None
