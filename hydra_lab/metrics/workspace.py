"""Metrics of the workspace memory of one block: which slots are read when, and how long each one keeps what
it holds.

See `hydra_lab.metrics.arrays` for the shape suffixes. A slot's recurrence is
`M_{c+1} = (1 - gate_c) M_c + gate_c U_c`, once per chunk.
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import (
    AnyFloatArray,
    FloatArray,
    IntArray,
    bin_edges,
    check_shape,
    ratio,
    valid_mask,
)


@dataclass(frozen=True, eq=False)
class WorkspaceRecord:
    """Recorded reads and writes of one block: what the metrics below read.

    Attributes:
        layer: index of the block.
        read_address: [N, L, S] attention of each token over the slots.
        read_gate: [N, L] read gate, 0..1.
        write_gate: [N, C, S] share of the slot replaced at the end of each chunk, 0..1.
        length: [N] tokens of each sample; entries past it are ignored.
        chunk_size: tokens per chunk.
    """

    layer: int
    read_address: AnyFloatArray
    read_gate: AnyFloatArray
    write_gate: AnyFloatArray
    length: IntArray
    chunk_size: int

    def __post_init__(self) -> None:
        num_samples, num_positions, num_slots = self.read_address.shape
        check_shape("read_gate", self.read_gate, (num_samples, num_positions))
        check_shape("write_gate", self.write_gate, (num_samples, None, num_slots))
        check_shape("length", self.length, (num_samples,))


@dataclass(frozen=True, eq=False)
class SlotReads:
    """Attention on each slot as the text goes on.

    Attributes:
        layer: index of the block.
        edges: [V+1] edges of the position bins, in tokens from the start of the sample.
        read: [V, S] mean over the bin's tokens of the attention on the slot; sums to 1 over S; NaN where no
            sample is that long.
        gate: [V] mean read gate, 0..1.
        num_tokens: [V] tokens in the bin.
        num_samples: samples they come from.
    """

    layer: int
    edges: IntArray
    read: FloatArray
    gate: FloatArray
    num_tokens: IntArray
    num_samples: int


def slot_reads(record: WorkspaceRecord, num_bins: int = 128) -> SlotReads:
    """Mean attention on each slot by position, in `num_bins` bins; see `SlotReads`."""
    num_samples, num_positions, _ = record.read_address.shape
    edges = bin_edges(num_positions, num_bins)
    valid_NL = valid_mask(record.length, num_positions)
    read_LS = np.where(valid_NL[:, :, None], record.read_address, 0.0).sum(axis=0, dtype=np.float64)
    gate_L = np.where(valid_NL, record.read_gate, 0.0).sum(axis=0, dtype=np.float64)
    count_V = np.add.reduceat(valid_NL.sum(axis=0), edges[:-1])
    return SlotReads(
        layer=record.layer,
        edges=edges,
        read=ratio(np.add.reduceat(read_LS, edges[:-1], axis=0), count_V[:, None].astype(np.float64)),
        gate=ratio(np.add.reduceat(gate_L, edges[:-1]), count_V.astype(np.float64)),
        num_tokens=count_V.astype(np.int64),
        num_samples=num_samples,
    )


@dataclass(frozen=True, eq=False)
class SlotWrites:
    """How strongly each slot is written, and how long it keeps what it holds.

    Attributes:
        layer: index of the block.
        strength: [S] mean write gate (share of the slot replaced per chunk), 0..1.
        strength_quantiles: [S, 2] 5 and 95% quantiles of the write gate over chunks.
        retention: [S] geometric mean of 1 - gate: the share of the slot that survives one chunk, 0..1.
        half_life: [S] tokens until half of what a slot held is overwritten, chunk_size * ln 2 /
            -ln(retention); 0 where every write replaces the slot whole, inf where nothing is written.
        num_chunks: chunks counted.
        num_samples: samples they come from.
    """

    layer: int
    strength: FloatArray
    strength_quantiles: FloatArray
    retention: FloatArray
    half_life: FloatArray
    num_chunks: int
    num_samples: int


def slot_writes(record: WorkspaceRecord) -> SlotWrites:
    """Write strength, retention and half-life of each slot; see `SlotWrites`.

    Only whole chunks count: a sample's last, partial chunk is not written before more tokens come.

    Raises:
        ValueError: no sample has a whole chunk.
    """
    whole_NC = valid_mask(record.length // record.chunk_size, record.write_gate.shape[1])
    gate_MS = record.write_gate[whole_NC].astype(np.float64)
    if len(gate_MS) == 0:
        raise ValueError(f"no sample has a whole chunk of {record.chunk_size} tokens, so no slot is written")
    with np.errstate(divide="ignore"):
        log_retention_S = np.log1p(-gate_MS).mean(axis=0)
        half_life_S = record.chunk_size * np.log(2) / -log_retention_S
    return SlotWrites(
        layer=record.layer,
        strength=gate_MS.mean(axis=0),
        strength_quantiles=np.quantile(gate_MS, [0.05, 0.95], axis=0).T,
        retention=np.exp(log_retention_S),
        half_life=np.abs(half_life_S),
        num_chunks=len(gate_MS),
        num_samples=len(record.length),
    )
