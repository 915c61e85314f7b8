"""From gains to evidence: numpy only."""

import numpy as np

from hydra_lab.metrics import mean_interval, sign_flip_p_value
from hydra_lab.probing import Effect, Finding
from hydra_lab.probing.resampling import ratio_interval
from probes.induction.measure import CopyGain, Cut


def findings(gains: list[CopyGain], *, num_resamplings: int, seed: int) -> tuple[Finding, ...]:
    """What the study claims: a gain for every kind of episode, what each cut takes of it, and what two paths take
    together beyond what each takes alone."""
    resampling = {"num_resamplings": num_resamplings, "seed": seed}
    found: list[Finding] = []
    for gain in gains:
        found.append(_gain(gain, resampling))
        found += [_lost(gain, cut, resampling) for cut in gain.under if len(cut) == 1]
        both = (("ssm", None), ("attention", None))
        if both in gain.under:
            found.append(_interaction(gain, both, resampling))
    return tuple(found)


def describe(cut: Cut) -> str:
    """Such as "ssm", "attention of block 2" or "ssm and attention"."""
    return " and ".join(path if layer is None else f"{path} of block {layer}" for path, layer in cut)


def interaction(gain: CopyGain, cut: Cut) -> np.ndarray:
    """[N] what two paths take of the gain together, less what each takes alone, nats per token."""
    first, second = cut
    return gain.lost(cut) - gain.lost((first,)) - gain.lost((second,))


def _gain(gain: CopyGain, resampling: dict[str, int]) -> Finding:
    mean, loss = float(gain.intact.mean()), float(gain.loss.mean())
    return Finding(
        name=f"{gain.name}: gain from the earlier occurrence",
        estimate=mean,
        unit="nats per target",
        interval=mean_interval(gain.intact, **resampling),
        null="other cues before the same targets serve as well (sign flips over sequences)",
        null_value=0.0,
        p_value=sign_flip_p_value(gain.intact, two_sided=False, **resampling),
        n=len(gain.intact),
        n_unit="sequences",
        verdict=f"Having seen the target behind its cue lowers the loss by {mean:.2f} nats, from "
        f"{loss + mean:.2f} to {loss:.2f}. Which path does it is what the cuts show.",
    )


def _lost(gain: CopyGain, cut: Cut, resampling: dict[str, int]) -> Finding:
    ((_path, layer),) = cut
    lost_N = gain.lost(cut)
    total = float(gain.intact.sum())
    share = float(lost_N.sum()) / total if total else 0.0
    return Finding(
        name=f"{gain.name}: share of the gain that goes with the {describe(cut)}",
        estimate=share,
        unit="share of the gain",
        interval=ratio_interval(lost_N, gain.intact, **resampling),
        null="the cut costs as much after the control (sign flips over sequences)",
        null_value=0.0,
        p_value=sign_flip_p_value(lost_N, two_sided=True, **resampling),
        n=len(lost_N),
        n_unit="sequences",
        verdict=f"Cutting the {describe(cut)} while the repeat is read takes {round(share, 2) + 0.0:.0%} of "
        "the gain.",
        causal=Effect(
            description=f"{describe(cut)} cut on the repeat: gain that goes",
            estimate=float(lost_N.mean()),
            unit="nats per target",
            interval=mean_interval(lost_N, **resampling),
        ),
        layer=layer,
    )


def _interaction(gain: CopyGain, cut: Cut, resampling: dict[str, int]) -> Finding:
    beyond_N = interaction(gain, cut)
    mean = float(beyond_N.mean())
    low, high = mean_interval(beyond_N, **resampling)
    if low <= 0 <= high:
        said = "as much as the sum of both cuts, within the uncertainty"
    elif mean > 0:
        said = f"{mean:.2f} nats more than the sum of both cuts: one stands in for the other"
    else:
        said = f"{-mean:.2f} nats less than the sum of both cuts: the copying needs both, and cannot go twice"
    return Finding(
        name=f"{gain.name}: interaction of {describe(cut)}",
        estimate=mean,
        unit="nats per target",
        interval=(low, high),
        null="the two cuts add up (sign flips over sequences)",
        null_value=0.0,
        p_value=sign_flip_p_value(beyond_N, two_sided=True, **resampling),
        n=len(beyond_N),
        n_unit="sequences",
        verdict=f"Cut together, {describe(cut)} take {said}.",
        causal=Effect(
            description=f"{describe(cut)} both cut on the repeat: gain that goes",
            estimate=float(gain.lost(cut).mean()),
            unit="nats per target",
            interval=mean_interval(gain.lost(cut), **resampling),
        ),
    )
