"""Fast path of `hydra_lab.ops.chunk_moe` on any device: sort the (token, expert) pairs, loop over experts.

Shape suffixes:

    B rows      L positions    C chunks              K experts per chunk
    E experts   D hidden size  F expert hidden size  N = B * L tokens
    P (token, rank) pairs that are computed; tokens past a row's length have none
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_lab.ops.bags import weighted_bag


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
    num_rows, num_positions, hidden_size = x.shape
    num_experts, top_k = w_gate_up.shape[0], experts.shape[2]
    position_L = torch.arange(num_positions, device=x.device)

    # Expert of every pair; the expert `num_experts`, which none is, stands for "no token".
    chunk_BL = ((offset[:, None] + position_L) // chunk_size).clamp(max=experts.shape[1] - 1)
    expert_BLK = experts.gather(1, chunk_BL[:, :, None].expand(-1, -1, top_k))
    expert_BLK = expert_BLK.masked_fill((position_L >= length[:, None])[:, :, None], num_experts)
    order = expert_BLK.flatten().argsort(stable=True)
    count_E = torch.bincount(expert_BLK.flatten(), minlength=num_experts + 1)[:num_experts]
    counts = cast(list[int], count_E.tolist())  # pyright: ignore[reportUnknownMemberType]
    num_pairs = sum(counts)

    # `F.embedding` and `weighted_bag` are the row gather and the weighted row sum whose backward passes
    # are fast on a CPU; those of indexing and index_add are not.
    x_ND = x.reshape(-1, hidden_size)
    x_PD = F.embedding(order[:num_pairs] // top_k, x_ND)
    outputs: list[Tensor] = []
    for expert_x_PD, gate_up_FD, down_DF in zip(
        torch.split(x_PD, counts), w_gate_up.unbind(), w_down.unbind(), strict=True
    ):
        if expert_x_PD.shape[0] > 0:
            gate_PF, up_PF = F.linear(expert_x_PD, gate_up_FD).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate_PF) * up_PF, down_DF))
    del x_PD
    # The last row, of zeros, is what pairs without a token read.
    dtype = outputs[0].dtype if outputs else x.dtype
    y_PD = torch.cat([*outputs, x.new_zeros(1, hidden_size, dtype=dtype)])
    outputs.clear()

    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=x.device)
    place_NK = place.clamp(max=num_pairs).view(-1, top_k)
    y_ND = weighted_bag(place_NK, y_PD, weights.reshape(-1, top_k))
    return y_ND.view(num_rows, num_positions, hidden_size).to(x.dtype)
