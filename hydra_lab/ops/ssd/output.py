"""What `ssd` returns, and the precision it computes in."""

from typing import NamedTuple

import torch
from torch import Tensor


class SSDOutput(NamedTuple):
    """Outputs and states of a state-space recurrence.

    Attributes:
        y: [B, L, H, P] outputs.
        final_state: [B, H, P, N] state after the last position.
        chunk_states: [B, C, H, P, N] state at the end of each chunk; the last one equals `final_state`.
    """

    y: Tensor
    final_state: Tensor
    chunk_states: Tensor


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32: states are never kept in half precision."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32
