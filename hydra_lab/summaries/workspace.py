"""Summary of the workspace: which slots are read when, how sharply, how old what is read is, and what is written.

Only whole chunks are written: a sample's last, partial chunk is not written before more tokens come. Relative entropies
are Shannon entropies over the logarithm of the number of choices, 0 (one choice) to 1 (even).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries.arrays import (
    SHARE_STEPS,
    Batch,
    BoolArray,
    FloatArray,
    IntArray,
    best_contexts,
    count,
    position_edges,
    share_steps,
    sum_by_domain,
    valid_mask,
)
from hydra_lab.summaries.fields import Arrays, Field, Fields, contexts_fields

FIELDS: Fields = {
    "read_by_position": Field(("layer", "position_bin", "slot"), "sum over the bin's tokens of the attention on the "
                              "slot; a token spreads 1"),
    "read_by_domain": Field(("layer", "domain", "slot"), "the same by domain"),
    "gated_read_by_lag": Field(("layer", "slot", "lag"), "sum over tokens of read gate times attention on the slot, by "
                               "the age of what is read there: entry l of what was written l chunks before the "
                               "token's own, entry 0 of what the slot started with"),
    "read_gate_by_position": Field(("layer", "position_bin"), "sum over the bin's tokens of the read gate"),
    "read_entropy_by_position": Field(("layer", "position_bin"), "sum over the bin's tokens of the relative entropy of "
                                      "their attention over the slots"),
    "read_entropy_histogram": Field(("layer", "share"), "tokens by that entropy, in thousandths (0 .. 1000)"),
    "write_gate_sum": Field(("layer", "slot"), "sum over whole chunks of the write gate"),
    "write_gate_log_sum": Field(("layer", "slot"), "sum over whole chunks of ln(1 - write gate)"),
    "write_gate_histogram": Field(("layer", "slot", "share"), "whole chunks by their write gate, in thousandths"),
    "write_entropy_sum": Field(("layer", "slot"), "sum over whole chunks of the relative entropy of the slot's "
                               "attention over the chunk's tokens"),
    "write_entropy_histogram": Field(("layer", "slot", "share"), "whole chunks by that entropy, in thousandths"),
    **contexts_fields("read", ("layer", "slot"), "read gate times attention on the slot"),
    **contexts_fields("write", ("layer", "slot"), "write gate times attention on the token, in whole chunks"),
}  # fmt: skip


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    num_layers = batch["workspace", "read_address"].shape[1]
    blocks = [_block(batch, y) for y in range(num_layers)]
    return {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}


def _block(batch: Batch, y: int) -> Arrays:
    read_NLS = batch["workspace", "read_address"][:, y].astype(np.float64)
    gate_NL = batch["workspace", "read_gate"][:, y].astype(np.float64)
    write_NLS = batch["workspace", "write_address"][:, y].astype(np.float64)
    write_gate_NCS = batch["workspace", "write_gate"][:, y].astype(np.float64)
    num_positions, num_slots = read_NLS.shape[1:]
    chunk_size, num_chunks = batch.config["workspace_chunk_size"], write_gate_NCS.shape[1]
    mask_NL = valid_mask(batch.samples.length, num_positions)
    read_NLS, gate_NL = np.where(mask_NL[..., None], read_NLS, 0.0), np.where(mask_NL, gate_NL, 0.0)
    whole_NC = valid_mask(batch.samples.length // chunk_size, num_chunks)
    edges = position_edges(num_positions)
    position_L = np.arange(num_positions, dtype=np.int64)

    def by_position(values_NL: FloatArray) -> FloatArray:
        return np.add.reduceat(values_NL.sum(axis=0), edges[:-1], axis=0)

    read_entropy_NL = np.where(mask_NL, _relative_entropy(read_NLS), 0.0)
    num_whole = num_positions // chunk_size
    cells = write_NLS[:, : num_whole * chunk_size]
    address_NCST = cells.reshape(len(cells), num_whole, chunk_size, num_slots).swapaxes(2, 3)
    write_entropy_MS = _relative_entropy(address_NCST[whole_NC[:, :num_whole]])
    write_gate_MS = write_gate_NCS[whole_NC]
    gated_NLS = gate_NL[..., None] * read_NLS
    is_written_NL = whole_NC[:, position_L // chunk_size]
    written_NLS = np.where(
        is_written_NL[..., None], write_NLS * write_gate_NCS[:, position_L // chunk_size], -1.0
    )
    with np.errstate(divide="ignore"):
        log_sum_S = np.log1p(-write_gate_MS).sum(axis=0)
    return {
        "read_by_position": by_position(read_NLS),
        "read_by_domain": sum_by_domain(read_NLS.sum(axis=1), batch.samples),
        "gated_read_by_lag": _by_lag(
            gated_NLS, np.where(whole_NC[..., None], write_gate_NCS, 0.0), chunk_size
        ),
        "read_gate_by_position": by_position(gate_NL),
        "read_entropy_by_position": by_position(read_entropy_NL),
        "read_entropy_histogram": count(share_steps(read_entropy_NL[mask_NL]), SHARE_STEPS + 1),
        "write_gate_sum": write_gate_MS.sum(axis=0),
        "write_gate_log_sum": log_sum_S,
        "write_gate_histogram": _by_slot(write_gate_MS),
        "write_entropy_sum": write_entropy_MS.sum(axis=0),
        "write_entropy_histogram": _by_slot(write_entropy_MS),
        **best_contexts("read", _or_none(gated_NLS, mask_NL), position_L, batch.samples.first),
        **best_contexts("write", written_NLS, position_L, batch.samples.first),
    }


def _by_lag(gated_NLS: FloatArray, write_gate_NCS: FloatArray, chunk_size: int) -> FloatArray:
    """[S, C] `gated_read_by_lag`: of the content of a slot at chunk c, the candidate of chunk c' has the weight
    `gate_c' prod_{c' < j < c} (1 - gate_j)`, and what the slot started with the rest."""
    num_chunks = write_gate_NCS.shape[1]
    starts = np.arange(0, gated_NLS.shape[1], chunk_size)
    read_NCS = np.add.reduceat(gated_NLS, starts, axis=1)
    by_lag_SC = np.zeros((write_gate_NCS.shape[2], num_chunks))
    kept_NCS = np.ones_like(
        write_gate_NCS
    )  # of what was written `lag` chunks before, the part not overwritten since
    for lag in range(1, num_chunks):
        wrote_NCS = write_gate_NCS[:, :-lag]
        by_lag_SC[:, lag] = (wrote_NCS * kept_NCS[:, lag:] * read_NCS[:, lag:]).sum(axis=(0, 1))
        kept_NCS[:, lag:] *= 1 - wrote_NCS
    by_lag_SC[:, 0] = read_NCS.sum(axis=(0, 1)) - by_lag_SC.sum(axis=1)
    return by_lag_SC


def _relative_entropy(weight: FloatArray) -> FloatArray:
    """Entropy over the last axis over the logarithm of its size; 0 for a single choice. Weights need not sum to 1
    exactly: they are stored in 16 bits."""
    total = weight.sum(axis=-1, keepdims=True)
    share = weight / np.where(total > 0, total, 1.0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return entropy / np.log(max(2, weight.shape[-1]))


def _by_slot(share_MS: FloatArray) -> IntArray:
    """[S, SHARE_STEPS + 1] counts of each slot's shares."""
    num_slots, steps = share_MS.shape[1], SHARE_STEPS + 1
    return count(np.arange(num_slots) * steps + share_steps(share_MS), num_slots * steps).reshape(
        num_slots, steps
    )


def _or_none(score: FloatArray, mask: BoolArray) -> NDArray[Any]:
    """`score` with -1 (no context) where the mask is False."""
    return np.where(mask[..., None], score, -1.0)
