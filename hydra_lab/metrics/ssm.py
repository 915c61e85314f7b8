"""Metrics of the state-space path of one block: how large each head's state is, and how fast it forgets.

See `hydra_lab.metrics.arrays` for the shape suffixes, `hydra_lab.metrics.ssm_growth` for how the state grows with
the context and `hydra_lab.metrics.ssm_reach` for how far back it reaches. The metrics here read counts alone, so they
take a record or counts (`hydra_lab.metrics.ssm_counts`).
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import FloatArray, IntArray, binned_tokens, ratio, rebinned
from hydra_lab.metrics.ssm_counts import States, counts_of


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


def state_norms(states: States) -> StateNorms:
    """Mean state norm of each head at each chunk's end, over the samples that reach it; see `StateNorms`.

    A sample's last chunk counts only when it is whole, except where every sample ends in the same place.
    """
    counts = counts_of(states)
    size, (num_chunks, _) = counts.chunk_size, counts.norm_sum.shape
    length_L = counts.length.sum(axis=0)
    ends_C = size * np.arange(1, num_chunks + 1, dtype=np.int64)
    samples_C = np.array([length_L[end:].sum() for end in ends_C], dtype=np.int64)
    sum_CH, square_CH = counts.norm_sum, counts.norm_square
    found = np.flatnonzero(length_L)
    if len(found) == 1:
        common = int(found[0])
        ends_C = np.minimum(ends_C, common)
        if common % size:
            samples_C[common // size] = length_L[common]
            sum_CH, square_CH = sum_CH.copy(), square_CH.copy()
            sum_CH[common // size], square_CH[common // size] = counts.last_norm_sum, counts.last_norm_square
    mean_CH = ratio(sum_CH, samples_C[:, None].astype(np.float64))
    squares_CH = np.maximum(0.0, square_CH - sum_CH * np.nan_to_num(mean_CH))
    return StateNorms(
        layer=counts.layer,
        position=ends_C,
        mean=mean_CH,
        spread=np.sqrt(ratio(squares_CH, np.maximum(samples_C - 1.0, 0.0)[:, None])),
        num_samples=samples_C,
    )


@dataclass(frozen=True, eq=False)
class HalfLife:
    """How long each head remembers.

    Attributes:
        layer: index of the block.
        half_life: [H] tokens until half of what the state held has decayed at the head's mean rate,
            ln 2 / -mean(log decay); inf where nothing decays.
        quantiles: [H, 2] half-lives in tokens at the 95 and 5% quantiles of the per-token decay rate: the
            head at its most forgetful and at its most retentive. From a summary they are off by up to 4.4%, and
            those below ln 2 / 64 tokens are given as that.
        num_tokens: tokens counted.
        num_samples: samples they come from.
    """

    layer: int
    half_life: FloatArray
    quantiles: FloatArray
    num_tokens: int
    num_samples: int


def half_life(states: States) -> HalfLife:
    """Half-life of each head's state in tokens; see `HalfLife`.

    Raises:
        ValueError: there is no token.
    """
    counts = counts_of(states)
    if counts.num_tokens == 0:
        raise ValueError("the record holds no token")
    return HalfLife(
        layer=counts.layer,
        half_life=_half_life_at(counts.decay_by_position.sum(axis=0) / counts.num_tokens),
        quantiles=_half_life_at(counts.rate_quantiles),
        num_tokens=counts.num_tokens,
        num_samples=counts.num_samples,
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


def half_life_by_position(states: States, num_bins: int = 16) -> HalfLifeByPosition:
    """Half-life of each head's state by position, in `num_bins` bins; see `HalfLifeByPosition`.

    Raises:
        ValueError: the counts' bins of positions cannot be put together to that many.
    """
    counts = counts_of(states)
    edges, tokens_V = binned_tokens(counts.length.sum(axis=0), num_bins)
    decay_VH = rebinned(counts.decay_by_position, counts.edges, edges, axis=0)
    return HalfLifeByPosition(
        layer=counts.layer,
        edges=edges,
        half_life=_half_life_at(ratio(decay_VH, tokens_V[:, None].astype(np.float64))),
        num_tokens=tokens_V,
        num_samples=counts.num_samples,
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


def half_life_by_domain(states: States) -> HalfLifeByDomain:
    """Half-life of each head's state by domain; see `HalfLifeByDomain`.

    Raises:
        ValueError: the record holds no domains.
    """
    counts = counts_of(states)
    if not counts.domains:
        raise ValueError("the record holds no domains")
    tokens_Z = counts.length @ np.arange(counts.length.shape[1], dtype=np.int64)
    return HalfLifeByDomain(
        layer=counts.layer,
        domains=counts.domains,
        half_life=_half_life_at(ratio(counts.decay_by_domain, tokens_Z[:, None].astype(np.float64))),
        num_tokens=tokens_Z,
        num_samples=counts.length.sum(axis=1),
    )


def _half_life_at(rate: FloatArray) -> FloatArray:
    """Tokens until half is gone where the log of the state changes by `rate` per token, of either sign."""
    with np.errstate(divide="ignore"):
        return np.log(2) / np.abs(rate)
