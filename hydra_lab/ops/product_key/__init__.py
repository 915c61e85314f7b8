"""Product-key memory: find the best of n1 x n2 keys by looking at n1 + n2 half-keys, and read their values.

Shape suffixes: B rows, L positions, H memory heads, K entries of the top-k, n half-keys of one side, d size of a
half-key.
"""

from torch import Tensor

from hydra_lab.ops.backend import Backend, implementation
from hydra_lab.ops.checks import check_shape

__all__ = ["memory_read", "product_key_topk"]


def product_key_topk(
    query_BLH2d: Tensor,
    keys1_Hnd: Tensor,
    keys2_Hnd: Tensor,
    *,
    top_k: int,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """The `top_k` keys with the largest `query[:d] . keys1[i1] + query[d:] . keys2[i2]`, among all n1 * n2 pairs.

    Source: Lample et al. 2019 (arXiv 1907.05242), section 3. The search is exact: a pair among the best `top_k` is made
    of halves that are each among the best `top_k` of their side. Scores are computed in float32 or better.

    Args:
        query_BLH2d: [B, L, H, 2 d] queries, the first half for `keys1_Hnd`.
        keys1_Hnd: [H, n1, d] half-keys.
        keys2_Hnd: [H, n2, d] half-keys.
        top_k: keys to return, 1..n1 * n2.
        backend: see `hydra_lab.ops.backend`; None for what `use_backend` says, else the fastest measured one.

    Returns:
        (addresses [B, L, H, top_k] int64 `i1 * n2 + i2`, scores [B, L, H, top_k] descending and differentiable).
        Among keys of equal score, which are returned and in which order is not defined.

    Raises:
        ValueError: shapes that do not fit, top_k out of range, or a backend that cannot run this.
    """
    check_shape("keys1_Hnd", keys1_Hnd, (None, None, None), "[H, n1, d]")
    heads, n1, half = keys1_Hnd.shape
    check_shape("keys2_Hnd", keys2_Hnd, (heads, None, half), "[H, n2, d]")
    check_shape("query_BLH2d", query_BLH2d, (None, None, heads, 2 * half), "[B, L, H, 2 d]")
    n2 = keys2_Hnd.shape[1]
    if not 1 <= top_k <= n1 * n2:
        raise ValueError(f"top_k must lie in 1..n1 * n2 = 1..{n1 * n2}, got {top_k}")
    run = implementation("product_key", backend, query_BLH2d).product_key_topk
    return run(query_BLH2d, keys1_Hnd, keys2_Hnd, top_k)


def memory_read(
    addresses: Tensor,
    weights: Tensor,
    values: Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """The weighted sum of the addressed values, over heads and entries.

    Args:
        addresses: [B, L, H, K] int64 rows of `values`.
        weights: [B, L, H, K] weight of each.
        values: [n1 * n2, Dv] the memory.
        backend: as in `product_key_topk`.

    Returns:
        [B, L, Dv] in the dtype of `values`.

    Raises:
        ValueError: shapes that do not fit, addresses that are not int64, or a backend that cannot run this.
    """
    check_shape("addresses", addresses, (None, None, None, None), "[B, L, H, K]")
    check_shape("weights", weights, tuple(addresses.shape), "[B, L, H, K]")
    check_shape("values", values, (None, None), "[n1 * n2, Dv]")
    if addresses.dtype.is_floating_point or addresses.dtype.itemsize != 8:
        raise ValueError(f"addresses must be int64, got {addresses.dtype}")
    return implementation("product_key", backend, values).memory_read(addresses, weights, values)
