"""Metrics of the sparse attention of one block: how far back the selected blocks lie, and how choosy it is.

See `hydra_lab.metrics.arrays` for the shape suffixes. A query at position t always sees its window (the last
`window` tokens) and block 0; it may select among the completed blocks j >= 1 that reach back beyond the
window: `j < t // block_size` and `j * block_size <= t - window`. With tile selection the last token of the
    tile takes the place of
t in the second condition.
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import AnyIntArray, FloatArray, IntArray, check_shape, ratio, valid_mask


@dataclass(frozen=True, eq=False)
class SelectionRecord:
    """Recorded selections of one block: what the metrics below read.

    Attributes:
        layer: index of the block.
        blocks: [N, L, H, K] selected block indices per key-value head, -1 where fewer qualify; entries past a
            sample's end are ignored.
        length: [N] tokens of each sample.
        window: tokens of the sliding window.
        block_size: tokens per block.
        tiled: whether the first token of a block-sized tile selects for the whole tile (`selection="tile"`).
    """

    layer: int
    blocks: AnyIntArray
    length: IntArray
    window: int
    block_size: int
    tiled: bool = False

    def __post_init__(self) -> None:
        check_shape("blocks", self.blocks, (len(self.length), None, None, None))


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


def selection_use(record: SelectionRecord) -> SelectionUse:
    """Distance distribution and selectivity of the attention's block selection; see `SelectionUse`."""
    num_samples, num_positions, num_heads, num_places = record.blocks.shape
    valid_NL = valid_mask(record.length, num_positions)
    position_L = np.arange(num_positions, dtype=np.int64)
    selected = (record.blocks >= 0) & valid_NL[:, :, None, None]

    largest = max(num_positions, 2 * record.block_size)
    edges = record.block_size * 2 ** np.arange(int(np.ceil(np.log2(largest / record.block_size))) + 1)
    edges = np.concatenate([[0], edges])
    num_bins = len(edges) - 1
    count_HV = np.zeros((num_heads, num_bins))
    total_H, sum_H = np.zeros((2, num_heads))
    for h in range(num_heads):
        sample, query, place = np.nonzero(selected[:, :, h])
        found = query - record.blocks[sample, query, h, place].astype(np.int64) * record.block_size
        count_HV[h] = np.histogram(found, bins=edges)[0]
        total_H[h], sum_H[h] = len(found), found.sum()

    queries_L = valid_NL.sum(axis=0)
    candidates_L = num_candidates(
        position_L, window=record.window, block_size=record.block_size, tiled=record.tiled
    )
    uniform_V = np.zeros(num_bins)
    for j in range(1, num_positions // record.block_size):
        queries = np.flatnonzero(candidates_L >= j)
        drawn = np.minimum(num_places, candidates_L[queries]) / candidates_L[queries] * queries_L[queries]
        uniform_V += np.histogram(queries - j * record.block_size, bins=edges, weights=drawn)[0]

    num_queries = int(queries_L.sum())
    return SelectionUse(
        layer=record.layer,
        edges=edges.astype(np.int64),
        share=ratio(count_HV, total_H[:, None]),
        share_if_uniform=ratio(uniform_V, uniform_V.sum(keepdims=True)),
        mean_distance=ratio(sum_H, total_H),
        selected_share=ratio(total_H, np.array(float((candidates_L * queries_L).sum()))),
        filled=ratio(total_H, np.array(float(num_queries * num_places))),
        num_queries=num_queries,
        num_with_candidates=int(queries_L[candidates_L > 0].sum()),
        num_samples=num_samples,
    )


def num_candidates(position: IntArray, *, window: int, block_size: int, tiled: bool = False) -> IntArray:
    """How many blocks a query at each absolute `position` may select from; they are blocks 1, 2, ... of that
    number."""
    completed = position // block_size - 1
    served = (position // block_size + 1) * block_size - 1 if tiled else position
    beyond_window = (served - window) // block_size
    return np.maximum(0, np.minimum(completed, beyond_window)).astype(np.int64)
