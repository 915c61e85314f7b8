"""Causal attention over a sliding window, a sink block and selected earlier blocks, and their choice."""

from torch import Tensor, int64

from hydra_lab.ops.backend import Backend, implementation
from hydra_lab.ops.checks import assert_on_device, check_shape
from hydra_lab.ops.sparse_attention.output import AttentionOutput

__all__ = ["AttentionOutput", "block_means", "select_blocks", "sparse_attention"]


def block_means(k: Tensor, *, block_size: int, backend: Backend | None = None) -> Tensor:
    """Mean key of each completed block, the summary that queries select blocks by.

    Args:
        k: [B, Lk, Hkv, d] keys at positions 0 .. Lk-1 of each row.
        block_size: tokens per block.
        backend: see `hydra_lab.ops.backend`; None for what `use_backend` says, else the fastest measured one.

    Returns:
        [B, Lk // block_size, Hkv, d]. The means of blocks that reach past a row's tokens are garbage;
        `select_blocks` never chooses them.

    Raises:
        ValueError: a shape or an option does not fit.
    """
    check_shape("k", k, (None, None, None, None), "[B, Lk, Hkv, d]")
    _at_least_one(block_size=block_size)
    return implementation("select_blocks", backend, k).block_means(k, block_size=block_size)


def select_blocks(
    q: Tensor,
    key_means: Tensor,
    *,
    start: Tensor | None = None,
    window: int,
    block_size: int,
    num_selected: int,
    serves: int = 1,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Top-k earlier blocks of each query by the score `query . mean(key)`. Not differentiable.

    The score is averaged over the query heads of a key-value head. Candidates of a query at position t are
    the blocks j >= 1 (block 0 is the sink, which every query sees) that were completed before t's own block
    began, `j < t // block_size`, and that reach out of the window of the last token served,
    `j * block_size <= t + serves - 1 - window`. So no key after t decides.

    Args:
        q: [B, Lq, Hq, d] queries at positions `start[b] + i * serves`; Hq is a multiple of Hkv.
        key_means: [B, NB, Hkv, d] from `block_means`.
        start: [B] position of each row's first query; None for 0.
        window: keys that a query sees in its window, itself included.
        block_size: tokens per block.
        num_selected: K, blocks per query; may be 0.
        serves: tokens for which each query selects (its own and those up to the next query).
        backend: see `hydra_lab.ops.backend`; None for what `use_backend` says, else the fastest measured one.

    Returns:
        (blocks [B, Lq, Hkv, K] int64, best first, the lower index first where scores tie, -1 where fewer
        qualify; scores of the same shape, fp32, -inf where the block is -1).

    Raises:
        ValueError: a shape or an option does not fit.
    """
    check_shape("key_means", key_means, (q.shape[0], None, None, q.shape[-1]), "[B, NB, Hkv, d]")
    _check_queries(q, start, key_means.shape[2])
    _at_least_one(window=window, block_size=block_size, serves=serves)
    if num_selected < 0:
        raise ValueError(f"num_selected must be at least 0, got {num_selected}")
    return implementation("select_blocks", backend, q).select_blocks(
        q,
        key_means,
        start=start,
        window=window,
        block_size=block_size,
        num_selected=num_selected,
        serves=serves,
    )


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    start: Tensor | None = None,
    window: int,
    block_size: int,
    scale: float | None = None,
    mass: bool = False,
    backend: Backend | None = None,
) -> AttentionOutput:
    """Softmax attention of each query over its window, the sink block and the blocks given for it.

    A query at position t sees key j iff `j <= t` and one of: `t - j < window`; j lies in block 0; j's block is
    in `blocks[b, i, head]`. A key that qualifies twice counts once. Any block may be listed: of a current or
    future one only the keys up to t are seen. The design follows the selected and sliding branches of native
    sparse attention (arXiv 2502.11089), under one softmax.

    Args:
        q: [B, Lq, Hq, d] queries at positions `start[b] + i`; Hq is a multiple of Hkv.
        k: [B, Lk, Hkv, d] keys at positions 0 .. Lk-1 of each row. What lies past `start[b] + Lq - 1` is
            never used and may be garbage, NaN included; the keys up to there must be finite.
        v: [B, Lk, Hkv, d] values.
        blocks: [B, Lq, Hkv, K] int64 from `select_blocks`; negative entries are ignored. K may be 0.
        start: [B] position of each row's first query; None for 0.
        window: keys that a query sees in its window, itself included.
        block_size: tokens per block.
        scale: factor on the scores; None for `d ** -0.5`.
        mass: also return which share of its probability a query gave to window, sink and selected blocks.
        backend: see `hydra_lab.ops.backend`; None for what `use_backend` says, else the fastest measured one.

    Returns:
        (y [B, Lq, Hq, d] in the dtype of `q`, mass [B, Lq, Hq, 3] or None), see `AttentionOutput`.

    Raises:
        ValueError: a shape or an option does not fit, or `k` ends before the last query. Where `start` lies on a GPU,
            reading it would make the host wait: there a last query past the end of `k` stops the device with an
            assertion instead, which a later call reports.
    """
    check_shape("k", k, (q.shape[0], None, None, q.shape[-1]), "[B, Lk, Hkv, d]")
    check_shape("v", v, k.shape, "[B, Lk, Hkv, d]")
    _check_queries(q, start, k.shape[2])
    check_shape("blocks", blocks, (q.shape[0], q.shape[1], k.shape[2], None), "[B, Lq, Hkv, K]")
    if blocks.dtype != int64:
        raise ValueError(f"blocks must be int64, got {blocks.dtype}")
    _check_reach(q.shape[1], k.shape[1], start)
    _at_least_one(window=window, block_size=block_size)
    window = min(window, k.shape[1])  # a wider one sees no more
    scale = q.shape[3] ** -0.5 if scale is None else scale
    run = implementation("sparse_attention", backend, q).sparse_attention
    return run(q, k, v, blocks, start=start, window=window, block_size=block_size, scale=scale, mass=mass)


def _check_reach(num_queries: int, num_keys: int, start: Tensor | None) -> None:
    if start is not None and start.device.type == "cuda":
        assert_on_device(
            (start <= num_keys - num_queries).all(), "sparse_attention: k ends before the last query"
        )
        return
    needed = num_queries + (0 if start is None else int(start.max()))
    if num_keys < needed:
        raise ValueError(f"k holds {num_keys} positions, but the queries reach position {needed - 1}")


def _check_queries(q: Tensor, start: Tensor | None, num_key_heads: int) -> None:
    check_shape("q", q, (None, None, None, None), "[B, Lq, Hq, d]")
    if q.shape[1] < 1:
        raise ValueError(f"q must hold at least one query, got {list(q.shape)}")
    if num_key_heads < 1 or q.shape[2] % num_key_heads:
        raise ValueError(f"q has {q.shape[2]} heads, not a multiple of the {num_key_heads} key-value heads")
    if start is not None:
        check_shape("start", start, (q.shape[0],), "[B]")


def _at_least_one(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
