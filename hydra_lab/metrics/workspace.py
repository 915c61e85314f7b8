"""Metrics of the workspace memory of one block: which slots are read when and how sharply, what is written into
them, how long each one keeps what it holds, and how old what is read is.

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
        if self.write_address is not None:
            check_shape("write_address", self.write_address, self.read_address.shape)


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
class ReadEntropy:
    """How many slots a token reads: Shannon entropy of its attention over the slots, relative to ln S.

    0: a token reads one slot; 1: it reads all alike. An entropy h is that of an even read of S^h slots.

    Attributes:
        layer: index of the block.
        edges: [V+1] edges of the position bins, in tokens from the start of the sample.
        by_position: [V] mean over the bin's tokens, 0..1; NaN where no sample is that long.
        mean: mean over all tokens, 0..1.
        mean_gated: mean over all tokens, each weighted by its read gate (what is read with the gate shut does not
            count), 0..1; NaN where every gate is zero.
        of_mean: entropy of the mean attention of all tokens, 0..1; never below `mean`. The gap says how much
            tokens differ in what they read: both high, every token reads everything; only this one high, each
            token reads few slots and different ones.
        num_slots: number of slots S.
        num_tokens: [V] tokens in the bin.
        num_samples: samples they come from.
    """

    layer: int
    edges: IntArray
    by_position: FloatArray
    mean: float
    mean_gated: float
    of_mean: float
    num_slots: int
    num_tokens: IntArray
    num_samples: int


def read_entropy(record: WorkspaceRecord, num_bins: int = 128) -> ReadEntropy:
    """How many slots a token reads, by position in `num_bins` bins; see `ReadEntropy`.

    Raises:
        ValueError: the record holds no token, or there is but one slot.
    """
    num_samples, num_positions, num_slots = record.read_address.shape
    edges = bin_edges(num_positions, num_bins)
    valid_NL = valid_mask(record.length, num_positions)
    if not valid_NL.any():
        raise ValueError("the record holds no token")
    sum_L, sum_gated, gate = np.zeros(num_positions), 0.0, 0.0
    read_S = np.zeros(num_slots)
    for address_LS, gate_L, valid_L in zip(record.read_address, record.read_gate, valid_NL, strict=True):
        address_MS = address_LS[valid_L]
        entropy_M = _relative_entropy(address_MS)
        sum_L[valid_L] += entropy_M
        sum_gated += float(gate_L[valid_L].astype(np.float64) @ entropy_M)
        gate += float(gate_L[valid_L].sum(dtype=np.float64))
        read_S += address_MS.sum(axis=0, dtype=np.float64)
    count_V = np.add.reduceat(valid_NL.sum(axis=0), edges[:-1])
    return ReadEntropy(
        layer=record.layer,
        edges=edges,
        by_position=ratio(np.add.reduceat(sum_L, edges[:-1]), count_V.astype(np.float64)),
        mean=float(sum_L.sum() / count_V.sum()),
        mean_gated=sum_gated / gate if gate > 0 else float("nan"),
        of_mean=float(_relative_entropy(read_S[None])[0]),
        num_slots=num_slots,
        num_tokens=count_V.astype(np.int64),
        num_samples=num_samples,
    )


@dataclass(frozen=True, eq=False)
class WriteEntropy:
    """How many of a chunk's tokens each slot takes in: Shannon entropy of the slot's attention over the chunk's
    tokens, relative to ln of their number.

    0: the slot copies one token; 1: it takes the mean of the chunk. An entropy h is that of an even mean over
    chunk_size^h tokens. Whether the slot then keeps what it took in is the write gate's matter (`SlotWrites`).

    Attributes:
        layer: index of the block.
        entropy: [S] mean over chunks, 0..1.
        quantiles: [S, 2] 5 and 95% quantiles over chunks.
        chunk_size: tokens per chunk.
        num_chunks: chunks counted.
        num_samples: samples they come from.
    """

    layer: int
    entropy: FloatArray
    quantiles: FloatArray
    chunk_size: int
    num_chunks: int
    num_samples: int


def write_entropy(record: WorkspaceRecord) -> WriteEntropy:
    """How many of a chunk's tokens each slot takes in; see `WriteEntropy`.

    Only whole chunks count: a sample's last, partial chunk is not written before more tokens come.

    Raises:
        ValueError: the record holds no write addresses, no sample has a whole chunk, or chunks are of one token.
    """
    if record.write_address is None:
        raise ValueError("the record holds no write addresses")
    num_samples, num_positions, num_slots = record.write_address.shape
    num_chunks = num_positions // record.chunk_size
    cells = record.write_address[:, : num_chunks * record.chunk_size]
    cells_NCTS = cells.reshape(num_samples, num_chunks, record.chunk_size, num_slots)
    address_MTS = cells_NCTS[valid_mask(record.length // record.chunk_size, num_chunks)]
    if len(address_MTS) == 0:
        raise ValueError(f"no sample has a whole chunk of {record.chunk_size} tokens, so no slot is written")
    entropy_MS = _relative_entropy(address_MTS, axis=1)
    return WriteEntropy(
        layer=record.layer,
        entropy=entropy_MS.mean(axis=0),
        quantiles=np.quantile(entropy_MS, [0.05, 0.95], axis=0).T,
        chunk_size=record.chunk_size,
        num_chunks=len(entropy_MS),
        num_samples=num_samples,
    )


def _relative_entropy(weight: AnyFloatArray, axis: int = -1) -> FloatArray:
    """Shannon entropy along an axis, relative to its maximum, of weights that need not sum to 1 exactly (they are
    stored in 16 bits)."""
    if weight.shape[axis] < 2:
        raise ValueError("the entropy of a choice of one is always 0 and has no relative size")
    weight = weight.astype(np.float64)
    total = weight.sum(axis=axis)
    weight_log_weight = weight * np.log(np.where(weight > 0, weight, 1.0))
    entropy = np.log(total) - weight_log_weight.sum(axis=axis) / total
    return entropy / np.log(weight.shape[axis])


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


@dataclass(frozen=True, eq=False)
class ReadLag:
    """Age of what is read from the slots.

    A slot's content is a weighted mean of everything that was offered to it: at chunk c, the candidate of chunk
    c' < c has weight `gate_c' prod_{c' < j < c} (1 - gate_j)`, and the learned content that the slot started
    with has `prod_{j < c} (1 - gate_j)`; these sum to 1. A token that reads the slot with weight
    `read gate * attention` reads each of them in that proportion. The lag of a part is c - c': 1 is the chunk just
    before the token's own. Weights say how the mean is made up, not how long the candidates' vectors are.

    Attributes:
        layer: index of the block.
        edges: [V+1] edges of the bins of lag, in chunks (doubling).
        share: [S, V+1] share of what is read from the slot by lag; the last column is the content that the slot
            started with. Sums to 1; NaN where the slot is never read.
        share_if_even: [V+1] the share were a slot always the plain mean of what it started with and all earlier
            chunks' candidates.
        mean_lag: [S] mean lag in chunks of what was written (the initial content left out); NaN where none is read.
        slot_share: [S] share of the read weight that falls on the slot; sums to 1 (NaN where nothing is read).
        chunk_size: tokens per chunk.
        num_tokens: tokens that read.
        num_samples: samples they come from.
    """

    layer: int
    edges: IntArray
    share: FloatArray
    share_if_even: FloatArray
    mean_lag: FloatArray
    slot_share: FloatArray
    chunk_size: int
    num_tokens: int
    num_samples: int


def read_lag(record: WorkspaceRecord) -> ReadLag:
    """How many chunks ago what is read from each slot was written; see `ReadLag`.

    Raises:
        ValueError: no token has an earlier chunk to read from.
    """
    num_samples, num_positions, num_slots = record.read_address.shape
    size = record.chunk_size
    num_chunks = -(-num_positions // size)
    if not (record.length > size).any():
        raise ValueError(f"no sample has a token after its first chunk of {size} tokens")
    valid_NL = valid_mask(record.length, num_positions)[..., None]
    gated_NLS = record.read_address.astype(np.float32) * record.read_gate[..., None].astype(np.float32)
    read_NLS = np.where(valid_NL, gated_NLS, 0.0)
    read_NCS = np.add.reduceat(
        read_NLS, np.arange(0, num_positions, size, dtype=np.int64), axis=1, dtype=np.float64
    )
    whole_NC = valid_mask(record.length // size, num_chunks)
    gate_NCS = np.where(whole_NC[..., None], record.write_gate[:, :num_chunks], 0.0).astype(np.float64)

    read_S = read_NCS.sum(axis=(0, 1))
    read_C = read_NCS.sum(axis=(0, 2))
    by_lag_CS = np.zeros((num_chunks, num_slots))
    even_C = np.zeros(num_chunks)
    kept_NCS = np.ones_like(
        gate_NCS
    )  # of what was written `lag` chunks before, the part not overwritten since
    for lag in range(1, num_chunks):
        wrote_NCS = gate_NCS[:, : num_chunks - lag]
        by_lag_CS[lag] = (wrote_NCS * kept_NCS[:, lag:] * read_NCS[:, lag:]).sum(axis=(0, 1))
        even_C[lag] = (read_C[lag:] / np.arange(lag + 1, num_chunks + 1, dtype=np.int64)).sum()
        kept_NCS[:, lag:] *= 1 - wrote_NCS

    edges = 2 ** np.arange(int(np.ceil(np.log2(num_chunks))) + 1)
    binned_VS = np.add.reduceat(by_lag_CS, edges[:-1], axis=0)
    binned_VS = np.concatenate([binned_VS, (read_S - by_lag_CS.sum(axis=0))[None]])
    even_V = np.add.reduceat(even_C, edges[:-1])
    even_V = np.append(even_V, read_C.sum() - even_C.sum())
    lag_S = np.arange(num_chunks, dtype=np.float64) @ by_lag_CS
    return ReadLag(
        layer=record.layer,
        edges=edges.astype(np.int64),
        share=ratio(binned_VS.T, read_S[:, None]),
        share_if_even=ratio(even_V, read_C.sum(keepdims=True)),
        mean_lag=ratio(lag_S, by_lag_CS.sum(axis=0)),
        slot_share=ratio(read_S, read_S.sum(keepdims=True)),
        chunk_size=size,
        num_tokens=int(valid_NL.sum()),
        num_samples=num_samples,
    )
