"""Fast path of `hydra_lab.ops.sparse_attention` on any device, forward and backward, in memory linear in L.

The softmax over a query's keys is put together from parts, each with its own maximum, as in FlashAttention:

- the *window*, computed by tiles of consecutive queries against one slice of the keys;
- the *blocks* (the sink and the selected ones), computed the other way round: the (query, block) pairs are
  sorted by block and cut into tiles that share a block, so that a block's keys are fetched once per tile of
  queries and nothing is computed for a block that a query did not select.

A key of a selected block that also lies in the window is counted in the window only. The backward pass
recomputes the probabilities from the saved log-sum-exp.

Shape suffixes:

    B rows    I queries    G key-value heads    Q query heads per key-value head    d head size
    R = B * G             M tiles of pairs     T pairs per tile                     S keys per block
    N = R * I             K selected blocks, the sink included
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_lab.ops.sparse_attention.output import AttentionOutput

WINDOW_TILE = 32
"""Queries per tile of the window part."""
_SPAN = 8192
"""Queries that are worked on at once where no gradient is wanted."""
_PAIR_TILE = 64
"""(query, block) pairs per tile of the blocks part."""
_SLICE_FLOATS = 1 << 20
"""Numbers that one step of the blocks part works on: bounds its memory and keeps it in the cache."""
_SCORE_FLOATS = 1 << 19
"""Scores that one step of the selection works on, on a CPU; on a GPU 64 times as many."""


def block_means(k: Tensor, *, block_size: int) -> Tensor:
    """See `hydra_lab.ops.sparse_attention.block_means`."""
    num_blocks = k.shape[1] // block_size
    completed = k[:, : num_blocks * block_size]
    return completed.reshape(k.shape[0], num_blocks, block_size, *k.shape[2:]).mean(dim=2)


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
    num_rows, num_queries, num_heads, _ = q.shape
    num_blocks, num_key_heads = key_means.shape[1], key_means.shape[2]
    shape = (num_rows, num_queries, num_key_heads, num_selected)
    scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    blocks = torch.full(shape, -1, dtype=torch.int64, device=q.device)
    means_BGdJ = key_means.float().permute(0, 2, 3, 1)
    block = torch.arange(num_blocks, device=q.device)
    # All scores at once would take memory that grows with L * L.
    floats = _SCORE_FLOATS if q.device.type == "cpu" else 64 * _SCORE_FLOATS
    num_sliced = max(1, floats // max(1, num_rows * num_key_heads * num_blocks))
    for first in range(0, num_queries, num_sliced):
        queries = slice(first, min(first + num_sliced, num_queries))
        with torch.autocast(q.device.type, enabled=False):
            # The mean over the query heads of a group may be taken before the product.
            q_BIGQd = torch.unflatten(q[:, queries].float(), 2, (num_key_heads, num_heads // num_key_heads))
            score_BGIJ = q_BIGQd.mean(dim=3).transpose(1, 2) @ means_BGdJ
        position = torch.arange(queries.start, queries.stop, device=q.device)[:, None] * serves
        if start is not None:
            position = start[:, None, None, None] + position
        candidate = (
            (block >= 1)
            & (block < position // block_size)
            & (block * block_size <= position + serves - 1 - window)
        )
        score_BGIJ.masked_fill_(~candidate, -torch.inf)
        for rank in range(min(num_selected, num_blocks)):
            # torch.max returns the first of equal maxima, which topk does not promise.
            best_BGI, index_BGI = score_BGIJ.max(dim=-1)
            score_BGIJ.scatter_(-1, index_BGI[..., None], -torch.inf)
            scores[:, queries, :, rank] = best_BGI.transpose(1, 2)
            blocks[:, queries, :, rank] = index_BGI.transpose(1, 2)
    return blocks.masked_fill_(scores == -torch.inf, -1), scores


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    start: Tensor | None,
    window: int,
    block_size: int,
    scale: float,
    mass: bool,
) -> AttentionOutput:
    """See `hydra_lab.ops.sparse_attention.sparse_attention`."""
    apply = cast(
        Callable[..., tuple[Tensor, Tensor | None]],
        _SparseAttention.apply,  # pyright: ignore[reportUnknownMemberType]
    )
    num_queries = q.shape[1]
    if torch.is_grad_enabled() or num_queries <= _SPAN:
        return AttentionOutput(*apply(q, k, v, blocks, start, window, block_size, scale, mass))
    # Without gradients nothing joins the queries, and what they need beside their output is a multiple of it.
    if start is None:
        start = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    y = torch.empty_like(q)
    shares = q.new_empty(*q.shape[:3], 3, dtype=torch.float32) if mass else None
    for first in range(0, num_queries, _SPAN):
        span = slice(first, min(first + _SPAN, num_queries))
        part, part_shares = apply(
            q[:, span], k, v, blocks[:, span], start + first, window, block_size, scale, mass
        )
        y[:, span] = part
        if shares is not None and part_shares is not None:
            shares[:, span] = part_shares
    return AttentionOutput(y, shares)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Tensor,
        start: Tensor | None,
        window: int,
        block_size: int,
        scale: float,
        mass: bool,
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(q.device.type, enabled=False):
            pairs = _pair_up(blocks, num_keys=k.shape[1], start=start, window=window, block_size=block_size)
            problem = _Problem(q, k, v, pairs, start, window, block_size, scale)
            out_NQd, log_sum_NQ, mass_NQ3 = problem.forward(mass)
            ctx.save_for_backward(q, k, v, start, out_NQd, log_sum_NQ)
            ctx.pairs = pairs
            ctx.options = (window, block_size, scale)
            y = problem.ungroup(out_NQd).to(q.dtype)
            if mass_NQ3 is None:
                return y, None
            mass_BIH3 = problem.ungroup(mass_NQ3).float()
            ctx.mark_non_differentiable(mass_BIH3)
            return y, mass_BIH3

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, start, out_NQd, log_sum_NQ = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            problem = _Problem(q, k, v, ctx.pairs, start, *ctx.options)
            d_q, d_k, d_v = problem.backward(grad_outputs[0], out_NQd, log_sum_NQ)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), *[None] * 6


class _Pairs(NamedTuple):
    """The (query, block) pairs that hold a key outside the window, in tiles that share a block.

    Attributes:
        row: [M] which of the R (row, key-value head) of each tile.
        block: [M] block of each tile.
        query: [M, T] which of the N queries; 0 in places without a pair.
        limit: [M, T] offset in the block of the last key that the pair sees outside the window.
        empty: [M, T] True in places without a pair.
        place: [N, K] index into the M * T places of each query's pairs; M * T where there is none.
    """

    row: Tensor
    block: Tensor
    query: Tensor
    limit: Tensor
    empty: Tensor
    place: Tensor


def _pair_up(
    blocks_BIGK: Tensor, *, num_keys: int, start: Tensor | None, window: int, block_size: int
) -> _Pairs | None:
    """Sort the (query, block) pairs by block; None where no query sees a block beyond its window."""
    num_rows, num_queries, num_key_heads, _ = blocks_BIGK.shape
    device = blocks_BIGK.device
    position = torch.arange(num_queries, device=device)
    if start is not None:
        position = start[:, None, None] + position
    limit_BGI = (position - window).expand(num_rows, num_key_heads, num_queries)
    block = blocks_BIGK.transpose(1, 2)
    twice = (block[..., :, None] == block[..., None, :]).tril(-1).any(dim=-1)
    block = F.pad(block.masked_fill(twice | (block == 0), -1), (1, 0))  # the sink comes first
    limit = limit_BGI[..., None] - block * block_size
    pair = ((block >= 0) & (limit >= 0)).flatten().nonzero()[:, 0]
    if pair.shape[0] == 0:
        return None

    num_blocks = -(-num_keys // block_size)
    row_NK = torch.arange(num_rows * num_key_heads, device=device).repeat_interleave(
        num_queries * block.shape[-1]
    )
    owner, order = (row_NK * num_blocks + block.flatten())[pair].sort(stable=True)
    pair = pair[order]
    count = torch.bincount(owner, minlength=num_rows * num_key_heads * num_blocks)
    tile_size = min(_PAIR_TILE, num_queries)
    num_tiles = (count + tile_size - 1) // tile_size
    # A block's first pair goes to the first place of the block's first tile.
    shift = (num_tiles.cumsum(0) - num_tiles) * tile_size - (count.cumsum(0) - count)
    place = torch.arange(pair.shape[0], device=device) + shift[owner]
    tile_owner = torch.arange(count.shape[0], device=device).repeat_interleave(num_tiles)
    num_places = tile_owner.shape[0] * tile_size

    query_MT = place.new_zeros(num_places)
    query_MT[place] = pair // block.shape[-1]
    limit_MT = place.new_full((num_places,), block_size - 1)
    limit_MT[place] = limit.flatten()[pair].clamp(max=block_size - 1)
    empty_MT = torch.ones(num_places, dtype=torch.bool, device=device)
    empty_MT[place] = False
    place_NK = place.new_full((block.numel(),), num_places)
    place_NK[pair] = place
    return _Pairs(
        row=tile_owner // num_blocks,
        block=tile_owner % num_blocks,
        query=query_MT.view(-1, tile_size),
        limit=limit_MT.view(-1, tile_size),
        empty=empty_MT.view(-1, tile_size),
        place=place_NK.view(-1, block.shape[-1]),
    )


class _Problem:
    """The tensors of one call, laid out by key-value head, and its two passes."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pairs: _Pairs | None,
        start: Tensor | None,
        window: int,
        block_size: int,
        scale: float,
    ) -> None:
        self.num_rows, self.num_queries, num_heads, self.head_size = q.shape
        self.num_keys, self.num_key_heads = k.shape[1], k.shape[2]
        self.group = num_heads // self.num_key_heads
        self.window, self.block_size, self.scale, self.start = window, block_size, scale, start
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.device = q.device
        self.k, self.v = k, v
        self.q_NQd = self.grouped(q) * scale
        self.pairs = pairs

    def grouped(self, x_BIHd: Tensor) -> Tensor:
        """[B, I, H, d] -> [N, Q, d]."""
        x = x_BIHd.reshape(*x_BIHd.shape[:2], self.num_key_heads, self.group, self.head_size)
        return x.transpose(1, 2).to(self.dtype).reshape(-1, self.group, self.head_size)

    def ungroup(self, x_NQd: Tensor) -> Tensor:
        """[N, Q, d] -> [B, I, H, d]."""
        x = x_NQd.view(self.num_rows, self.num_key_heads, self.num_queries, self.group, -1)
        return x.transpose(1, 2).flatten(2, 3)

    # The window.

    def _align(self, x_BJGd: Tensor) -> Tensor:
        """Keys from `window - 1` before each row's first query to its last query: [R, I + window - 1, d]."""
        before, num_queries = self.window - 1, self.num_queries
        if self.start is None:
            x: Tensor = F.pad(x_BJGd, (0, 0, 0, 0, before, num_queries - self.num_keys))
        else:
            x = _shifted(x_BJGd, self.start - before, num_queries + before)
        return x.transpose(1, 2).to(self.dtype).reshape(-1, num_queries + before, self.head_size)

    def _unalign(self, x_RWd: Tensor) -> Tensor:
        """Transpose of `_align`: [R, I + window - 1, d] -> [B, J, G, d], zeros elsewhere."""
        before = self.window - 1
        x = x_RWd.view(self.num_rows, self.num_key_heads, -1, self.head_size).transpose(1, 2)
        if self.start is None:
            return F.pad(x, (0, 0, 0, 0, -before, self.num_keys - self.num_queries))
        return _shifted(x, before - self.start, self.num_keys)

    def _window_tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Per tile: its rows in [R, I * Q, .], its keys in the aligned keys, the mask to add to the scores."""
        before = self.window - 1
        lowest, highest = (0, 0) if self.start is None else (int(self.start.min()), int(self.start.max()))
        for first in range(0, self.num_queries, WINDOW_TILE):
            end = min(first + WINDOW_TILE, self.num_queries)
            first_key = max(first, before - highest)  # no row has a key before this one
            query = torch.arange(first, end, device=self.device).repeat_interleave(self.group)[:, None]
            key = torch.arange(first_key, end + before, device=self.device)
            hidden = (key < query) | (key > query + before)
            if self.start is not None and first + lowest < before:
                hidden = hidden | (key + self.start[:, None, None] < before)
                hidden = hidden.repeat_interleave(self.num_key_heads, dim=0)
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(
                hidden, -torch.inf
            )
            yield slice(first * self.group, end * self.group), slice(first_key, end + before), mask

    # The blocks.

    def _fetch(self, x_BJGd: Tensor, row_M: Tensor, block_M: Tensor) -> Tensor:
        """Keys or values of one block per tile: [M, S, d]."""
        offset = torch.arange(self.block_size, device=self.device)
        b, g = row_M // self.num_key_heads, row_M % self.num_key_heads
        # Keys past the row's last query may be garbage and are hidden anyhow: read the last one instead.
        last = self.num_queries - 1 if self.start is None else (self.start[b] + self.num_queries - 1)[:, None]
        position_MS = block_M[:, None] * self.block_size + offset
        position_MS = position_MS.clamp(max=last) if isinstance(last, int) else position_MS.minimum(last)
        return x_BJGd[b[:, None], position_MS, g[:, None]].to(self.dtype)

    def _mask_table(self) -> Tensor:
        """[S, S]: row `limit` holds 0 up to the offset `limit` and -inf beyond."""
        offset = torch.arange(self.block_size, device=self.device)
        table = torch.zeros(self.block_size, self.block_size, dtype=self.dtype, device=self.device)
        return table.masked_fill_(offset > offset[:, None], -torch.inf)

    def _steps(self, pairs: _Pairs) -> Iterator[slice]:
        """Slices of tiles of bounded size."""
        num_tiles, tile_size = pairs.query.shape
        per_tile = (
            tile_size * self.group * (self.head_size + self.block_size) + self.block_size * self.head_size
        )
        step = max(1, _SLICE_FLOATS // per_tile)
        for first in range(0, num_tiles, step):
            yield slice(first, min(first + step, num_tiles))

    def _rows(self, pairs: _Pairs, tiles: slice, x_NQ: Tensor) -> Tensor:
        """What belongs to the queries of some tiles: [N, Q, ...] -> [M, T * Q, ...]."""
        query_MT = pairs.query[tiles]
        return x_NQ.index_select(0, query_MT.flatten()).view(query_MT.shape[0], -1, *x_NQ.shape[2:])

    # The two passes.

    def forward(self, mass: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output [N, Q, d], log-sum-exp of the visible scores [N, Q] and, if asked for, the probability [N, Q, 3] of
        window, sink and selected blocks."""
        k_RWd, v_RWd = self._align(self.k), self._align(self.v)
        q_Rqd = self.q_NQd.view(k_RWd.shape[0], -1, self.head_size)
        out_Rqd = torch.empty_like(q_Rqd)
        top_Rq1 = q_Rqd.new_empty(*q_Rqd.shape[:2], 1)
        sum_Rq1 = torch.empty_like(top_Rq1)
        for queries, keys, mask in self._window_tiles():
            score = torch.baddbmm(mask, q_Rqd[:, queries], k_RWd[:, keys].mT)
            top = score.amax(dim=-1, keepdim=True)
            weight = score.sub_(top).exp_()
            out_Rqd[:, queries] = weight @ v_RWd[:, keys]
            top_Rq1[:, queries] = top
            sum_Rq1[:, queries] = weight.sum(dim=-1, keepdim=True)
        out, top, total = out_Rqd.view(-1, self.head_size), top_Rq1.flatten(), sum_Rq1.flatten()
        part_p3 = torch.stack([total, *[torch.zeros_like(total)] * 2], dim=-1) if mass else None

        if (pairs := self.pairs) is not None:
            # One more place, weightless, for queries that lack a pair.
            num_places = (pairs.query.numel() + 1) * self.group
            out_p = out.new_empty(num_places, self.head_size)
            top_p, sum_p = out.new_empty(num_places), out.new_empty(num_places)
            out_p[-self.group :], top_p[-self.group :], sum_p[-self.group :] = 0.0, -torch.inf, 0.0
            table = self._mask_table()
            per_tile = pairs.query.shape[1] * self.group
            for tiles in self._steps(pairs):
                q_Mqd = self._rows(pairs, tiles, self.q_NQd)
                k_MSd = self._fetch(self.k, pairs.row[tiles], pairs.block[tiles])
                v_MSd = self._fetch(self.v, pairs.row[tiles], pairs.block[tiles])
                score = table[pairs.limit[tiles].repeat_interleave(self.group, dim=1)].baddbmm_(
                    q_Mqd, k_MSd.mT
                )
                top_Mq1 = score.amax(dim=-1, keepdim=True)
                weight = score.sub_(top_Mq1).exp_()
                places = slice(tiles.start * per_tile, tiles.stop * per_tile)
                torch.bmm(weight, v_MSd, out=out_p[places].view(q_Mqd.shape))
                top_p[places] = top_Mq1.flatten()
                sum_p[places] = weight.sum(dim=-1).flatten()
            head = torch.arange(self.group, device=self.device)[:, None]
            place = (pairs.place[:, None, :] * self.group + head).flatten(0, 1)
            top_pair = top_p[place]
            highest = torch.maximum(top, top_pair.amax(dim=-1))
            rescale, rescale_pair = (top - highest).exp_(), (top_pair - highest[:, None]).exp_()
            sum_pair = sum_p[place] * rescale_pair
            if mass:  # of a query's pairs the sink is the first
                part_p3 = torch.stack([total * rescale, sum_pair[:, 0], sum_pair[:, 1:].sum(dim=-1)], dim=-1)
            total = total * rescale + sum_pair.sum(dim=-1)
            out = out * rescale[:, None] + F.embedding_bag(
                place, out_p, mode="sum", per_sample_weights=rescale_pair
            )
            top = highest
        out = out / total[:, None]
        shape = self.q_NQd.shape[:2]
        mass_NQ3 = None if part_p3 is None else (part_p3 / total[:, None]).view(*shape, 3)
        return out.view(self.q_NQd.shape), (top + total.log()).view(shape), mass_NQ3

    def backward(self, d_out: Tensor, out_NQd: Tensor, log_sum_NQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, in their layouts."""
        d_out_NQd = self.grouped(d_out)
        delta_NQ = (d_out_NQd * out_NQd).sum(dim=-1)
        k_RWd, v_RWd = self._align(self.k), self._align(self.v)
        num_r = k_RWd.shape[0]
        q_Rqd, d_out_Rqd = (
            self.q_NQd.view(num_r, -1, self.head_size),
            d_out_NQd.view(num_r, -1, self.head_size),
        )
        log_sum_Rq1, delta_Rq1 = log_sum_NQ.view(num_r, -1, 1), delta_NQ.view(num_r, -1, 1)
        d_q_Rqd = torch.empty_like(q_Rqd)
        d_k_RWd, d_v_RWd = torch.zeros_like(k_RWd), torch.zeros_like(v_RWd)
        for queries, keys, mask in self._window_tiles():
            probability = (
                (mask - log_sum_Rq1[:, queries]).baddbmm_(q_Rqd[:, queries], k_RWd[:, keys].mT).exp_()
            )
            d_v_RWd[:, keys] += probability.mT @ d_out_Rqd[:, queries]
            d_score = torch.baddbmm(-delta_Rq1[:, queries], d_out_Rqd[:, queries], v_RWd[:, keys].mT)
            d_score.mul_(probability)
            d_q_Rqd[:, queries] = d_score @ k_RWd[:, keys]
            d_k_RWd[:, keys] += d_score.mT @ q_Rqd[:, queries]
        d_q, d_k, d_v = d_q_Rqd.view(self.q_NQd.shape), self._unalign(d_k_RWd), self._unalign(d_v_RWd)

        if (pairs := self.pairs) is not None:
            num_tiles, tile_size = pairs.query.shape
            d_q_p = d_q.new_empty(num_tiles * tile_size + 1, self.group * self.head_size)
            d_q_p[-1] = 0.0
            d_k_MSd = d_q.new_empty(num_tiles, self.block_size, self.head_size)
            d_v_MSd = torch.empty_like(d_k_MSd)
            table = self._mask_table()
            for tiles in self._steps(pairs):
                q_Mqd = self._rows(pairs, tiles, self.q_NQd)
                d_out_Mqd = self._rows(pairs, tiles, d_out_NQd)
                k_MSd = self._fetch(self.k, pairs.row[tiles], pairs.block[tiles])
                v_MSd = self._fetch(self.v, pairs.row[tiles], pairs.block[tiles])
                log_sum_Mq = self._rows(pairs, tiles, log_sum_NQ)
                empty_Mq = pairs.empty[tiles].repeat_interleave(self.group, dim=1)
                log_sum_Mq = log_sum_Mq.masked_fill_(empty_Mq, torch.inf)  # probability 0
                mask = table[pairs.limit[tiles].repeat_interleave(self.group, dim=1)]
                probability = mask.sub_(log_sum_Mq[..., None]).baddbmm_(q_Mqd, k_MSd.mT).exp_()
                torch.bmm(probability.mT, d_out_Mqd, out=d_v_MSd[tiles])
                delta_Mq = self._rows(pairs, tiles, delta_NQ)
                d_score = torch.baddbmm(-delta_Mq[..., None], d_out_Mqd, v_MSd.mT).mul_(probability)
                places = slice(tiles.start * tile_size, tiles.stop * tile_size)
                torch.bmm(d_score, k_MSd, out=d_q_p[places].view(q_Mqd.shape))
                torch.bmm(d_score.mT, q_Mqd, out=d_k_MSd[tiles])
            d_q = d_q + F.embedding_bag(pairs.place, d_q_p, mode="sum").view(d_q.shape)
            d_k, d_v = d_k + self._return(pairs, d_k_MSd), d_v + self._return(pairs, d_v_MSd)
        return self.ungroup(d_q * self.scale), d_k, d_v

    def _return(self, pairs: _Pairs, x_MSd: Tensor) -> Tensor:
        """Transpose of `_fetch` for all tiles: sums them into [B, J, G, d]."""
        num_blocks = -(-self.num_keys // self.block_size)
        owner = pairs.row * num_blocks + pairs.block
        count = torch.bincount(owner, minlength=self.num_rows * self.num_key_heads * num_blocks)
        summed = F.embedding_bag(
            torch.arange(owner.shape[0], device=self.device),
            x_MSd.flatten(1),
            count.cumsum(0) - count,
            mode="sum",
        )
        x_BGJd = summed.view(self.num_rows, self.num_key_heads, num_blocks * self.block_size, self.head_size)
        return x_BGJd[:, :, : self.num_keys].transpose(1, 2)


def _shifted(x: Tensor, first: Tensor, length: int) -> Tensor:
    """`x[b, first[b] + i]` for i < length, 0 where that is outside `x`: [B, J, ...] -> [B, length, ...]."""
    index = first[:, None] + torch.arange(length, device=x.device)
    inside = (index >= 0) & (index < x.shape[1])
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    shifted = x[row, index.clamp(0, x.shape[1] - 1)]
    return shifted.where(inside.view(*inside.shape, *[1] * (x.ndim - 2)), 0.0)
