"""Metrics of the block selection of sparse attention: how far back the selected blocks lie, how choosy it is, and
whether it finds a target.

See `hydra_lab.metrics.arrays` for the shape suffixes. A query at position t always sees its window (the last
`window` tokens) and block 0; it may select among the completed blocks j >= 1 that reach back beyond the
window: `j < t // block_size` and `j * block_size <= t - window`. With tile selection the last token of the tile
takes the place of t in the second condition.

Where the attention's probability goes is measured in `hydra_lab.metrics.attention_mass`. `selection_use` reads counts
alone, so it takes a record or counts (`hydra_lab.metrics.attention_counts`).
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import (
    AnyIntArray,
    FloatArray,
    IntArray,
    check_shape,
    needs_record,
    ratio,
    tokens_at_least,
)
from hydra_lab.metrics.attention_counts import SelectionRecord, Selections, counts_of
from hydra_lab.summaries import distance_edges


@dataclass(frozen=True, eq=False)
class SelectionUse:
    """Distance of the selected blocks, and how few of the candidates they are.

    Attributes:
        layer: index of the block.
        edges: [V+1] edges of the distance bins, in tokens from the query back to the block's first token
            (doubling).
        share: [H, V] share of the head's selections that fall into the bin; sums to 1 over V.
        share_if_uniform: [V] the share were each query's blocks drawn evenly from its candidates.
        mean_distance: [H] mean distance of a selected block, tokens; NaN where nothing was selected.
        selected_share: [H] selected blocks over candidate blocks, summed over queries, 0..1: 1 means that
            nothing had to be left out.
        filled: [H] share of the K places that are filled, over all queries.
        num_queries: queries counted.
        num_with_candidates: those that had at least one candidate.
        num_samples: samples they come from.
    """

    layer: int
    edges: IntArray
    share: FloatArray
    share_if_uniform: FloatArray
    mean_distance: FloatArray
    selected_share: FloatArray
    filled: FloatArray
    num_queries: int
    num_with_candidates: int
    num_samples: int


def selection_use(selections: Selections) -> SelectionUse:
    """Distance distribution and selectivity of the attention's block selection; see `SelectionUse`."""
    counts = counts_of(selections)
    size, num_places = counts.block_size, counts.num_selected
    num_positions = len(counts.length) - 1
    position_L = np.arange(num_positions, dtype=np.int64)
    queries_L = tokens_at_least(counts.length)
    candidates_L = num_candidates(position_L, window=counts.window, block_size=size, tiled=counts.tiled)
    edges = distance_edges(num_positions, size)
    uniform_V = np.zeros(len(edges) - 1)
    for j in range(1, num_positions // size):
        queries = np.flatnonzero(candidates_L >= j)
        drawn = np.minimum(num_places, candidates_L[queries]) / candidates_L[queries] * queries_L[queries]
        uniform_V += np.histogram(queries - j * size, bins=edges, weights=drawn)[0]

    distances_HV = counts.distance_count.astype(np.float64)
    total_H = distances_HV.sum(axis=1)
    num_queries = int(queries_L.sum())
    return SelectionUse(
        layer=counts.layer,
        edges=edges,
        share=ratio(distances_HV, total_H[:, None]),
        share_if_uniform=ratio(uniform_V, uniform_V.sum(keepdims=True)),
        mean_distance=ratio(counts.distance_sum.astype(np.float64), total_H),
        selected_share=ratio(total_H, np.array(float((candidates_L * queries_L).sum()))),
        filled=ratio(total_H, np.array(float(num_queries * num_places))),
        num_queries=num_queries,
        num_with_candidates=int(queries_L[candidates_L > 0].sum()),
        num_samples=int(counts.length.sum()),
    )


def num_candidates(position: IntArray, *, window: int, block_size: int, tiled: bool = False) -> IntArray:
    """How many blocks a query at each absolute `position` may select from; they are blocks 1, 2, ... of that
    number."""
    completed = position // block_size - 1
    served = (position // block_size + 1) * block_size - 1 if tiled else position
    beyond_window = (served - window) // block_size
    return np.maximum(0, np.minimum(completed, beyond_window)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class TargetRecord:
    """Queries of one block whose answer lies at a known place (a planted fact, a premise, the other half of a pair).

    Attributes:
        selection: the block's recorded selections.
        sample, query, target: [Q] each: the sample, the position of the query and that of the target, not behind it.
    """

    selection: SelectionRecord
    sample: AnyIntArray
    query: AnyIntArray
    target: AnyIntArray

    def __post_init__(self) -> None:
        if not isinstance(self.selection, SelectionRecord):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise needs_record("hit_rate", "selection_record")
        num_queries = len(self.query)
        for name in ("sample", "query", "target"):
            check_shape(name, getattr(self, name), (num_queries,))
        if num_queries == 0:
            raise ValueError("a target record needs at least one query")
        if not (0 <= self.sample.min() and self.sample.max() < len(self.selection.length)):
            raise ValueError(f"sample must lie in 0 .. {len(self.selection.length) - 1}")
        length = self.selection.length[self.sample]
        wrong = (self.target < 0) | (self.target > self.query) | (self.query >= length)
        if wrong.any():
            q = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"entry {q} has target {self.target[q]} and query {self.query[q]} in a sample of {length[q]} tokens; "
                "0 <= target <= query < tokens must hold"
            )


@dataclass(frozen=True, eq=False)
class HitRate:
    """Whether the attention selects the block that holds the target.

    Attributes:
        layer: index of the block.
        hit: [H] share of the eligible queries whose selected blocks hold the target, per key-value head. Eligible are
            those whose target lies in a candidate block, outside the window: only there the selection decides.
            NaN where there are none.
        error: [H] standard error of `hit`, with queries of one sample taken as dependent; NaN below two samples.
        chance: share expected were each query's blocks drawn evenly from its candidates: mean over eligible queries
            of min(K, candidates) / candidates.
        visible: [H] share of all queries that see the target at all: in the window, the sink or a selected block.
        edges: [V+1] edges of the distance bins, in tokens from the query back to the target (doubling).
        hit_by_distance: [H, V] `hit` of the bin's eligible queries; NaN where there are none.
        chance_by_distance: [V] `chance` of the bin's eligible queries.
        visible_by_distance: [H, V] `visible` of the bin's queries; NaN where there are none.
        num_eligible: [V] eligible queries in the bin.
        num_queries: [V] queries in the bin.
        num_samples: samples they come from.
    """

    layer: int
    hit: FloatArray
    error: FloatArray
    chance: float
    visible: FloatArray
    edges: IntArray
    hit_by_distance: FloatArray
    chance_by_distance: FloatArray
    visible_by_distance: FloatArray
    num_eligible: IntArray
    num_queries: IntArray
    num_samples: int


def hit_rate(record: TargetRecord) -> HitRate:
    """How often the block that holds a known target is selected, against chance; see `HitRate`."""
    selection = record.selection
    size = selection.block_size
    query, target = record.query.astype(np.int64), record.target.astype(np.int64)
    block = target // size
    candidates = num_candidates(query, window=selection.window, block_size=size, tiled=selection.tiled)
    in_window = query - target < selection.window
    eligible = (block >= 1) & (block <= candidates) & ~in_window
    hit_QH = (selection.blocks[record.sample, query] == block[:, None, None]).any(axis=-1)
    visible_QH = hit_QH | (in_window | (block == 0))[:, None]
    num_places = selection.blocks.shape[-1]
    chance_Q = ratio(np.minimum(num_places, candidates).astype(np.float64), candidates.astype(np.float64))

    edges = distance_edges(selection.blocks.shape[1], size)
    in_bin_VQ = np.digitize(query - target, edges) - 1 == np.arange(len(edges) - 1)[:, None]
    eligible_VQ = in_bin_VQ & eligible
    queries_V, eligible_V = in_bin_VQ.sum(axis=1), eligible_VQ.sum(axis=1)
    num_eligible = np.array(float(eligible.sum()))
    hit_H = ratio(hit_QH[eligible].sum(axis=0).astype(np.float64), num_eligible)

    samples, sample_Q = np.unique(record.sample[eligible], return_inverse=True)
    excess_NH = np.zeros((len(samples), hit_QH.shape[1]))
    np.add.at(excess_NH, sample_Q, hit_QH[eligible] - hit_H)
    enough = len(samples) > 1
    error_H = np.sqrt((excess_NH**2).sum(axis=0)) / num_eligible if enough else np.full(len(hit_H), np.nan)
    return HitRate(
        layer=selection.layer,
        hit=hit_H,
        error=error_H,
        chance=float(chance_Q[eligible].mean()) if eligible.any() else float("nan"),
        visible=visible_QH.mean(axis=0),
        edges=edges,
        hit_by_distance=ratio((eligible_VQ @ hit_QH.astype(np.float64)).T, eligible_V.astype(np.float64)),
        chance_by_distance=ratio(eligible_VQ @ np.nan_to_num(chance_Q), eligible_V.astype(np.float64)),
        visible_by_distance=ratio(
            (in_bin_VQ @ visible_QH.astype(np.float64)).T, queries_V.astype(np.float64)
        ),
        num_eligible=eligible_V.astype(np.int64),
        num_queries=queries_V.astype(np.int64),
        num_samples=len(np.unique(record.sample)),
    )
