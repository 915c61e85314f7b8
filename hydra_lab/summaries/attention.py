"""Summary of the sparse attention: how far back the selected blocks lie, and where the attention goes."""

import numpy as np

from hydra_lab.summaries.arrays import (
    Batch,
    IntArray,
    count,
    in_bin,
    position_edges,
    sum_by_domain,
    valid_mask,
)
from hydra_lab.summaries.fields import Arrays, Field, Fields

FIELDS: Fields = {
    "distance_count": Field(("layer", "head", "distance_bin"), "selected blocks by their distance (edges: "
                            "distance_edges), from the query back to the block's first token"),
    "distance_sum": Field(("layer", "head"), "sum over selected blocks of that distance, tokens"),
}  # fmt: skip

MASS_FIELDS: Fields = {
    "mass_by_position": Field(("layer", "position_bin", "query_head", "kind"), "sum over the bin's tokens of the share "
                              "of the attention that went to the window, the sink block and the selected blocks"),
    "mass_by_domain": Field(("layer", "domain", "query_head", "kind"), "the same by domain"),
}  # fmt: skip


def distance_edges(num_positions: int, block_size: int) -> IntArray:
    """Edges of the bins of `distance_count`, in tokens: 0, one block, and doublings of it up to all positions."""
    largest = max(num_positions, 2 * block_size)
    doublings = np.arange(int(np.ceil(np.log2(largest / block_size))) + 1)
    return np.concatenate([[0], block_size * 2**doublings]).astype(np.int64)


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    blocks_NYLHK = batch["attention", "blocks"]
    _, num_layers, num_positions, num_heads, _ = blocks_NYLHK.shape
    block_size = batch.config["attention_block_size"]
    edges = distance_edges(num_positions, block_size)
    num_bins = len(edges) - 1
    valid_NL = valid_mask(batch.samples.length, num_positions)
    sample, query = np.nonzero(valid_NL)
    counts = np.zeros((num_layers, num_heads, num_bins), dtype=np.int64)
    sums = np.zeros((num_layers, num_heads), dtype=np.int64)
    for y in range(num_layers):
        blocks_MHK = blocks_NYLHK[sample, y, query].astype(np.int64)
        token, head, _ = places = np.nonzero(blocks_MHK >= 0)
        distance = query[token] - blocks_MHK[places] * block_size
        cell = head * num_bins + in_bin(distance, edges.astype(np.float64))
        counts[y] = count(cell, num_heads * num_bins).reshape(num_heads, num_bins)
        np.add.at(sums[y], head, distance)
    return {"distance_count": counts, "distance_sum": sums}


def summarize_mass(batch: Batch) -> Arrays:
    """The arrays of `MASS_FIELDS`."""
    mass_NYLHX = batch["mass", "mass"]
    valid_NL = valid_mask(batch.samples.length, mass_NYLHX.shape[2])
    mass_NYLHX = np.where(valid_NL[:, None, :, None, None], mass_NYLHX, 0.0).astype(np.float64)
    edges = position_edges(mass_NYLHX.shape[2])
    by_domain = sum_by_domain(mass_NYLHX.sum(axis=2), batch.samples)
    return {
        "mass_by_position": np.add.reduceat(mass_NYLHX.sum(axis=0), edges[:-1], axis=1),
        "mass_by_domain": by_domain.swapaxes(0, 1),
    }
