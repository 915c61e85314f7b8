"""Metrics of how far back the state-space path reaches: by its decays alone, and by what each token really mixes in.

See `hydra_lab.metrics.arrays` for the shape suffixes. What token j wrote has at token t the weight
`exp(decay_{j+1} + ... + decay_t)` of what it had when it was written.
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import AnyFloatArray, FloatArray, IntArray, bin_edges, ratio
from hydra_lab.metrics.ssm_counts import StateRecord, States, record_for


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """How far back each head's decays let it see.

    Only tokens in the second half of each sample look back here, so that the start of the sample cuts off little;
    where it does, `reach` and `mean_distance` are too small, and `cut_off` says how often.

    Attributes:
        layer: index of the block.
        threshold: weight below which a token counts as forgotten, 0..1.
        reach: [H] median number of tokens, the reader's own among them, whose weight is at least `threshold`.
        quantiles: [H, 2] its 5 and 95% quantiles over tokens.
        cut_off: [H] share of the tokens for which even the sample's first token is not forgotten, 0..1.
        reach_at_mean_rate: [H] the reach were the head's mean log decay that of every token, without a start to cut
            it off: ln(threshold) / mean log decay + 1; inf where nothing decays.
        mean_distance: [H] mean distance in tokens from the reader to what it sees, each token by its weight, were
            all tokens to write alike; mean over readers. A decay a per token gives a / (1 - a).
        num_tokens: tokens that look back.
        num_samples: samples they come from.
    """

    layer: int
    threshold: float
    reach: FloatArray
    quantiles: FloatArray
    cut_off: FloatArray
    reach_at_mean_rate: FloatArray
    mean_distance: FloatArray
    num_tokens: int
    num_samples: int


def receptive_field(states: States, *, threshold: float = 0.01) -> ReceptiveField:
    """Tokens back until each head's decays fall under `threshold`; see `ReceptiveField`.

    Raises:
        ValueError: the record holds no token, `threshold` does not lie between 0 and 1, or `states` are counts.
    """
    record = record_for("receptive_field", states)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
    if record.length.sum() == 0:
        raise ValueError("the record holds no token")
    num_heads = record.decay.shape[2]
    reach_NMH: list[FloatArray] = []
    cut_off_NMH: list[FloatArray] = []
    log_decay_H = np.zeros(num_heads)
    for decay_LH, size in zip(record.decay, record.length.tolist(), strict=True):
        decay_LH = decay_LH[:size].astype(np.float64)
        log_decay_H += decay_LH.sum(axis=0)
        # Token j is remembered at t while forgotten_j >= forgotten_t + ln(threshold).
        forgotten_LH = -np.cumsum(decay_LH, axis=0)
        limit_LH = forgotten_LH + np.log(threshold)
        oldest_LH = np.zeros(decay_LH.shape, dtype=np.int64)
        for h in range(num_heads):
            oldest_LH[:, h] = np.searchsorted(forgotten_LH[:, h], limit_LH[:, h])
        half = size // 2
        reach_NMH.append((np.arange(1.0, size + 1)[:, None] - oldest_LH)[half:])
        cut_off_NMH.append((oldest_LH == 0)[half:].astype(np.float64))
    reach_MH = np.concatenate(reach_NMH)
    rate_H = -log_decay_H / float(record.length.sum())
    with np.errstate(divide="ignore"):
        at_mean_rate_H = -np.log(threshold) / np.abs(rate_H) + 1
    return ReceptiveField(
        layer=record.layer,
        threshold=threshold,
        reach=np.median(reach_MH, axis=0),
        quantiles=np.quantile(reach_MH, [0.05, 0.95], axis=0).T,
        cut_off=np.concatenate(cut_off_NMH).mean(axis=0),
        reach_at_mean_rate=at_mean_rate_H,
        mean_distance=_mean_distance_of_decays(record),
        num_tokens=len(reach_MH),
        num_samples=len(record.length),
    )


def _mean_distance_of_decays(record: StateRecord) -> FloatArray:
    """[H] mean over tokens j <= t of t - j, weighted by the product of the decays after j up to t; mean over the
    tokens t in the second half of each sample."""
    num_samples, num_positions, num_heads = record.decay.shape
    weight_NH, moment_NH = np.zeros((2, num_samples, num_heads))
    total_H = np.zeros(num_heads)
    for t in range(num_positions):
        # Everything moves one token away, fades, and the token itself comes in at distance 0 with weight 1.
        decay_NH = np.exp(record.decay[:, t].astype(np.float64))
        moment_NH = decay_NH * (moment_NH + weight_NH)
        weight_NH = decay_NH * weight_NH + 1
        counts_N = (record.length // 2 <= t) & (t < record.length)
        total_H += (moment_NH[counts_N] / weight_NH[counts_N]).sum(axis=0)
    return total_H / float((record.length - record.length // 2).sum())


@dataclass(frozen=True, eq=False)
class MixingDistance:
    """How far back what a token mixes in lies: for each row of the effective attention M, the mean distance t - j
    weighted by |M_tj|.

    The last token's is the "Mamba mean distance" by which DeciMamba (arXiv 2406.14528) measures the effective receptive
    field. Unlike `ReceptiveField` it knows what the tokens write and ask for, not the decays alone.

    Attributes:
        layer: index of the block.
        edges: [V+1] edges of the bins of the reading token's position, in tokens.
        distance: [V, H] mean over the bin's tokens, tokens; a token that mixes in nothing does not count, and NaN
            stands where none does.
        last: [H] of the last token alone.
        distance_if_even: [V] the distance were everything up to the token mixed in alike: half its position.
        num_tokens: tokens of the text.
    """

    layer: int
    edges: IntArray
    distance: FloatArray
    last: FloatArray
    distance_if_even: FloatArray
    num_tokens: int


def mixing_distance(matrix: AnyFloatArray, *, layer: int, num_bins: int = 32) -> MixingDistance:
    """Mean distance of what each head mixes in, by position in `num_bins` bins; see `MixingDistance`.

    Args:
        matrix: [H, L, L] effective attention of one text: row t holds the coefficients with which token t's output
            mixes in the tokens j <= t (`hydra_lab.attribution` computes it for the state-space path).
        layer: index of the block.

    Raises:
        ValueError: `matrix` is not square, or lets a token mix in a later one.
    """
    if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2] or matrix.size == 0:
        raise ValueError(f"matrix must be [heads, tokens, tokens], got {list(matrix.shape)}")
    num_heads, num_tokens, _ = matrix.shape
    if np.triu(matrix, 1).any():
        raise ValueError("matrix has entries above its diagonal: a token would mix in a later one")
    position_L = np.arange(num_tokens, dtype=np.int64)
    distance_LL = np.abs(position_L[:, None] - position_L)
    distance_LH = np.zeros((num_tokens, num_heads))
    for h in range(num_heads):
        weight_LL = np.abs(matrix[h].astype(np.float64))
        distance_LH[:, h] = ratio((weight_LL * distance_LL).sum(axis=1), weight_LL.sum(axis=1))
    edges = bin_edges(num_tokens, num_bins)
    known_LH = ~np.isnan(distance_LH)
    sum_VH = np.add.reduceat(np.where(known_LH, distance_LH, 0.0), edges[:-1], axis=0)
    return MixingDistance(
        layer=layer,
        edges=edges,
        distance=ratio(sum_VH, np.add.reduceat(known_LH.astype(np.float64), edges[:-1], axis=0)),
        last=distance_LH[-1],
        distance_if_even=(edges[:-1] + edges[1:] - 1) / 4,
        num_tokens=num_tokens,
    )
