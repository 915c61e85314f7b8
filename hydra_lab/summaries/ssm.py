"""Summary of the state-space path: how large the states are along the text, and how fast they decay."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries.arrays import (
    Batch,
    FloatArray,
    IntArray,
    Samples,
    count,
    in_bin,
    octave_edges,
    position_edges,
    sum_by_domain,
    valid_mask,
)
from hydra_lab.summaries.fields import Arrays, Field, Fields

DECAY_EDGES: FloatArray = octave_edges(-24, 6)
"""Edges of the bins of `decay_histogram`: decay per token, minus its natural logarithm, in eighths of an octave."""

FIELDS: Fields = {
    "norm_sum": Field(("layer", "chunk", "head"), "sum over samples that reach the chunk's end of the state's norm"),
    "norm_square": Field(("layer", "chunk", "head"), "sum over them of its square"),
    "norm_log_sum": Field(("layer", "chunk", "head"), "sum over them of log2 of it, the norms of zero left out"),
    "norm_positive": Field(("layer", "chunk", "head"), "those of them whose norm is not zero"),
    "last_norm_sum": Field(("layer", "head"), "sum of the norm over the samples that end inside a chunk, at their end"),
    "last_norm_square": Field(("layer", "head"), "sum over them of its square"),
    "decay_by_position": Field(("layer", "position_bin", "head"), "sum over the bin's tokens of the log decay (<= 0)"),
    "decay_by_domain": Field(("layer", "domain", "head"), "sum over the domain's tokens of the log decay"),
    "decay_histogram": Field(("layer", "head", "decay_bin"), "tokens by minus their log decay (edges: DECAY_EDGES)"),
}  # fmt: skip


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    num_layers = batch["ssm", "norms"].shape[1]
    blocks = [
        _block(batch, batch["ssm", "norms"][:, y], batch["ssm", "decay"][:, y]) for y in range(num_layers)
    ]
    return {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}


def sum_norms(norms_NCH: NDArray[Any], length_N: IntArray, chunk_size: int) -> Arrays:
    """Norms at the ends of whole chunks, and at the ends of the samples that end inside one."""
    whole_NC = valid_mask(length_N // chunk_size, norms_NCH.shape[1])
    norm_NCH = np.where(whole_NC[..., None], norms_NCH, 0.0).astype(np.float64)
    partial = np.flatnonzero(length_N % chunk_size)
    last_MH = norms_NCH[partial, length_N[partial] // chunk_size].astype(np.float64)
    return {
        "norm_sum": norm_NCH.sum(axis=0),
        "norm_square": (norm_NCH**2).sum(axis=0),
        "last_norm_sum": last_MH.sum(axis=0),
        "last_norm_square": (last_MH**2).sum(axis=0),
    }


def sum_decays(decay_NLH: NDArray[Any], samples: Samples, edges: IntArray) -> Arrays:
    """Log decays by position in bins between `edges`, and by domain."""
    valid_NL = valid_mask(samples.length, decay_NLH.shape[1])
    decay_NLH = np.where(valid_NL[..., None], decay_NLH, 0.0)
    return {
        "decay_by_position": np.add.reduceat(decay_NLH.sum(axis=0, dtype=np.float64), edges[:-1], axis=0),
        "decay_by_domain": sum_by_domain(decay_NLH.sum(axis=1, dtype=np.float64), samples),
    }


def _block(batch: Batch, norms_NCH: NDArray[Any], decay_NLH: NDArray[Any]) -> Arrays:
    num_chunks, num_heads = norms_NCH.shape[1:]
    num_positions = decay_NLH.shape[1]
    length_N, chunk_size = batch.samples.length, batch.config["ssm_chunk_size"]
    whole_NC1 = valid_mask(length_N // chunk_size, num_chunks)[..., None]
    norm_NCH = np.where(whole_NC1, norms_NCH, 0.0).astype(np.float64)
    positive_NCH = norm_NCH > 0
    log_NCH = np.log2(norm_NCH, out=np.zeros_like(norm_NCH), where=positive_NCH)
    num_bins = len(DECAY_EDGES) - 1
    rate_MH = -decay_NLH[valid_mask(length_N, num_positions)].astype(np.float64)
    cell_MH = np.arange(num_heads) * num_bins + in_bin(rate_MH, DECAY_EDGES)
    return {
        **sum_norms(norms_NCH, length_N, chunk_size),
        "norm_log_sum": log_NCH.sum(axis=0),
        "norm_positive": positive_NCH.sum(axis=0),
        **sum_decays(decay_NLH, batch.samples, position_edges(num_positions)),
        "decay_histogram": count(cell_MH, num_heads * num_bins).reshape(num_heads, num_bins),
    }
