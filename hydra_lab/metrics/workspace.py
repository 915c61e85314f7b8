"""Metrics of the workspace memory of one block: which slots are read when and how sharply, what is written into
them, how long each one keeps what it holds, and how old what is read is.

See `hydra_lab.metrics.arrays` for the shape suffixes. A slot's recurrence is
`M_{c+1} = (1 - gate_c) M_c + gate_c U_c`, once per chunk. The metrics read counts alone, so they take a record or
counts (`hydra_lab.metrics.workspace_counts`).
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import (
    FloatArray,
    IntArray,
    binned_tokens,
    ratio,
    rebinned,
    relative_entropy,
)
from hydra_lab.metrics.workspace_counts import Workspace, WorkspaceCounts, counts_of


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


def slot_reads(workspace: Workspace, num_bins: int = 128) -> SlotReads:
    """Mean attention on each slot by position, in `num_bins` bins; see `SlotReads`.

    Raises:
        ValueError: the counts' bins of positions cannot be put together to that many.
    """
    counts = counts_of(workspace)
    edges, tokens_V = binned_tokens(counts.length, num_bins)
    read_VS = rebinned(counts.read_by_position, counts.edges, edges, axis=0)
    gate_V = rebinned(counts.read_gate_by_position, counts.edges, edges, axis=0)
    return SlotReads(
        layer=counts.layer,
        edges=edges,
        read=ratio(read_VS, tokens_V[:, None].astype(np.float64)),
        gate=ratio(gate_V, tokens_V.astype(np.float64)),
        num_tokens=tokens_V,
        num_samples=counts.num_samples,
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


def read_entropy(workspace: Workspace, num_bins: int = 128) -> ReadEntropy:
    """How many slots a token reads, by position in `num_bins` bins; see `ReadEntropy`.

    Raises:
        ValueError: there is no token, or there is but one slot, or the counts' bins of positions cannot be put
            together to that many.
    """
    counts = counts_of(workspace)
    if counts.num_tokens == 0:
        raise ValueError("the record holds no token")
    if counts.num_slots < 2:
        raise _choice_of_one()
    edges, tokens_V = binned_tokens(counts.length, num_bins)
    entropy_V = rebinned(counts.read_entropy_by_position, counts.edges, edges, axis=0)
    gate = counts.read_gate_by_position.sum()
    return ReadEntropy(
        layer=counts.layer,
        edges=edges,
        by_position=ratio(entropy_V, tokens_V.astype(np.float64)),
        mean=float(entropy_V.sum() / counts.num_tokens),
        mean_gated=float(counts.gated_read_entropy / gate) if gate > 0 else float("nan"),
        of_mean=float(relative_entropy(counts.read_by_position.sum(axis=0))),
        num_slots=counts.num_slots,
        num_tokens=tokens_V,
        num_samples=counts.num_samples,
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
        quantiles: [S, 2] 5 and 95% quantiles over chunks; from a summary they are off by up to 0.0005.
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


def write_entropy(workspace: Workspace) -> WriteEntropy:
    """How many of a chunk's tokens each slot takes in; see `WriteEntropy`.

    Only whole chunks count: a sample's last, partial chunk is not written before more tokens come.

    Raises:
        ValueError: there are no write addresses, no sample has a whole chunk, or chunks are of one token.
    """
    counts = counts_of(workspace)
    if counts.write_entropy_sum is None or counts.write_entropy_quantiles is None:
        raise ValueError("the record holds no write addresses")
    _check_whole_chunks(counts)
    if counts.chunk_size < 2:
        raise _choice_of_one()
    return WriteEntropy(
        layer=counts.layer,
        entropy=counts.write_entropy_sum / counts.num_chunks,
        quantiles=counts.write_entropy_quantiles,
        chunk_size=counts.chunk_size,
        num_chunks=counts.num_chunks,
        num_samples=counts.num_samples,
    )


def _choice_of_one() -> ValueError:
    return ValueError("the entropy of a choice of one is always 0 and has no relative size")


def _check_whole_chunks(counts: WorkspaceCounts) -> None:
    if counts.num_chunks == 0:
        raise ValueError(f"no sample has a whole chunk of {counts.chunk_size} tokens, so no slot is written")


@dataclass(frozen=True, eq=False)
class SlotWrites:
    """How strongly each slot is written, and how long it keeps what it holds.

    Attributes:
        layer: index of the block.
        strength: [S] mean write gate (share of the slot replaced per chunk), 0..1.
        strength_quantiles: [S, 2] 5 and 95% quantiles of the write gate over chunks; from a summary they are off by
            up to 0.0005.
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


def slot_writes(workspace: Workspace) -> SlotWrites:
    """Write strength, retention and half-life of each slot; see `SlotWrites`.

    Only whole chunks count: a sample's last, partial chunk is not written before more tokens come.

    Raises:
        ValueError: no sample has a whole chunk.
    """
    counts = counts_of(workspace)
    _check_whole_chunks(counts)
    log_retention_S = counts.write_gate_log_sum / counts.num_chunks
    with np.errstate(divide="ignore"):
        half_life_S = counts.chunk_size * np.log(2) / -log_retention_S
    return SlotWrites(
        layer=counts.layer,
        strength=counts.write_gate_sum / counts.num_chunks,
        strength_quantiles=counts.write_gate_quantiles,
        retention=np.exp(log_retention_S),
        half_life=np.abs(half_life_S),
        num_chunks=counts.num_chunks,
        num_samples=counts.num_samples,
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


def read_lag(workspace: Workspace) -> ReadLag:
    """How many chunks ago what is read from each slot was written; see `ReadLag`.

    Raises:
        ValueError: no token has an earlier chunk to read from.
    """
    counts = counts_of(workspace)
    if not counts.length[counts.chunk_size + 1 :].any():
        raise ValueError(f"no sample has a token after its first chunk of {counts.chunk_size} tokens")
    num_chunks = len(counts.gated_read_by_chunk)
    initial_S, by_lag_SC = counts.gated_read_by_lag[:, 0], counts.gated_read_by_lag.copy()
    by_lag_SC[:, 0] = 0.0
    # A token of chunk c would read 1 / (c + 1) of each earlier chunk, and as much of what the slot started with.
    each_C = counts.gated_read_by_chunk / np.arange(1, num_chunks + 1)
    even_C = np.append(0.0, np.cumsum(each_C[::-1])[::-1][1:])

    edges = 2 ** np.arange(int(np.ceil(np.log2(num_chunks))) + 1)
    share_SV = np.column_stack([np.add.reduceat(by_lag_SC, edges[:-1], axis=1), initial_S])
    even_V = np.append(np.add.reduceat(even_C, edges[:-1]), each_C.sum())
    read_S = counts.gated_read_by_lag.sum(axis=1)
    return ReadLag(
        layer=counts.layer,
        edges=edges.astype(np.int64),
        share=ratio(share_SV, read_S[:, None]),
        share_if_even=ratio(even_V, even_V.sum(keepdims=True)),
        mean_lag=ratio(by_lag_SC @ np.arange(num_chunks, dtype=np.float64), by_lag_SC.sum(axis=1)),
        slot_share=ratio(read_S, read_S.sum(keepdims=True)),
        chunk_size=counts.chunk_size,
        num_tokens=counts.num_tokens,
        num_samples=counts.num_samples,
    )
