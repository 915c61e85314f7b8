"""Metrics of how the state-space path's states grow with the context, and whether they have stopped.

A state that still grows where the training texts end takes values in longer texts that training never showed: the
"unexplored states" of Buitrago Ruiz & Gu (arXiv 2507.02782). "Stuffed Mamba" (arXiv 2410.07145) traces the same
failure to states so large that training never made the model forget, and its code plots their mean and variance by
position. We found no accepted figure for "has stopped growing"; those below are ours.

See `hydra_lab.metrics.arrays` for the shape suffixes.
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import AnyFloatArray, BoolArray, FloatArray, IntArray, ratio, valid_mask
from hydra_lab.metrics.ssm_counts import States, record_for

TOLERANCE = 0.05
"""Growth of a state's norm with a doubling of the context, in doublings, that counts as none: 0.05 is 3.5%."""

FEWEST_CHUNKS = 4
"""Whole chunks that a sample needs to have a middle and an end."""


@dataclass(frozen=True, eq=False)
class NormGrowth:
    """How the norm of each head's state grows with the context.

    `slope` is a in norm ~ context^a: 0 where the state's size has settled; 0.5 where it adds up unrelated writes
    and forgets nothing; 1 where it adds up the same write again and again.

    Attributes:
        layer: index of the block.
        position: [V] tokens read: one chunk, and twice, four times, eight times as many.
        mean: [V, H] geometric mean over samples of the state's Frobenius norm there (unit of the state).
        slope: [H] doublings of the norm per doubling of the context: mean over samples of the least-squares line
            through log norm against log position, at the positions above; NaN where no sample has two of them.
        slope_error: [H] standard error of that mean; NaN below two samples.
        num_samples: [V] samples that reach the position.
    """

    layer: int
    position: IntArray
    mean: FloatArray
    slope: FloatArray
    slope_error: FloatArray
    num_samples: IntArray


def norm_growth(states: States) -> NormGrowth:
    """Growth of each head's state norm per doubling of the context; see `NormGrowth`.

    The line is fitted at doublings alone, so that every doubling of the context weighs the same. A head's samples in
    which the state is exactly zero at one of the positions are left out.

    Raises:
        ValueError: no sample has a whole chunk, or `states` are counts.
    """
    record = record_for("norm_growth", states)
    chunks_N = record.length // record.chunk_size
    if not (chunks_N > 0).any():
        raise ValueError(f"no sample has a whole chunk of {record.chunk_size} tokens")
    doublings_V = np.arange(int(np.log2(chunks_N.max())) + 1)
    reached_NV = valid_mask(chunks_N, int(chunks_N.max()))[:, 2**doublings_V - 1]
    log_NVH = np.where(reached_NV[..., None], _log2(record.norms[:, 2**doublings_V - 1]), np.nan)
    mean_VH = np.stack([_mean_and_error(log_NVH[:, v])[0] for v in doublings_V])

    fitted = reached_NV.sum(axis=1) >= 2
    weight_NV = reached_NV[fitted].astype(np.float64)
    centre_N = weight_NV @ doublings_V / weight_NV.sum(axis=1)
    from_centre_NV = weight_NV * (doublings_V - centre_N[:, None])
    filled_NVH = np.where(reached_NV[fitted][..., None], log_NVH[fitted], 0.0)  # a zero state stays NaN
    slope_NH = np.einsum("nv,nvh->nh", from_centre_NV, filled_NVH) / (from_centre_NV**2).sum(axis=1)[:, None]
    slope_H, error_H = _mean_and_error(slope_NH)
    return NormGrowth(
        layer=record.layer,
        position=(record.chunk_size * 2**doublings_V).astype(np.int64),
        mean=2**mean_VH,
        slope=slope_H,
        slope_error=error_H,
        num_samples=reached_NV.sum(axis=0).astype(np.int64),
    )


