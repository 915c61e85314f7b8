"""Metrics of the state-space path of one block: how large each head's state is, and how fast it forgets.

See `hydra_lab.metrics.arrays` for the shape suffixes, `hydra_lab.metrics.ssm_growth` for how the state grows with
the context and `hydra_lab.metrics.ssm_reach` for how far back it reaches.
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import (
    AnyFloatArray,
    FloatArray,
    IntArray,
    bin_edges,
    check_shape,
    domain_codes,
    ratio,
    valid_mask,
)


@dataclass(frozen=True, eq=False)
class StateRecord:
    """Recorded state summaries of one block: what the metrics below read.

    Attributes:
        layer: index of the block.
        norms: [N, C, H] Frobenius norm of each head's state at the end of each chunk.
        decay: [N, L, H] natural log of the factor by which the state decays at each token (<= 0).
        length: [N] tokens of each sample; entries past it are ignored.
        chunk_size: tokens per chunk.
        domains: [N] domain label of each sample; empty where they were not read.
    """

    layer: int
    norms: AnyFloatArray
    decay: AnyFloatArray
    length: IntArray
    chunk_size: int
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        num_samples, num_chunks, num_heads = self.norms.shape
        check_shape("decay", self.decay, (num_samples, None, num_heads))
        check_shape("length", self.length, (num_samples,))
        if self.domains and len(self.domains) != num_samples:
            raise ValueError(f"domains has {len(self.domains)} labels, the record {num_samples} samples")
        if num_samples and -(-int(self.length.max()) // self.chunk_size) > num_chunks:
            raise ValueError(
                f"norms has {num_chunks} chunks of {self.chunk_size} tokens, "
                f"the longest sample has {self.length.max()} tokens"
            )


@dataclass(frozen=True, eq=False)
class StateNorms:
    """Size of each head's state as the text goes on.

    Attributes:
        layer: index of the block.
        position: [C] tokens read at the end of each chunk.
        mean: [C, H] mean over samples of the state's Frobenius norm (unit of the state); NaN where no sample
            is that long.
        spread: [C, H] standard deviation over samples; NaN below two samples.
        num_samples: [C] samples that reach the chunk's end.
    """

    layer: int
    position: IntArray
    mean: FloatArray
    spread: FloatArray
    num_samples: IntArray


def state_norms(record: StateRecord) -> StateNorms:
    """Mean state norm of each head at each chunk's end, over the samples that reach it; see `StateNorms`.

    A sample's last chunk counts only when it is whole, except where every sample ends in the same place.
    """
    num_samples, num_chunks, _ = record.norms.shape
    ends = record.chunk_size * np.arange(1, num_chunks + 1, dtype=np.int64)
    if num_samples and (record.length == record.length[0]).all():
        ends = np.minimum(ends, record.length[0])
    reached_NC = ends <= record.length[:, None]
    reached_NC[:, 1:] &= np.diff(ends) > 0
    count_C = reached_NC.sum(axis=0).astype(np.float64)
    norms = np.where(reached_NC[:, :, None], record.norms, 0.0).astype(np.float64)
    mean_CH = ratio(norms.sum(axis=0), count_C[:, None])
    deviation = np.where(reached_NC[:, :, None], record.norms - mean_CH, 0.0)
    variance_CH = ratio((deviation**2).sum(axis=0), np.maximum(count_C - 1, 0.0)[:, None])
    return StateNorms(
        layer=record.layer,
        position=ends.astype(np.int64),
        mean=mean_CH,
        spread=np.sqrt(variance_CH),
        num_samples=count_C.astype(np.int64),
    )


@dataclass(frozen=True, eq=False)
class HalfLife:
    """How long each head remembers.

    Attributes:
        layer: index of the block.
        half_life: [H] tokens until half of what the state held has decayed at the head's mean rate,
            ln 2 / -mean(log decay); inf where nothing decays.
        quantiles: [H, 2] half-lives in tokens at the 95 and 5% quantiles of the per-token decay rate: the
            head at its most forgetful and at its most retentive.
        num_tokens: tokens counted.
        num_samples: samples they come from.
    """

    layer: int
    half_life: FloatArray
    quantiles: FloatArray
    num_tokens: int
    num_samples: int


def half_life(record: StateRecord) -> HalfLife:
    """Half-life of each head's state in tokens; see `HalfLife`.

    Raises:
        ValueError: the record holds no token.
    """
    decay_MH = record.decay[valid_mask(record.length, record.decay.shape[1])]
    if len(decay_MH) == 0:
        raise ValueError("the record holds no token")
    return HalfLife(
        layer=record.layer,
        half_life=_half_life_at(decay_MH.mean(axis=0, dtype=np.float64)),
        quantiles=_half_life_at(np.quantile(decay_MH.astype(np.float32), [0.05, 0.95], axis=0).T),
        num_tokens=len(decay_MH),
        num_samples=len(record.length),
    )


@dataclass(frozen=True, eq=False)
class HalfLifeByPosition:
    """How long each head remembers what it holds at different places of the text.

    Attributes:
        layer: index of the block.
        edges: [V+1] edges of the position bins, in tokens from the start of the sample.
        half_life: [V, H] tokens until half of what the state held has decayed at the head's mean rate over the
            bin's tokens (as in `HalfLife`); inf where nothing decays, NaN where no sample is that long.
        num_tokens: [V] tokens in the bin.
        num_samples: samples they come from.
    """

    layer: int
    edges: IntArray
    half_life: FloatArray
    num_tokens: IntArray
    num_samples: int


def half_life_by_position(record: StateRecord, num_bins: int = 16) -> HalfLifeByPosition:
    """Half-life of each head's state by position, in `num_bins` bins; see `HalfLifeByPosition`."""
    num_positions = record.decay.shape[1]
    edges = bin_edges(num_positions, num_bins)
    valid_NL = valid_mask(record.length, num_positions)
    sum_LH = np.where(valid_NL[..., None], record.decay, 0.0).sum(axis=0, dtype=np.float64)
    count_V = np.add.reduceat(valid_NL.sum(axis=0), edges[:-1])
    rate_VH = ratio(-np.add.reduceat(sum_LH, edges[:-1], axis=0), count_V[:, None].astype(np.float64))
    return HalfLifeByPosition(
        layer=record.layer,
        edges=edges,
        half_life=_half_life_at(rate_VH),
        num_tokens=count_V.astype(np.int64),
        num_samples=len(record.length),
    )


