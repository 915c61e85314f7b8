"""Summary of the sparse attention: how far back the selected blocks lie, and where the attention goes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries.arrays import (
    Batch,
    FloatArray,
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


def count_distances(blocks_NLHK: NDArray[Any], length_N: IntArray, block_size: int) -> Arrays:
    """The arrays of `FIELDS` of one block: entry [h, v] counts head h's selections at the distances of bin v."""
    num_positions, num_heads = blocks_NLHK.shape[1:3]
    edges = distance_edges(num_positions, block_size)
    num_bins = len(edges) - 1
    sample, query = np.nonzero(valid_mask(length_N, num_positions))
    blocks_MHK = blocks_NLHK[sample, query].astype(np.int64)
    token, head, _ = places = np.nonzero(blocks_MHK >= 0)
    distance = query[token] - blocks_MHK[places] * block_size
    cell = head * num_bins + in_bin(distance, edges.astype(np.float64))
    sums_H = np.zeros(num_heads, dtype=np.int64)
    np.add.at(sums_H, head, distance)
    counts_HV = count(cell, num_heads * num_bins).reshape(num_heads, num_bins)
    return {"distance_count": counts_HV, "distance_sum": sums_H}


def sum_mass(mass_NLQX: NDArray[Any], length_N: IntArray, edges: IntArray) -> FloatArray:
    """[V, Q, X] the attention mass of one block by position in bins between `edges`."""
    valid_NL = valid_mask(length_N, mass_NLQX.shape[1])
    sum_LQX = mass_NLQX.sum(axis=0, where=valid_NL[..., None, None], dtype=np.float64)
    return np.add.reduceat(sum_LQX, edges[:-1], axis=0)


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    blocks_NYLHK = batch["attention", "blocks"]
    counts = [
        count_distances(blocks_NYLHK[:, y], batch.samples.length, batch.config["attention_block_size"])
        for y in range(blocks_NYLHK.shape[1])
    ]
    return {name: np.stack([of_block[name] for of_block in counts]) for name in FIELDS}


def summarize_mass(batch: Batch) -> Arrays:
    """The arrays of `MASS_FIELDS`."""
    mass_NYLQX, length_N = batch["mass", "mass"], batch.samples.length
    _, num_layers, num_positions, _, _ = mass_NYLQX.shape
    edges = position_edges(num_positions)
    valid_NL = valid_mask(length_N, num_positions)
    sum_NYQX = mass_NYLQX.sum(axis=2, where=valid_NL[:, None, :, None, None], dtype=np.float64)
    return {
        "mass_by_position": np.stack(
            [sum_mass(mass_NYLQX[:, y], length_N, edges) for y in range(num_layers)]
        ),
        "mass_by_domain": sum_by_domain(sum_NYQX, batch.samples).swapaxes(0, 1),
    }
