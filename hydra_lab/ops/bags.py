"""The weighted sum of rows that several torch paths end in."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_bag(index_NK: Tensor, rows_RD: Tensor, weights_NK: Tensor) -> Tensor:
    """[N, D] sum over k of `weights[n, k] rows[index[n, k]]`, in the dtype of the rows.

    `F.embedding_bag` is fast both ways and keeps no [N, K, D], but on CUDA it has no gradient of bfloat16 weights:
    there the rows are gathered.
    """
    weights_NK = weights_NK.to(rows_RD.dtype)
    gathered = rows_RD.is_cuda and rows_RD.dtype == torch.bfloat16 and weights_NK.requires_grad
    if gathered and torch.is_grad_enabled():
        return (weights_NK[:, None] @ F.embedding(index_NK, rows_RD))[:, 0]
    return F.embedding_bag(index_NK, rows_RD, per_sample_weights=weights_NK, mode="sum")
