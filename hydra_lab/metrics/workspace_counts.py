"""What the metrics of the workspace read: the recorded reads and writes of some samples, or counts of them.

Every metric needs counts alone. They come from a record (`WorkspaceRecord.counts`) or, without any raw array, from a
capture's running summary (`WorkspaceCounts.from_summary`); the code that counts is the same. See
`hydra_lab.metrics.arrays` for the shape suffixes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hydra_lab.metrics.arrays import (
    AnyFloatArray,
    FloatArray,
    IntArray,
    check_shape,
    histogram_quantiles,
    summarized_block,
    total_tokens,
)
from hydra_lab.summaries import SHARE_STEPS, Summary, position_edges
from hydra_lab.summaries.workspace import Slots, sum_reads, sum_reads_by_lag, sum_writes

_QUANTILES = (0.05, 0.95)
_SAMPLES_AT_ONCE = 64
"""Samples whose reads are held in 64 bits at a time."""


@dataclass(frozen=True, eq=False)
class WorkspaceRecord:
    """Recorded reads and writes of one block.

    Attributes:
        layer: index of the block.
        read_address: [N, L, S] attention of each token over the slots.
        read_gate: [N, L] read gate, 0..1.
        write_gate: [N, C, S] share of the slot replaced at the end of each chunk, 0..1.
        length: [N] tokens of each sample; entries past it are ignored.
        chunk_size: tokens per chunk.
        write_address: [N, L, S] attention of each slot over the tokens of the chunk that holds the token; None
            where it was not read.
    """

    layer: int
    read_address: AnyFloatArray
    read_gate: AnyFloatArray
    write_gate: AnyFloatArray
    length: IntArray
    chunk_size: int
    write_address: AnyFloatArray | None = None

    def __post_init__(self) -> None:
        num_samples, num_positions, num_slots = self.read_address.shape
        check_shape("read_gate", self.read_gate, (num_samples, num_positions))
        check_shape("write_gate", self.write_gate, (num_samples, None, num_slots))
        check_shape("length", self.length, (num_samples,))
        if self.write_gate.shape[1] * self.chunk_size < num_positions:
            raise ValueError(
                f"write_gate has {self.write_gate.shape[1]} chunks of {self.chunk_size} tokens, "
                f"read_address {num_positions} positions"
            )
        if self.write_address is not None:
            check_shape("write_address", self.write_address, self.read_address.shape)

    @cached_property
    def counts(self) -> "WorkspaceCounts":
        """What the metrics need of the record, counted once."""
        num_samples, num_positions, _ = self.read_address.shape
        edges = np.arange(num_positions + 1, dtype=np.int64)
        sums: dict[str, Any] = {}
        gates: list[FloatArray] = []
        entropies: list[FloatArray] = []
        for start in range(0, max(1, num_samples), _SAMPLES_AT_ONCE):
            slots = self._slots(slice(start, start + _SAMPLES_AT_ONCE))
            for name, value in {
                **sum_reads(slots, edges),
                **sum_reads_by_lag(slots),
                **sum_writes(slots),
            }.items():
                sums[name] = sums.get(name, 0.0) + value
            gates.append(slots.written_gate)
            if self.write_address is not None:
                entropies.append(slots.write_entropy)
        return WorkspaceCounts(
            layer=self.layer,
            chunk_size=self.chunk_size,
            length=np.bincount(self.length, minlength=num_positions + 1).astype(np.int64),
            edges=edges,
            write_gate_quantiles=_quantiles(np.concatenate(gates)),
            write_entropy_quantiles=_quantiles(np.concatenate(entropies)) if entropies else None,
            **sums,
        )

    def _slots(self, samples: slice) -> Slots:
        return Slots(
            read_address=self.read_address[samples],
            read_gate=self.read_gate[samples],
            write_gate=self.write_gate[samples],
            write_address=None if self.write_address is None else self.write_address[samples],
            length=self.length[samples],
            chunk_size=self.chunk_size,
        )


@dataclass(frozen=True, eq=False)
class WorkspaceCounts:
    """Counts of the reads and writes of one block.

    Attributes:
        layer: index of the block.
        chunk_size: tokens per chunk.
        length: [L+1] samples with 0, 1, ... L tokens.
        edges: [V+1] edges of the bins of positions, in tokens.
        read_by_position: [V, S] sum over the bin's tokens of the attention on the slot.
        read_gate_by_position: [V] sum over the bin's tokens of the read gate.
        read_entropy_by_position: [V] sum over the bin's tokens of the relative entropy of their attention, 0..1.
        gated_read_entropy: [] sum over tokens of read gate times that entropy.
        gated_read_by_lag: [S, C] sum over tokens of read gate times attention on the slot, by the age of what is read
            there, in chunks; entry 0: what the slot started with.
        gated_read_by_chunk: [C] sum over the tokens of the c-th chunk and all slots of read gate times attention.
        write_gate_sum: [S] sum over whole chunks of the write gate.
        write_gate_log_sum: [S] sum over whole chunks of ln(1 - write gate).
        write_gate_quantiles: [S, 2] 5 and 95% quantiles over whole chunks of the write gate; from a summary off by up
            to 0.0005; NaN where there is no such chunk.
        write_entropy_sum: [S] sum over whole chunks of the relative entropy of the slot's attention over the chunk's
            tokens, 0..1; None without write addresses.
        write_entropy_quantiles: [S, 2] its quantiles, as above; None without write addresses.
    """

    layer: int
    chunk_size: int
    length: IntArray
    edges: IntArray
    read_by_position: FloatArray
    read_gate_by_position: FloatArray
    read_entropy_by_position: FloatArray
    gated_read_entropy: FloatArray
    gated_read_by_lag: FloatArray
    gated_read_by_chunk: FloatArray
    write_gate_sum: FloatArray
    write_gate_log_sum: FloatArray
    write_gate_quantiles: FloatArray
    write_entropy_sum: FloatArray | None = None
    write_entropy_quantiles: FloatArray | None = None

    @classmethod
    def from_summary(cls, summary: Summary, layer: int, *, config: Mapping[str, Any]) -> "WorkspaceCounts":
        """The counts of one block that a capture's running summary holds.

        Args:
            config: the model's configuration as a dict.

        Raises:
            ValueError: the summary holds no workspace, or the block has none.
        """
        block = summarized_block(summary, "workspace", layer, config)
        length_L: IntArray = summary["tokens"]["length"].sum(axis=0)
        steps = np.arange(SHARE_STEPS + 1) / SHARE_STEPS
        summed = (
            "read_by_position",
            "read_gate_by_position",
            "read_entropy_by_position",
            "gated_read_entropy",
            "gated_read_by_lag",
            "gated_read_by_chunk",
            "write_gate_sum",
            "write_gate_log_sum",
            "write_entropy_sum",
        )
        return cls(
            layer=layer,
            chunk_size=int(config["workspace_chunk_size"]),
            length=length_L,
            edges=position_edges(len(length_L) - 1),
            write_gate_quantiles=histogram_quantiles(block["write_gate_histogram"], steps, _QUANTILES),
            write_entropy_quantiles=histogram_quantiles(block["write_entropy_histogram"], steps, _QUANTILES),
            **{name: block[name] for name in summed},
        )

    @property
    def num_slots(self) -> int:
        """S."""
        return self.read_by_position.shape[1]

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.length.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens, each of which reads."""
        return total_tokens(self.length)

    @property
    def num_chunks(self) -> int:
        """Whole chunks: those that are written."""
        return int(self.length @ (np.arange(len(self.length)) // self.chunk_size))


Workspace = WorkspaceRecord | WorkspaceCounts
"""What a metric of the workspace takes."""


def counts_of(workspace: Workspace) -> WorkspaceCounts:
    """The counts of a record, or the counts themselves."""
    return workspace.counts if isinstance(workspace, WorkspaceRecord) else workspace


def _quantiles(value_MS: FloatArray) -> FloatArray:
    """[S, 2] 5 and 95% quantiles, NaN where there are no values."""
    if len(value_MS) == 0:
        return np.full((value_MS.shape[1], 2), np.nan)
    return np.quantile(value_MS, _QUANTILES, axis=0).T
