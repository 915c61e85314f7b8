"""What `ssd` returns, the precision it computes in, and the decay that it runs on."""

from typing import NamedTuple

import torch
from torch import Tensor


class SSDOutput(NamedTuple):
    """Outputs and states of a state-space recurrence.

    Attributes:
        y: [B, L, H, P] outputs.
        final_state: [B, H, P, N] state after the last position.
        squared_norms: [B, C, H] squared Frobenius norm of each head's state at the end of each chunk, without a
            gradient; None unless asked for.
        chunk_states: [B, C, H, P, N] state at the end of each chunk, the last one equal to `final_state`; None unless
            asked for.
    """

    y: Tensor
    final_state: Tensor
    squared_norms: Tensor | None
    chunk_states: Tensor | None


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32: states are never kept in half precision."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def effective_log_decay(
    dt_BLH: Tensor, A_H: Tensor, log_decay: Tensor | None, starts: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[B, L, H] logarithm of what is kept of the state at each position: -inf where a document starts, else
    `log_decay` if given, else `dt A`."""
    decay_BLH = dt_BLH.to(dtype) * A_H.to(dtype) if log_decay is None else log_decay.to(dtype)
    return decay_BLH if starts is None else decay_BLH.masked_fill(starts[..., None], float("-inf"))
