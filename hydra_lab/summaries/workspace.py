"""Summary of the workspace: which slots are read when, how sharply, how old what is read is, and what is written.

Only whole chunks are written: a sample's last, partial chunk is not written before more tokens come. Relative entropies
are Shannon entropies over the logarithm of the number of choices, 0 (one choice) to 1 (even).
"""

from dataclasses import dataclass
from functools import cached_property
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
    relative_entropy,
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
    "gated_read_by_chunk": Field(("layer", "chunk"), "sum over the chunk's tokens and all slots of read gate times "
                                 "attention"),
    "read_gate_by_position": Field(("layer", "position_bin"), "sum over the bin's tokens of the read gate"),
    "read_entropy_by_position": Field(("layer", "position_bin"), "sum over the bin's tokens of the relative entropy of "
                                      "their attention over the slots"),
    "gated_read_entropy": Field(("layer",), "sum over tokens of read gate times that entropy"),
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


@dataclass(frozen=True, eq=False)
class Slots:
    """Reads and writes of one block.

    Attributes:
        read_address: [N, L, S] attention of each token over the slots; entries past a sample's end are ignored, here
            and below.
        read_gate: [N, L] read gate.
        write_gate: [N, C, S] write gate of each chunk.
        write_address: [N, L, S] attention of each slot over the tokens of the chunk that holds the token; None where
            it was not read.
        length: [N] tokens of each sample.
        chunk_size: tokens per chunk.
    """

    read_address: NDArray[Any]
    read_gate: NDArray[Any]
    write_gate: NDArray[Any]
    write_address: NDArray[Any] | None
    length: IntArray
    chunk_size: int

    @cached_property
    def mask(self) -> BoolArray:
        """[N, L] True at the sample's own tokens."""
        return valid_mask(self.length, self.read_address.shape[1])

    @cached_property
    def whole(self) -> BoolArray:
        """[N, C] True for chunks that are whole, and so written."""
        return valid_mask(self.length // self.chunk_size, self.write_gate.shape[1])

    @cached_property
    def read(self) -> FloatArray:
        """[N, L, S] `read_address`, 0 past a sample's end."""
        return np.where(self.mask[..., None], self.read_address, 0.0).astype(np.float64)

    @cached_property
    def gate(self) -> FloatArray:
        """[N, L] `read_gate`, 0 past a sample's end."""
        return np.where(self.mask, self.read_gate, 0.0).astype(np.float64)

    @cached_property
    def gated_read(self) -> FloatArray:
        """[N, L, S] read gate times attention on the slot."""
        return self.gate[..., None] * self.read

    @cached_property
    def read_entropy(self) -> FloatArray:
        """[N, L] relative entropy of each token's attention over the slots, 0 past a sample's end."""
        return relative_entropy(self.read)

    @cached_property
    def written_gate(self) -> FloatArray:
        """[M, S] write gates of the M whole chunks."""
        return self.write_gate[self.whole].astype(np.float64)

    @cached_property
    def write_entropy(self) -> FloatArray:
        """[M, S] relative entropy of the slot's attention over the tokens of each whole chunk."""
        assert self.write_address is not None
        num_samples, num_positions, num_slots = self.write_address.shape
        num_whole = num_positions // self.chunk_size
        cells = self.write_address[:, : num_whole * self.chunk_size]
        address_NCST = cells.reshape(num_samples, num_whole, self.chunk_size, num_slots).swapaxes(2, 3)
        return relative_entropy(address_NCST[valid_mask(self.length // self.chunk_size, num_whole)])


def sum_reads(slots: Slots, edges: IntArray) -> Arrays:
    """What is read, by position in bins between `edges`."""

    def by_position(values_NL: FloatArray) -> FloatArray:
        return np.add.reduceat(values_NL.sum(axis=0), edges[:-1], axis=0)

    return {
        "read_by_position": by_position(slots.read),
        "read_gate_by_position": by_position(slots.gate),
        "read_entropy_by_position": by_position(slots.read_entropy),
        "gated_read_entropy": (slots.gate * slots.read_entropy).sum(),
    }


def sum_reads_by_lag(slots: Slots) -> Arrays:
    """What is read, by the age of what it is made of.

    Of the content of a slot at chunk c, the candidate of chunk c' has the weight `gate_c' prod_{c' < j < c}
    (1 - gate_j)`, and what the slot started with the rest.
    """
    starts = np.arange(0, slots.read.shape[1], slots.chunk_size)
    read_NCS = np.add.reduceat(slots.gated_read, starts, axis=1)
    num_chunks = read_NCS.shape[1]
    gate_NCS = np.where(slots.whole[..., None], slots.write_gate, 0.0).astype(np.float64)[:, :num_chunks]
    by_lag_SC = np.zeros((gate_NCS.shape[2], num_chunks))
    kept_NCS = np.ones_like(
        gate_NCS
    )  # of what was written `lag` chunks before, the part not overwritten since
    for lag in range(1, num_chunks):
        wrote_NCS = gate_NCS[:, : num_chunks - lag]
        by_lag_SC[:, lag] = (wrote_NCS * kept_NCS[:, lag:] * read_NCS[:, lag:]).sum(axis=(0, 1))
        kept_NCS[:, lag:] *= 1 - wrote_NCS
    by_lag_SC[:, 0] = read_NCS.sum(axis=(0, 1)) - by_lag_SC.sum(axis=1)
    return {"gated_read_by_lag": by_lag_SC, "gated_read_by_chunk": read_NCS.sum(axis=(0, 2))}


def sum_writes(slots: Slots) -> Arrays:
    """How strongly the whole chunks are written, and from how many of their tokens where that is known."""
    with np.errstate(divide="ignore"):
        log_sum_S = np.log1p(-slots.written_gate).sum(axis=0)
    sums: Arrays = {"write_gate_sum": slots.written_gate.sum(axis=0), "write_gate_log_sum": log_sum_S}
    if slots.write_address is not None:
        sums["write_entropy_sum"] = slots.write_entropy.sum(axis=0)
    return sums


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    num_layers = batch["workspace", "read_address"].shape[1]
    blocks = [_block(batch, y) for y in range(num_layers)]
    return {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}


def _block(batch: Batch, y: int) -> Arrays:
    names = ("read_address", "read_gate", "write_gate", "write_address")
    slots = Slots(
        *(batch["workspace", name][:, y] for name in names),
        length=batch.samples.length,
        chunk_size=batch.config["workspace_chunk_size"],
    )
    assert slots.write_address is not None
    num_positions = slots.read.shape[1]
    position_L = np.arange(num_positions, dtype=np.int64)
    chunk_L = position_L // slots.chunk_size
    written_NLS = np.where(
        slots.whole[:, chunk_L, None],
        slots.write_address.astype(np.float64) * slots.write_gate.astype(np.float64)[:, chunk_L],
        -1.0,
    )
    is_token_NL1 = slots.mask[..., None]
    return {
        **sum_reads(slots, position_edges(num_positions)),
        **sum_reads_by_lag(slots),
        **sum_writes(slots),
        "read_by_domain": sum_by_domain(slots.read.sum(axis=1), batch.samples),
        "read_entropy_histogram": count(share_steps(slots.read_entropy[slots.mask]), SHARE_STEPS + 1),
        "write_gate_histogram": _by_slot(slots.written_gate),
        "write_entropy_histogram": _by_slot(slots.write_entropy),
        **best_contexts(
            "read", np.where(is_token_NL1, slots.gated_read, -1.0), position_L, batch.samples.first
        ),
        **best_contexts("write", written_NLS, position_L, batch.samples.first),
    }


def _by_slot(share_MS: FloatArray) -> IntArray:
    """[S, SHARE_STEPS + 1] counts of each slot's shares."""
    num_slots, steps = share_MS.shape[1], SHARE_STEPS + 1
    return count(np.arange(num_slots) * steps + share_steps(share_MS), num_slots * steps).reshape(
        num_slots, steps
    )
