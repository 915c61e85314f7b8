"""The workspace read, one token after another."""

import torch
from torch import Tensor


def workspace_read(
    address_BLS: Tensor, gate_BL1: Tensor, slots_BCSV: Tensor, *, chunk_size: int, offset: Tensor | None
) -> Tensor:
    """Each token's weights times the slots of its chunk."""
    rows: list[Tensor] = []
    for b in range(slots_BCSV.shape[0]):
        first = 0 if offset is None else int(offset[b])
        reads = [slots_BCSV.new_zeros(0, slots_BCSV.shape[3])]
        for t in range(address_BLS.shape[1]):
            slots_SV = slots_BCSV[b, (first + t) // chunk_size]
            address_S = address_BLS[b, t].to(slots_SV.dtype)
            reads.append((gate_BL1[b, t].to(slots_SV.dtype) * (address_S @ slots_SV))[None])
        rows.append(torch.cat(reads))
    return torch.stack(rows)
