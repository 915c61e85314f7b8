# pyright: basic, reportMissingImports=false
# (mamba-ssm is an optional extra, for GPUs, and without types)
"""The state-space recurrence on the kernels of an installed mamba-ssm.

Written from the source of mamba-ssm 2.3.2.post1: `mamba_ssm/ops/triton/ssd_combined.py`
(`_mamba_chunk_scan_combined_fwd` and `_bwd`, which hand out the states between chunks) and `selective_state_update.py`.

It runs on `dt A` alone, so an edited `log_decay` is refused. States between chunks come in the precision of C, and so
are `squared_norms` and `chunk_states`, except after the last chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_lab.ops.ssd.output import SSDOutput

CHUNK_SIZES = (16, 32, 64, 128, 256)
"""Its kernels and their tests know powers of two, and its matrix products need 16 rows."""


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    squared_norms: bool,
    chunk_states: bool,
) -> SSDOutput:
    """See `hydra_lab.ops.ssd.ssd`.

    Raises:
        ValueError: a `log_decay` is given, or a chunk size that mamba-ssm does not have; in the backward pass, if a
            gradient arrives through `chunk_states`.
    """
    if log_decay is not None:
        raise ValueError(
            "backend 'mamba_ssm' computes the decay as dt A and takes no log_decay (an edited decay): "
            "use backend='triton' or 'torch'"
        )
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(
            f"backend 'mamba_ssm' has chunks of {', '.join(map(str, CHUNK_SIZES))}, not of {chunk_size}"
        )
    inputs = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, initial_state)
    if x_BLHP.shape[1] == 1 and starts is None and not _wants_gradient(*inputs):  # decoding
        if initial_state is None:
            initial_state = x_BLHP.new_zeros(*x_BLHP[:, 0].shape, B_BLGN.shape[-1], dtype=torch.float32)
        at_0 = (x_BLHP[:, 0], dt_BLH[:, 0], A_H, B_BLGN[:, 0], C_BLGN[:, 0])
        y_BHP, state = ssd_step(*at_0, initial_state, D)
        squares_BH = state.square().sum(dim=(-2, -1)) if squared_norms else None
        return SSDOutput(
            y_BHP.unsqueeze(1),
            state,
            None if squares_BH is None else squares_BH.unsqueeze(1),
            state.unsqueeze(1) if chunk_states else None,
        )
    # A document is a run of equal numbers; the initial state belongs to number 0.
    documents_BL = None if starts is None else starts.cumsum(dim=1, dtype=torch.int32)
    return SSDOutput(*_Scan.apply(*inputs, documents_BL, chunk_size, squared_norms, chunk_states))


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Scan(torch.autograd.Function):
    """Arguments as those of `ssd`, documents [B, L] int32 or None -> y, final state, squared norms, chunk states."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        documents: Tensor | None,
        chunk_size: int,
        squared_norms: bool,
        chunk_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd

        out, _, _, _, entering_BCHPN, final_BHPN = _mamba_chunk_scan_combined_fwd(
            x, dt, A, B, C, chunk_size, D=D, initial_states=initial, seq_idx=documents
        )
        ctx.save_for_backward(x, dt, A, B, C, D, initial, documents, out)
        ctx.chunk_size = chunk_size
        ctx.set_materialize_grads(False)
        squares_BCH = states_BCHPN = None
        if squared_norms:
            ends = torch.linalg.vector_norm(entering_BCHPN[:, 1:], dim=(-2, -1), dtype=torch.float32)
            last = torch.linalg.vector_norm(final_BHPN, dim=(-2, -1)).unsqueeze(1)
            squares_BCH = torch.cat([ends, last], dim=1).square()
            ctx.mark_non_differentiable(squares_BCH)
        if chunk_states:
            states_BCHPN = torch.cat([entering_BCHPN[:, 1:].float(), final_BHPN.unsqueeze(1)], dim=1)
        return out, final_BHPN, squares_BCH, states_BCHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd

        x, dt, A, B, C, D, initial, documents, out = ctx.saved_tensors
        grad_y, grad_final, _, grad_states = grad_outputs
        if grad_states is not None:
            raise ValueError(
                "backend 'mamba_ssm' has no gradient through chunk_states: use backend='triton' or 'torch'"
            )
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, _, _, grad_initial = _mamba_chunk_scan_combined_bwd(
            torch.zeros_like(out) if grad_y is None else grad_y,
            x,
            dt,
            A,
            B,
            C,
            out,
            ctx.chunk_size,
            D=D,
            initial_states=initial,
            dfinal_states=grad_final,
            seq_idx=documents,
        )
        grads = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_initial)
        inputs = (x, dt, A, B, C, D, initial)
        cast = (None if grad is None else grad.to(of.dtype) for grad, of in zip(grads, inputs, strict=True))
        return *cast, None, None, None, None


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, state: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.ssd.ssd_step`.

    Raises:
        ValueError: a gradient would be wanted: mamba-ssm's step has none.
    """
    if _wants_gradient(x_BHP, dt_BH, A_H, B_BGN, C_BGN, state, D):
        raise ValueError(
            "backend 'mamba_ssm' has a step without a gradient: call it under torch.no_grad(), or use "
            "backend='triton' or 'torch'"
        )
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    rows, heads, head_dim = x_BHP.shape
    new_state = state.to(torch.float32, copy=True)  # it is updated in place
    skip_H = torch.zeros_like(A_H) if D is None else D
    y_BHP = selective_state_update(
        new_state,
        x_BHP,
        # Values that all entries of a head share come as views of stride 0, by which it knows them.
        dt_BH[..., None].expand(rows, heads, head_dim),
        A_H[:, None, None].expand(heads, head_dim, state.shape[-1]),
        B_BGN,
        C_BGN,
        skip_H[:, None].expand(heads, head_dim),
        dt_bias=torch.zeros_like(A_H)[:, None].expand(heads, head_dim),  # it has no path without one
    )
    return y_BHP, new_state
