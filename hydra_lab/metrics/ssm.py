"""Metrics of the state-space path of one block: how large each head's state grows, and how long it remembers.

See `hydra_lab.metrics.arrays` for the shape suffixes.
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import AnyFloatArray, FloatArray, IntArray, check_shape, ratio, valid_mask


@dataclass(frozen=True, eq=False)
class StateRecord:
    """Recorded state summaries of one block: what the metrics below read.

    Attributes:
        layer: index of the block.
        norms: [N, C, H] Frobenius norm of each head's state at the end of each chunk.
        decay: [N, L, H] natural log of the factor by which the state decays at each token (<= 0).
        length: [N] tokens of each sample; entries past it are ignored.
        chunk_size: tokens per chunk.
    """

    layer: int
    norms: AnyFloatArray
    decay: AnyFloatArray
    length: IntArray
    chunk_size: int

    def __post_init__(self) -> None:
        num_samples, num_chunks, num_heads = self.norms.shape
        check_shape("decay", self.decay, (num_samples, None, num_heads))
        check_shape("length", self.length, (num_samples,))
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
    rate_H = np.abs(decay_MH.mean(axis=0, dtype=np.float64))
    rate_H2 = np.abs(np.quantile(decay_MH.astype(np.float32), [0.05, 0.95], axis=0)).T
    with np.errstate(divide="ignore"):
        return HalfLife(
            layer=record.layer,
            half_life=np.log(2) / rate_H,
            quantiles=np.log(2) / rate_H2,
            num_tokens=len(decay_MH),
            num_samples=len(record.length),
        )
