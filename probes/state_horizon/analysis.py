"""From followed changes to evidence: numpy only, so that it can be tested on data with a known answer.

Shape suffixes: N texts, D distances, H ssm heads, K half-lives on a grid.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_lab.metrics import mean_interval, sign_flip_p_value
from hydra_lab.probing import Effect, Finding
from hydra_lab.probing.resampling import (
    rank_correlation,
    rank_correlation_interval,
    rank_correlation_p_value,
    ratio_interval,
)
from probes.state_horizon.measure import Floats, Measurement

_SHORTEST = 0.05
"""Half-lives below this many tokens are not told apart: nothing is left at the next token."""
_LONGEST_OVER_HORIZON = 64
"""Half-lives above this many horizons are not told from no decay at all."""


def exponential_half_life(amplitude: Floats) -> Floats:
    """Half-life, in tokens, of the exponential that lies as far out on the average as an amplitude does.

    The mean distance sum(d a_d) / sum(a_d) over d = 0 .. D-1 is matched, not a line through logarithms: what
    is hardly there any more, and its rounding, would steer the line.

    Args:
        amplitude: [..., D] non-negative.

    Returns:
        [...] half-life; inf where the amplitude does not fall, NaN where it is zero everywhere.
    """
    num_distances = amplitude.shape[-1]
    distance_D = np.arange(num_distances)
    grid_K = np.geomspace(_SHORTEST, _LONGEST_OVER_HORIZON * num_distances, 600)
    decayed_KD = 2.0 ** (-distance_D / grid_K[:, None])
    mean_K = decayed_KD @ distance_D / decayed_KD.sum(axis=1)
    total = amplitude.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = amplitude @ distance_D / total
    found = np.exp(np.interp(mean, mean_K, np.log(grid_K), right=np.inf))
    return np.where(total > 0, found, np.nan)


def filled_in(distance_M: NDArray[np.int64], amplitude_M: Floats) -> Floats:
    """[..., last - first + 1] amplitude at every distance from the first to the last of `distance_M`,
    exponential between two of them.

    Args:
        amplitude_M: [..., M] non-negative.
    """
    every = np.arange(distance_M[0], distance_M[-1] + 1)
    logs = np.log(np.maximum(amplitude_M, 1e-300))
    flat = logs.reshape(-1, len(distance_M))
    filled = np.exp(np.stack([np.interp(every, distance_M, row) for row in flat]))
    filled[(amplitude_M.reshape(-1, len(distance_M)) == 0).all(axis=1)] = 0.0
    return filled.reshape(*logs.shape[:-1], len(every))


@dataclass(frozen=True, eq=False)
class Horizon:
    """How long a replaced token lasts.

    Attributes:
        state_half_life: [H] tokens, of the difference of the head's states between the two runs.
        output_half_life: [H] tokens, of the change of the output where only this head's state differs: of the square
            root of the divergence, which is proportional to a small difference of the state. NaN where
            nothing changes.
        output_change: [D] mean over texts of the divergence at each distance, nats.
    """

    state_half_life: Floats
    output_half_life: Floats
    output_change: Floats


def horizon(measurement: Measurement) -> Horizon:
    """Half-lives of what was measured; see `Horizon`."""
    state_MH = measurement.state_change.mean(axis=0)
    return Horizon(
        state_half_life=exponential_half_life(filled_in(measurement.state_distance, state_MH.T)),
        output_half_life=exponential_half_life(np.sqrt(measurement.head_change).mean(axis=1)),
        output_change=measurement.output_change.mean(axis=0),
    )


def findings(
    measurement: Measurement, decay_half_life_H: Floats, *, num_resamplings: int, seed: int
) -> tuple[Finding, ...]:
    """What the study claims.

    Args:
        decay_half_life_H: the half-life that the decays predict for each head; `measurement.decay_half_life`, or a
            permutation of it.
    """
    resampling = {"num_resamplings": num_resamplings, "seed": seed}
    found = horizon(measurement)
    return (
        _fall(measurement, found, resampling),
        *_half_lives(measurement, found, decay_half_life_H, resampling),
        *(_carried(measurement, path, resampling) for path in measurement.kept_by),
    )


def _fall(measurement: Measurement, found: Horizon, resampling: dict[str, int]) -> Finding:
    change_ND = measurement.output_change[:, 1:]
    distance_D = np.arange(1, change_ND.shape[1] + 1, dtype=np.float64)
    rank_N = np.nan_to_num(np.array([rank_correlation(distance_D, row) for row in change_ND]))
    p = sign_flip_p_value(rank_N, two_sided=True, **resampling)
    estimate = float(rank_N.mean())
    near, last = found.output_change[1], found.output_change[-1]
    if near == 0:
        verdict = "A replaced token changes nothing that comes after it."
    else:
        told = ", ".join(
            f"{found.output_change[d]:.2g} nats at {d}" for d in _shown_distances(len(found.output_change))
        )
        verdict = (
            f"A replaced token changes the next-token distribution by {told} tokens after it; "
            f"{last / near:.2%} of the first is left at the end of what was followed."
        )
    return Finding(
        name="output: change against distance",
        estimate=estimate,
        unit="rank correlation within a text",
        interval=mean_interval(rank_N, **resampling),
        null="the change of the output does not depend on the distance (sign flips over texts)",
        null_value=0.0,
        p_value=p,
        n=len(rank_N),
        n_unit="texts",
        verdict=f"{verdict} The replacement is itself an intervention.",
    )


def _shown_distances(num_distances: int) -> list[int]:
    last = num_distances - 1
    return [*(d for d in (1, 8, 64, 512) if d < last), last]


def _half_lives(
    measurement: Measurement, found: Horizon, predicted_H: Floats, resampling: dict[str, int]
) -> tuple[Finding, Finding]:
    num_heads = len(predicted_H)
    known_H = np.isfinite(found.output_half_life) | np.isposinf(found.output_half_life)
    state = rank_correlation(predicted_H, found.state_half_life)
    p_state = rank_correlation_p_value(predicted_H, found.state_half_life, **resampling)
    output = output_p = float("nan")
    output_interval = (float("nan"), float("nan"))
    if known_H.sum() > 2:
        pair = predicted_H[known_H], found.output_half_life[known_H]
        output, output_p = rank_correlation(*pair), rank_correlation_p_value(*pair, **resampling)
        output_interval = rank_correlation_interval(*pair, **resampling)
    state_finding = Finding(
        name="heads: half-life against decay",
        estimate=state,
        unit="rank correlation over heads",
        interval=rank_correlation_interval(predicted_H, found.state_half_life, **resampling),
        null="which head has which half-life is chance (heads permuted)",
        null_value=0.0,
        p_value=p_state,
        n=num_heads,
        n_unit="heads",
        verdict="How long the heads' states stay changed goes with the half-lives that their decays "
        f"predict by a rank correlation of {state:.2f} (1 is the same order, 0 none); how long the output "
        f"stays changed through one head, by {output:.2f}.",
        causal=Effect(
            description="only this head's state is taken from the other run: half-life of the change of "
            "the output, against decay",
            estimate=output,
            unit="rank correlation over heads",
            interval=output_interval,
            p_value=None if np.isnan(output_p) else output_p,
        ),
    )
    both_H = np.isfinite(found.state_half_life) & np.isfinite(predicted_H) & (predicted_H > 0)
    log_ratio_H = np.log2(found.state_half_life[both_H] / predicted_H[both_H])
    median = _median_ratio(log_ratio_H)
    layer_H = np.array([layer for layer, _ in measurement.heads])[both_H]
    first, last = min(layer_H, default=0), max(layer_H, default=0)
    first_median = _median_ratio(log_ratio_H[layer_H == first])
    output_log_ratio_H = np.log2(found.output_half_life[both_H] / predicted_H[both_H])[layer_H == last]
    output_log_ratio_H = output_log_ratio_H[np.isfinite(output_log_ratio_H)]
    ratio_finding = Finding(
        name="heads: measured over predicted half-life",
        estimate=median,
        unit="ratio, median over heads",
        interval=_median_interval(log_ratio_H, **resampling),
        null="the state difference decays as the head's own decay says and nothing feeds it",
        null_value=1.0,
        n=len(log_ratio_H),
        n_unit="heads with a finite half-life",
        verdict=f"A state stays changed {median:.2g} times as long as the head's own decay predicts (median "
        f"over heads); in block {first}, whose input differs at the replaced token alone, "
        f"{first_median:.2g} times. What is above 1 is fed by earlier blocks, which still differ. "
        "Described, not tested.",
        causal=Effect(
            description=f"only a head's state of block {last}, behind which nothing passes it on, is taken "
            "from the other run: half-life of the change of the output over the predicted one, median over "
            "its heads",
            estimate=_median_ratio(output_log_ratio_H),
            unit="ratio",
            interval=_median_interval(output_log_ratio_H, **resampling),
        ),
    )
    return state_finding, ratio_finding


def _median_ratio(log_ratio_H: Floats) -> float:
    return float(2 ** np.median(log_ratio_H)) if len(log_ratio_H) else float("nan")


def _median_interval(log_ratio_H: Floats, *, num_resamplings: int, seed: int) -> tuple[float, float]:
    if len(log_ratio_H) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(log_ratio_H), size=(num_resamplings, len(log_ratio_H)))
    low, high = 2 ** np.quantile(np.median(log_ratio_H[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)


def _carried(measurement: Measurement, path: str, resampling: dict[str, int]) -> Finding:
    """How much of the far change goes when the path's memory is that of the run without the replaced token."""
    far = measurement.far
    whole_N = measurement.output_change[:, measurement.settled :][:, far].mean(axis=1)
    without_N = measurement.left_without[path][:, far].mean(axis=1)
    alone_N = measurement.kept_by[path][:, far].mean(axis=1)
    lost_N = whole_N - without_N
    total = whole_N.sum()
    share = float(lost_N.sum() / total) if total > 0 else 0.0
    alone = float(alone_N.sum() / total) if total > 0 else 0.0
    first, last = int(measurement.later[far][0]), int(measurement.later[far][-1])
    return Finding(
        name=f"{path}: share of the far change that its memory carries",
        estimate=share,
        unit="share of the divergence",
        interval=ratio_interval(lost_N, whole_N, **resampling),
        null="the path's memory of the token makes no difference (sign flips over texts)",
        null_value=0.0,
        p_value=sign_flip_p_value(lost_N, two_sided=True, **resampling),
        n=len(whole_N),
        n_unit="texts",
        verdict=f"Of the change {first} to {last} tokens later {round(share, 2) + 0.0:.0%} goes when the "
        f"{path} forgets the token; its memory alone brings {alone:.0%} of it about.",
        causal=Effect(
            description=f"the {path}'s memory alone is that of the run with the replaced token",
            estimate=alone,
            unit="share of the divergence",
            interval=ratio_interval(alone_N, whole_N, **resampling),
        ),
    )
