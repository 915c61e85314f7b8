"""The workspace read as one small matrix product per chunk."""

import torch
from torch import Tensor

from hydra_lab.chunks import ChunkGrid, Span


def workspace_read(
    address_BLS: Tensor, gate_BL1: Tensor, slots_BCSV: Tensor, *, chunk_size: int, offset: Tensor | None
) -> Tensor:
    """See `hydra_lab.ops.workspace.workspace_read`."""
    num_rows, length = address_BLS.shape[:2]
    grid = ChunkGrid(Span(length, offset), chunk_size, num_rows, address_BLS.device)
    slots_BCSV = slots_BCSV[:, : grid.num_chunks]
    address_BCTS = grid.to_grid(address_BLS).to(slots_BCSV.dtype)
    value_BLV = grid.from_grid(torch.einsum("bcts,bcsv->bctv", address_BCTS, slots_BCSV))
    return value_BLV * gate_BL1.to(value_BLV.dtype)