@dataclass(frozen=True, eq=False)
class HalfLifeByDomain:
    """How long each head remembers in each kind of text.

    Attributes:
        layer: index of the block.
        domains: [Z] names.
        half_life: [Z, H] tokens until half of what the state held has decayed at the head's mean rate over the
            domain's tokens (as in `HalfLife`); inf where nothing decays.
        num_tokens: [Z] tokens of the domain.
        num_samples: [Z] samples of the domain.
    """

    layer: int
    domains: tuple[str, ...]
    half_life: FloatArray
    num_tokens: IntArray
    num_samples: IntArray


def half_life_by_domain(record: StateRecord) -> HalfLifeByDomain:
    """Half-life of each head's state by domain; see `HalfLifeByDomain`.

    Raises:
        ValueError: the record holds no domains.
    """
    if not record.domains:
        raise ValueError("the record holds no domains")
    names, code_N = domain_codes(record.domains)
    valid_NL = valid_mask(record.length, record.decay.shape[1])
    sum_NH = np.where(valid_NL[..., None], record.decay, 0.0).sum(axis=1, dtype=np.float64)
    in_domain_ZN = code_N == np.arange(len(names))[:, None]
    num_tokens_Z = in_domain_ZN @ valid_NL.sum(axis=1)
    rate_ZH = ratio(-(in_domain_ZN @ sum_NH), num_tokens_Z[:, None].astype(np.float64))
    return HalfLifeByDomain(
        layer=record.layer,
        domains=names,
        half_life=_half_life_at(rate_ZH),
        num_tokens=num_tokens_Z.astype(np.int64),
        num_samples=in_domain_ZN.sum(axis=1).astype(np.int64),
    )


def _half_life_at(rate: AnyFloatArray) -> FloatArray:
    """Tokens until half is gone where the log of the state changes by `rate` per token, of either sign."""
    with np.errstate(divide="ignore"):
        return np.log(2) / np.abs(rate.astype(np.float64))
