"""Product keys by their halves: top-k of each side, then top-k of the pairs."""

import torch
from torch import Tensor

from hydra_lab.ops.bags import weighted_bag


def product_key_topk(
    query_BLH2d: Tensor, keys1_Hnd: Tensor, keys2_Hnd: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.product_key.product_key_topk`."""
    half = keys1_Hnd.shape[-1]
    # Half precision would make ties of distinct keys, so scores are computed in float32 even under autocast.
    with torch.autocast(query_BLH2d.device.type, enabled=False):
        query_BLH2d = query_BLH2d.to(torch.promote_types(query_BLH2d.dtype, torch.float32))
        scores1_BLHn = _half_scores(query_BLH2d[..., :half], keys1_Hnd)
        scores2_BLHn = _half_scores(query_BLH2d[..., half:], keys2_Hnd)
    with torch.no_grad():
        index1_BLHK, index2_BLHK = _best_pairs(scores1_BLHn, scores2_BLHn, top_k)
    scores_BLHK = scores1_BLHn.gather(-1, index1_BLHK) + scores2_BLHn.gather(-1, index2_BLHK)
    return index1_BLHK * keys2_Hnd.shape[1] + index2_BLHK, scores_BLHK


def _half_scores(query_BLHd: Tensor, keys_Hnd: Tensor) -> Tensor:
    """Scores of one side, [B, L, H, n]."""
    rows, length = query_BLHd.shape[:2]
    query_HBLd = query_BLHd.permute(2, 0, 1, 3).flatten(1, 2)
    scores_HBLn = query_HBLd @ keys_Hnd.to(query_BLHd.dtype).transpose(1, 2)
    return scores_HBLn.view(-1, rows, length, keys_Hnd.shape[1]).permute(1, 2, 0, 3)


def _best_pairs(scores1_BLHn: Tensor, scores2_BLHn: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Indices into either side of the `top_k` best pairs, best first."""
    best1, order1 = scores1_BLHn.topk(min(top_k, scores1_BLHn.shape[-1]), dim=-1)
    best2, order2 = scores2_BLHn.topk(min(top_k, scores2_BLHn.shape[-1]), dim=-1)
    # The pair of ranks (i, j) is no better than the (i + 1)(j + 1) - 1 other pairs of ranks up to i and j.
    device = scores1_BLHn.device
    rank1 = torch.arange(best1.shape[-1], device=device)
    rank2 = torch.arange(best2.shape[-1], device=device)
    rank1, rank2 = torch.nonzero((rank1[:, None] + 1) * (rank2 + 1) <= top_k, as_tuple=True)
    pairs_BLHK = (best1[..., rank1] + best2[..., rank2]).topk(top_k, dim=-1).indices
    return order1.gather(-1, rank1[pairs_BLHK]), order2.gather(-1, rank2[pairs_BLHK])


def memory_read(addresses: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """See `hydra_lab.ops.product_key.memory_read`."""
    rows, length = addresses.shape[:2]
    bags = addresses.flatten(0, 1).flatten(1)
    read = weighted_bag(bags, values, weights.flatten(0, 1).flatten(1))
    return read.view(rows, length, values.shape[1])
