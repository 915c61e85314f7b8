"""Oracle of `hydra_lab.ops.chunk_moe`: one token and one expert at a time, as in the equation."""

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    chunk_size: int,
    offset: Tensor,
    length: Tensor,
) -> Tensor:
    """See `hydra_lab.ops.chunk_moe.chunk_moe`."""
    rows: list[Tensor] = []
    for b in range(x.shape[0]):
        outputs: list[Tensor] = []
        for t in range(x.shape[1]):
            y_D = torch.zeros_like(x[b, t])
            if t < int(length[b]):
                chunk = (int(offset[b]) + t) // chunk_size
                for k in range(experts.shape[2]):
                    e = int(experts[b, chunk, k])
                    gate_F, up_F = (w_gate_up[e] @ x[b, t]).chunk(2)
                    y_D = y_D + weights[b, t, k] * (w_down[e] @ (F.silu(gate_F) * up_F))
            outputs.append(y_D)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)
