"""What a written state changes: the recurrence is linear, so an edit travels beside the states as a difference.

D_c  = written_c - measured_c                 where a state was written at the end of chunk c
D_c  = exp(log decay over c) D_{c-1}          where none was
y_t += C_t . (exp(log decay of c up to t) D_{c-1})        for the tokens t of chunk c
"""

import torch
from torch import Tensor

from hydra_lab.chunks import ChunkGrid


def carry(
    y_BLHP: Tensor,
    measured_BCHPN: Tensor,
    written_BCHPN: Tensor,
    C_BLGN: Tensor,
    decay_BLH: Tensor,
    scale_BCH: Tensor | None,
    grid: ChunkGrid,
) -> tuple[Tensor, Tensor]:
    """What states written at the chunks' ends change from there on.

    A head's state counts as written where any of its numbers differs from what was measured; a chunk that was not
    written hands on what the earlier edits made of its state.

    Args:
        decay_BLH: [B, L, H] log decay at each token.
        scale_BCH: factor on the states that leave each chunk, or None.

    Returns:
        (y [B, L, H, P], what is added to the state after the last token [B, H, P, N]).
    """
    difference_BCHPN = written_BCHPN - measured_BCHPN
    is_written_BCH = (written_BCHPN != measured_BCHPN).flatten(-2).any(dim=-1)
    decay_BCTH = grid.to_grid(decay_BLH).cumsum(dim=2)
    decayed_BCTH = decay_BCTH.exp()
    carried_BHPN = torch.zeros_like(difference_BCHPN[:, 0])
    entering: list[Tensor] = []
    for chunk in range(grid.num_chunks):
        entering.append(carried_BHPN)
        kept_BH = decayed_BCTH[:, chunk, -1]
        if scale_BCH is not None:
            kept_BH = kept_BH * scale_BCH[:, chunk]
        carried_BHPN = torch.where(
            is_written_BCH[:, chunk, :, None, None],
            difference_BCHPN[:, chunk],
            kept_BH[..., None, None] * carried_BHPN,
        )
    read_BCTHN = grid.to_grid(_per_head(C_BLGN, y_BLHP.shape[2])).float()
    added = torch.einsum("bchpn,bcthn,bcth->bcthp", torch.stack(entering, dim=1), read_BCTHN, decayed_BCTH)
    return y_BLHP + grid.from_grid(added).to(y_BLHP.dtype), carried_BHPN


def read_out(
    y_BLHP: Tensor, measured_BCHPN: Tensor, written_BCHPN: Tensor, C_BLGN: Tensor, grid: ChunkGrid
) -> Tensor:
    """`y` where the last token of each chunk reads the written state instead of the measured one."""
    read_BCTHN = grid.to_grid(_per_head(C_BLGN, y_BLHP.shape[2])).float()
    added = torch.einsum("bchpn,bcthn->bcthp", written_BCHPN - measured_BCHPN, read_BCTHN)
    later_BCT = grid.present_BCT.flip(2).cumsum(dim=2).flip(2)
    is_last_BCT = grid.present_BCT & (later_BCT == 1)
    added = torch.where(is_last_BCT[..., None, None], added, 0.0)
    return y_BLHP + grid.from_grid(added).to(y_BLHP.dtype)


def _per_head(C_BLGN: Tensor, num_heads: int) -> Tensor:
    """[B, L, H, N]: what each head reads its state with."""
    return C_BLGN.repeat_interleave(num_heads // C_BLGN.shape[2], dim=2)
