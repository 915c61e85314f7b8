"""Product keys by brute force: every one of the n1 * n2 keys is scored."""

import torch
from torch import Tensor


def product_key_topk(
    query_BLH2d: Tensor, keys1_Hnd: Tensor, keys2_Hnd: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Write out all keys `[keys1[i1] ; keys2[i2]]`, score them, sort."""
    heads, n1, half = keys1_Hnd.shape
    n2 = keys2_Hnd.shape[1]
    first = keys1_Hnd[:, :, None, :].expand(heads, n1, n2, half)
    second = keys2_Hnd[:, None, :, :].expand(heads, n1, n2, half)
    keys_HAk = torch.cat([first, second], dim=-1).flatten(1, 2)  # A = n1 * n2 addresses
    scores_BLHA = torch.einsum("blhk,hak->blha", query_BLH2d, keys_HAk)
    scores, addresses = torch.sort(scores_BLHA, dim=-1, descending=True, stable=True)
    return addresses[..., :top_k], scores[..., :top_k]


def memory_read(addresses: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Gather the addressed rows, weight them, add them up."""
    return (weights.to(values.dtype)[..., None] * values[addresses]).sum(dim=(2, 3))
