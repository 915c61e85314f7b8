# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# What `triton.jit` turns into kernels cannot be typed.
"""The search for product keys in one kernel: both sides, then the pairs, all in registers.

Shape suffixes: R = B * L tokens, H memory heads, n half-keys of one side, d size of a half-key; T tokens of a tile, N
half-keys of a tile, K places of a list of the best (see `hydra_lab.ops.topk_kernels`).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_lab.ops.product_key.bag_kernels import add_to_rows, read_rows
from hydra_lab.ops.product_key.bag_kernels import memory_read as memory_read
from hydra_lab.ops.topk_kernels import (
    LOWEST,
    REGISTERS,
    best_first,
    candidates_of,
    empty_list,
    index_of,
    is_candidate,
    keep_best,
    list_size,
    make_keys,
    rows_of_list,
    score_of,
)

_HALF_KEYS = 32
"""Half-keys N that are scored at once."""


@triton.jit
def _best_of_side(
    query_ptr,
    query_token,
    keys_ptr,
    keys_row,
    num_keys,
    token_T,
    some_token_T,
    half: tl.constexpr,
    top_k: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
):
    """[T, K] list of the best half-keys of one side."""
    best_TK = empty_list(T, K, top_k)
    for first in range(0, num_keys, N):
        key_N = first + tl.arange(0, N)
        some_key_N = key_N < num_keys
        score_TN = tl.zeros((T, N), tl.float32)
        for channel in range(0, half, D):
            channel_D = channel + tl.arange(0, D)
            in_half_D = channel_D < half
            query_TD = tl.load(
                query_ptr + token_T[:, None] * query_token + channel_D[None, :],
                mask=some_token_T[:, None] & in_half_D[None, :],
                other=0.0,
            ).to(tl.float32)
            keys_DN = tl.load(
                keys_ptr + key_N[None, :].to(tl.int64) * keys_row + channel_D[:, None],
                mask=some_key_N[None, :] & in_half_D[:, None],
                other=0.0,
            ).to(tl.float32)
            score_TN = tl.dot(query_TD, keys_DN, score_TN, input_precision="ieee")
        candidate_TN = some_key_N[None, :] & some_token_T[:, None]
        best_TK = keep_best(best_TK, tl.where(candidate_TN, make_keys(score_TN, key_N[None, :]), LOWEST))
    return candidates_of(best_TK, top_k)


@triton.jit
def _pair_keys(first_T, second_TK, n2):
    """Keys of the pairs of one half-key of the first side and all those listed of the second, by address."""
    score_TK = score_of(first_T)[:, None] + score_of(second_TK)
    address_TK = index_of(first_T)[:, None] * n2 + index_of(second_TK)
    both_TK = is_candidate(first_T)[:, None] & is_candidate(second_TK)
    return tl.where(both_TK, make_keys(score_TK, address_TK.to(tl.int32)), LOWEST)


@triton.jit(do_not_specialize=["num_tokens", "n1", "n2"])
def _search_kernel(
    query_ptr,
    keys1_ptr,
    keys2_ptr,
    addresses_ptr,
    scores_ptr,
    num_tokens,
    n1,
    n2,
    query_token,
    query_head,
    keys1_head,
    keys1_row,
    keys2_head,
    keys2_row,
    heads: tl.constexpr,
    half: tl.constexpr,
    top_k: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
):
    """One program per (tile of tokens, head)."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    token_T = (tl.program_id(0) // heads).to(tl.int64) * T + tl.arange(0, T)
    some_token_T = token_T < num_tokens
    query_ptr += head * query_head
    keys1_ptr += head * keys1_head
    keys2_ptr += head * keys2_head
    best1_TK = _best_of_side(
        query_ptr, query_token, keys1_ptr, keys1_row, n1, token_T, some_token_T, half, top_k, T, N, D, K
    )
    best2_TK = _best_of_side(
        query_ptr + half,
        query_token,
        keys2_ptr,
        keys2_row,
        n2,
        token_T,
        some_token_T,
        half,
        top_k,
        T,
        N,
        D,
        K,
    )

    # The i-th best half of side 1 with every listed half of side 2. Few of those pairs beat the worst pair kept:
    # with i and j counted from 1, the pair (i, j) comes after the i j - 1 pairs of ranks up to i and j.
    rank_K = tl.arange(0, K)
    best_TK = empty_list(T, K, top_k)
    for _ in range(0, top_k):
        first_T = tl.max(best1_TK, axis=1)
        best1_TK = tl.where(best1_TK == first_T[:, None], LOWEST, best1_TK)
        best_TK = keep_best(best_TK, _pair_keys(first_T, best2_TK, n2))

    best_TK = best_first(best_TK, top_k)
    place_TK = (token_T[:, None] * heads + head) * top_k + rank_K[None, :]
    inside_TK = some_token_T[:, None] & (rank_K < top_k)[None, :]
    # Scores of -inf or NaN are no candidates; an address in their place must still be one.
    address_TK = tl.where(is_candidate(best_TK), index_of(best_TK), rank_K.to(tl.int64)[None, :])
    tl.store(addresses_ptr + place_TK, address_TK, mask=inside_TK)
    tl.store(scores_ptr + place_TK, score_of(best_TK), mask=inside_TK)