@dataclass(frozen=True, eq=False)
class StateSaturation:
    """Whether the norm of each head's state has stopped growing at the end of the samples.

    Attributes:
        layer: index of the block.
        growth: [H] doublings of the norm with the last doubling of the context: mean over samples of
            log2(norm at 2p / norm at p), over chunk ends p from 3/8 to 1/2 of the sample. 0 where the state has
            settled; 2^growth is the ratio of the late to the middle norm.
        error: [H] standard error of that mean over samples; NaN below two samples.
        growth_if_random: [H] the growth were writes unrelated to each other and of equal size, with the head's own
            mean decay a per token: log2(1 + a^2p) / 2, which falls from 0.5 (nothing is forgotten) to 0.
        saturated: [H] growth lies below `tolerance` with its whole 95% interval (growth +- 1.96 error).
        growing: [H] growth lies above `tolerance` with its whole 95% interval. A head that is neither is undecided.
        tolerance: growth that counts as none, doublings per doubling.
        contexts: tokens of the shortest and of the longest sample that counts.
        num_samples: samples that count.
    """

    layer: int
    growth: FloatArray
    error: FloatArray
    growth_if_random: FloatArray
    saturated: BoolArray
    growing: BoolArray
    tolerance: float
    contexts: tuple[int, int]
    num_samples: int


def state_saturation(states: States, *, tolerance: float = TOLERANCE) -> StateSaturation:
    """Late over middle state norm of each head, and whether it has stopped growing; see `StateSaturation`.

    Samples of fewer than `FEWEST_CHUNKS` whole chunks do not count.

    Raises:
        ValueError: no sample is long enough, or `states` are counts.
    """
    record = record_for("state_saturation", states)
    chunks_N = record.length // record.chunk_size
    long_enough = np.flatnonzero(chunks_N >= FEWEST_CHUNKS)
    if len(long_enough) == 0:
        raise ValueError(f"no sample has {FEWEST_CHUNKS} whole chunks of {record.chunk_size} tokens")
    valid_NL = valid_mask(record.length, record.decay.shape[1])
    growth_NH, random_NH = np.zeros((2, len(long_enough), record.norms.shape[2]))
    for row, n in enumerate(long_enough):
        middle_P = np.arange(3 * chunks_N[n] // 8 + 1, chunks_N[n] // 2 + 1, dtype=np.int64)
        log_CH = _log2(record.norms[n])
        growth_NH[row] = (log_CH[2 * middle_P - 1] - log_CH[middle_P - 1]).mean(axis=0)
        log_decay_H = record.decay[n][valid_NL[n]].mean(axis=0, dtype=np.float64)
        kept_PH = np.exp(2 * record.chunk_size * middle_P[:, None] * log_decay_H)
        random_NH[row] = (np.log2(1 + kept_PH) / 2).mean(axis=0)
    growth_H, error_H = _mean_and_error(growth_NH)
    lengths = record.length[long_enough]
    return StateSaturation(
        layer=record.layer,
        growth=growth_H,
        error=error_H,
        growth_if_random=random_NH.mean(axis=0),
        saturated=growth_H + 1.96 * error_H < tolerance,
        growing=growth_H - 1.96 * error_H > tolerance,
        tolerance=tolerance,
        contexts=(int(lengths.min()), int(lengths.max())),
        num_samples=len(long_enough),
    )


def _log2(norms: AnyFloatArray) -> FloatArray:
    """Base-2 logarithm, NaN where a norm is zero."""
    logarithm = np.full(norms.shape, np.nan)
    return np.log2(norms.astype(np.float64), out=logarithm, where=norms > 0)


def _mean_and_error(value_NH: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean over the samples that have a value, and its standard error: NaN below one and two of them."""
    known_NH = ~np.isnan(value_NH)
    count_H = known_NH.sum(axis=0).astype(np.float64)
    mean_H = ratio(np.where(known_NH, value_NH, 0.0).sum(axis=0), count_H)
    squares_H = (np.where(known_NH, value_NH - mean_H, 0.0) ** 2).sum(axis=0)
    return mean_H, np.sqrt(ratio(squares_H, np.maximum(count_H - 1, 0.0) * count_H))
