# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# What `triton.jit` turns into kernels cannot be typed.
"""Selection of blocks in one kernel: scores are made tile by tile and never leave the registers.

Shape suffixes: T queries of a tile, N blocks of a tile, d channels, K places of the list of the best.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_lab.ops.sparse_attention.torch import block_means as block_means  # a single launch as it is
from hydra_lab.ops.topk_kernels import (
    LOWEST,
    REGISTERS,
    best_first,
    empty_list,
    index_of,
    is_candidate,
    keep_best,
    list_size,
    make_keys,
    rows_of_list,
    score_of,
)

_BLOCKS = 32
"""Block means N that are scored at once."""


@triton.jit(do_not_specialize=["num_queries", "num_blocks", "window", "block_size", "serves"])
def _select_kernel(
    q_ptr,
    means_ptr,
    start_ptr,  # None where all rows start at 0
    blocks_ptr,
    scores_ptr,
    num_queries,
    num_blocks,
    window,
    block_size,
    serves,
    q_row,
    q_query,
    q_head,
    means_row,
    means_block,
    means_head,
    num_key_heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    top_k: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
):
    """One program per (tile of queries, key-value head, row)."""
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    query_T = tile * T + tl.arange(0, T)
    start = tl.full((), 0, tl.int64)
    if start_ptr is not None:
        start = tl.load(start_ptr + row).to(tl.int64)
    position_T = start + query_T * serves
    completed_T = position_T // block_size  # blocks that were completed before the query's own began
    last_T = (
        position_T + serves - 1 - window
    )  # the last position outside of the window of the last token served
    some_query_T = query_T < num_queries

    q_ptr += row * q_row + head * group * q_head
    means_ptr += row * means_row + head * means_head
    best_TK = empty_list(T, K, top_k)
    last_query = tl.minimum(tile * T + T, num_queries) - 1
    end = tl.minimum((start + last_query * serves) // block_size, num_blocks).to(tl.int32)
    for first in range(0, end, N):
        block_N = first + tl.arange(0, N)
        score_TN = tl.zeros((T, N), tl.float32)
        for channel in range(0, head_size, D):
            channel_D = channel + tl.arange(0, D)
            in_head_D = channel_D < head_size
            q_TD = tl.zeros((T, D), tl.float32)
            member_ptr = q_ptr
            for _ in tl.static_range(group):  # the mean over the query heads may be taken before the product
                q_TD += tl.load(
                    member_ptr + query_T[:, None] * q_query + channel_D[None, :],
                    mask=some_query_T[:, None] & in_head_D[None, :],
                    other=0.0,
                ).to(tl.float32)
                member_ptr += q_head
            means_DN = tl.load(
                means_ptr + block_N[None, :].to(tl.int64) * means_block + channel_D[:, None],
                mask=(block_N < num_blocks)[None, :] & in_head_D[:, None],
                other=0.0,
            ).to(tl.float32)
            score_TN = tl.dot(q_TD / group, means_DN, score_TN, input_precision="ieee")
        candidate_TN = (
            (block_N[None, :] >= 1)
            & (block_N[None, :] < num_blocks)
            & (block_N[None, :] < completed_T[:, None])
            & (block_N[None, :].to(tl.int64) * block_size <= last_T[:, None])
            & some_query_T[:, None]
        )
        best_TK = keep_best(best_TK, tl.where(candidate_TN, make_keys(score_TN, block_N[None, :]), LOWEST))

    best_TK = best_first(best_TK, top_k)
    rank_K = tl.arange(0, K)
    place_TK = ((row * num_queries + query_T[:, None]) * num_key_heads + head) * top_k + rank_K[None, :]
    inside_TK = some_query_T[:, None] & (rank_K < top_k)[None, :]
    tl.store(blocks_ptr + place_TK, tl.where(is_candidate(best_TK), index_of(best_TK), -1), mask=inside_TK)
    tl.store(scores_ptr + place_TK, score_of(best_TK), mask=inside_TK)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    key_means: Tensor,
    *,
    start: Tensor | None,
    window: int,
    block_size: int,
    num_selected: int,
    serves: int,
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.sparse_attention.select_blocks`."""
    num_rows, num_queries, num_heads, head_size = q.shape
    num_blocks, num_key_heads = key_means.shape[1], key_means.shape[2]
    q, key_means = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, key_means))
    shape = (num_rows, num_queries, num_key_heads, num_selected)
    blocks = torch.empty(shape, dtype=torch.int64, device=q.device)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    if num_selected == 0:
        return blocks, scores
    T = rows_of_list(num_selected)
    _select_kernel[(triton.cdiv(num_queries, T), num_key_heads, num_rows)](
        q,
        key_means,
        start if start is None else start.contiguous(),
        blocks,
        scores,
        num_queries,
        num_blocks,
        window,
        block_size,
        serves,
        *q.stride()[:3],
        *key_means.stride()[:3],
        num_key_heads=num_key_heads,
        group=num_heads // num_key_heads,
        head_size=head_size,
        top_k=num_selected,
        T=T,
        N=_BLOCKS,
        D=16,
        K=list_size(num_selected),
        num_warps=4,
        maxnreg=REGISTERS,
    )
    return blocks, scores