def product_key_topk(
    query_BLH2d: Tensor, keys1_Hnd: Tensor, keys2_Hnd: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.product_key.product_key_topk`."""
    num_addresses = keys1_Hnd.shape[1] * keys2_Hnd.shape[1]
    if num_addresses >= 1 << 31:
        raise ValueError(f"backend 'triton' takes fewer than 2**31 keys, got {num_addresses}")
    apply = cast(Callable[..., Any], _Search.apply)  # pyright: ignore[reportUnknownMemberType]
    return apply(query_BLH2d, keys1_Hnd, keys2_Hnd, top_k)


class _Search(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BLH2d: Tensor, keys1_Hnd: Tensor, keys2_Hnd: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        rows, length, heads, _ = query_BLH2d.shape
        num_tokens, n1, half = rows * length, *keys1_Hnd.shape[1:]
        query_RHq = query_BLH2d.reshape(num_tokens, heads, 2 * half)
        query_RHq, keys1_Hnd, keys2_Hnd = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (query_RHq, keys1_Hnd, keys2_Hnd)
        )
        shape = (rows, length, heads, top_k)
        addresses = torch.empty(shape, dtype=torch.int64, device=query_BLH2d.device)
        scores = torch.empty(shape, dtype=torch.float32, device=query_BLH2d.device)
        if num_tokens > 0:
            T = rows_of_list(top_k)
            _search_kernel[(triton.cdiv(num_tokens, T) * heads,)](
                query_RHq,
                keys1_Hnd,
                keys2_Hnd,
                addresses,
                scores,
                num_tokens,
                n1,
                keys2_Hnd.shape[1],
                *query_RHq.stride()[:2],
                *keys1_Hnd.stride()[:2],
                *keys2_Hnd.stride()[:2],
                heads=heads,
                half=half,
                top_k=top_k,
                T=T,
                N=_HALF_KEYS,
                D=16,
                K=list_size(top_k),
                num_warps=4,
                maxnreg=REGISTERS,
            )
        ctx.save_for_backward(query_RHq, keys1_Hnd, keys2_Hnd, addresses)
        ctx.mark_non_differentiable(addresses)
        ctx.set_materialize_grads(False)
        return addresses, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        query_RHq, keys1_Hnd, keys2_Hnd, addresses = ctx.saved_tensors
        d_scores: Tensor | None = grad_outputs[1]
        if d_scores is None:
            return None, None, None, None
        num_tokens, heads, _ = query_RHq.shape
        half, n2 = keys1_Hnd.shape[2], keys2_Hnd.shape[1]
        head_H1 = torch.arange(heads, device=addresses.device)[:, None]
        d_scores_RHK = d_scores.reshape(num_tokens, heads, -1).contiguous()
        address_RHK = addresses.view(d_scores_RHK.shape)
        d_query_RHq = None
        if ctx.needs_input_grad[0]:
            d_query_RHq = torch.empty(query_RHq.shape, dtype=query_RHq.dtype, device=query_RHq.device)
        d_keys: list[Tensor | None] = []
        sides = (keys1_Hnd, address_RHK // n2), (keys2_Hnd, address_RHK % n2)
        for side, (keys_Hnd, index_RHK) in enumerate(sides):
            # All heads' half-keys as one table, a bag of whose rows each token and head chose.
            row_NK = (index_RHK + head_H1 * keys_Hnd.shape[1]).flatten(0, 1)
            weight_NK = d_scores_RHK.flatten(0, 1)
            channels = slice(side * half, (side + 1) * half)
            if d_query_RHq is not None:
                table = keys_Hnd.reshape(-1, half)
                read_rows(row_NK, weight_NK, table, out=d_query_RHq[..., channels].flatten(0, 1))
            d_keys.append(None)
            if ctx.needs_input_grad[1 + side]:
                d_table = torch.zeros_like(keys_Hnd, memory_format=torch.contiguous_format)
                source_Nd = query_RHq[..., channels].flatten(0, 1)
                add_to_rows(row_NK, weight_NK, source_Nd, out=d_table.view(-1, half))
                d_keys[-1] = d_table
        shape = (*addresses.shape[:3], 2 * half)
        return None if d_query_RHq is None else d_query_RHq.view(shape), *d_keys, None
