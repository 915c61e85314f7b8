"""The state-space recurrence, one position after another."""

import torch
from torch import Tensor

from hydra_lab.ops.ssd.output import SSDOutput, effective_log_decay, state_dtype


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    state: Tensor,
    D: Tensor | None,
    log_decay_BH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step: `h = exp(dt A) h + dt x B^T`, `y = h C + D x`; `log_decay_BH` takes the place of `dt A`."""
    dtype = state_dtype(x_BHP, dt_BH, A_H, B_BGN, C_BGN, state)
    heads_per_group = x_BHP.shape[1] // B_BGN.shape[1]
    x, dt, A = x_BHP.to(dtype), dt_BH.to(dtype), A_H.to(dtype)
    B_BHN = B_BGN.to(dtype).repeat_interleave(heads_per_group, dim=1)
    C_BHN = C_BGN.to(dtype).repeat_interleave(heads_per_group, dim=1)
    decay = torch.exp(dt * A if log_decay_BH is None else log_decay_BH.to(dtype))[:, :, None, None]
    h = decay * state.to(dtype) + dt[:, :, None, None] * x[:, :, :, None] * B_BHN[:, :, None, :]
    y = (h * C_BHN[:, :, None, :]).sum(-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    return y.to(x_BHP.dtype), h


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
    """Every step in turn; the state is noted at the end of each chunk."""
    rows, length, heads, head_dim = x_BLHP.shape
    dtype = state_dtype(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, initial_state)
    h = x_BLHP.new_zeros(rows, heads, head_dim, B_BLGN.shape[-1], dtype=dtype)
    if initial_state is not None:
        h = initial_state.to(dtype)
    log_decay_BLH = effective_log_decay(dt_BLH, A_H, log_decay, starts, dtype)
    outputs: list[Tensor] = []
    at_ends: list[Tensor] = []
    for t in range(length):
        y, h = ssd_step(
            x_BLHP[:, t],
            dt_BLH[:, t],
            A_H,
            B_BLGN[:, t],
            C_BLGN[:, t],
            h,
            D,
            log_decay_BLH[:, t],
        )
        outputs.append(y)
        if (t + 1) % chunk_size == 0 or t == length - 1:
            at_ends.append(h)
    states_BCHPN = torch.stack(at_ends, dim=1)
    squares_BCH = states_BCHPN.detach().square().sum((-2, -1)) if squared_norms else None
    return SSDOutput(torch.stack(outputs, dim=1), h, squares_BCH, states_BCHPN if chunk_states else None)


def state_passing(update_BCHM: Tensor, log_decay_BCH: Tensor, initial_BHM: Tensor) -> tuple[Tensor, Tensor]:
    """Every chunk in turn: `M = exp(log_decay) M + update`."""
    dtype = state_dtype(update_BCHM, log_decay_BCH, initial_BHM)
    value_BHM = initial_BHM.to(dtype)
    entering: list[Tensor] = []
    for c in range(update_BCHM.shape[1]):
        entering.append(value_BHM)
        kept_BH1 = torch.exp(log_decay_BCH[:, c].to(dtype))[:, :, None]
        value_BHM = kept_BH1 * value_BHM + update_BCHM[:, c].to(dtype)
    return torch.stack(entering, dim=1), value_BHM
