"""From costs of removal to evidence: numpy only, so that it can be tested on data with a known answer.

Shape suffixes: Y blocks with experts, E experts, N samples, Z domains, M samples on which pairs were removed, W
resamplings.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NOISE = 1e-6
"""Nats per token: a smaller interaction is rounding of fp32 logits, and counts as 0."""

FEWEST_SAMPLES = 5
"""That use both experts of some pair: with fewer, no test of signs can reach 5%."""


@dataclass(frozen=True, eq=False)
class DomainTest:
    """Do the costs of a block's experts differ between domains?

    Attributes:
        explained: share of the variance of the costs between samples (over all experts) that the domain explains, 0..1.
        interval: (low, high), 95% bootstrap over samples within domains, centred on `explained`.
        null_mean: mean of `explained` under permutation of the domains over samples.
        p_value: share of the permutations that reach `explained`; 1 where no removal costs anything.
    """

    explained: float
    interval: tuple[float, float]
    null_mean: float
    p_value: float


def domains_matter(
    cost_EN: Floats, domain_N: Ints, *, num_resamplings: int, rng: np.random.Generator
) -> DomainTest:
    """See `DomainTest`."""
    centred_EN = cost_EN - cost_EN.mean(axis=1, keepdims=True)
    if not (np.abs(centred_EN) > NOISE).any():
        return DomainTest(0.0, (0.0, 0.0), 0.0, 1.0)
    member_NZ = np.eye(int(domain_N.max()) + 1)[domain_N]
    value = _explained(centred_EN, member_NZ)
    null_W = np.array(
        [_explained(centred_EN, member_NZ[rng.permutation(len(domain_N))]) for _ in range(num_resamplings)]
    )
    drawn_W = np.array([_explained_redrawn(cost_EN, domain_N, rng) for _ in range(num_resamplings)])
    low, high = value + np.quantile(drawn_W - drawn_W.mean(), [0.025, 0.975])
    return DomainTest(
        explained=value,
        interval=(max(0.0, float(low)), min(1.0, float(high))),
        null_mean=float(null_W.mean()),
        p_value=float((1 + (null_W >= value - 1e-12).sum()) / (1 + num_resamplings)),
    )


def _explained(centred_EN: Floats, member_NZ: Floats) -> float:
    """Sum of squares between domains over the total, all experts together."""
    count_Z = member_NZ.sum(axis=0)
    between = ((centred_EN @ member_NZ) ** 2 / np.maximum(count_Z, 1)).sum()
    return float(between / (centred_EN**2).sum())


def _explained_redrawn(cost_EN: Floats, domain_N: Ints, rng: np.random.Generator) -> float:
    rows = np.concatenate(
        [rng.choice(np.flatnonzero(domain_N == z), size=(domain_N == z).sum()) for z in np.unique(domain_N)]
    )
    drawn_EN = cost_EN[:, rows]
    centred_EN = drawn_EN - drawn_EN.mean(axis=1, keepdims=True)
    if not (np.abs(centred_EN) > NOISE).any():
        return 0.0
    return _explained(centred_EN, np.eye(int(domain_N.max()) + 1)[domain_N[rows]])


@dataclass(frozen=True, eq=False)
class Costliest:
    """The expert and domain with the largest cost on one half of the samples, measured on the other half.

    Attributes:
        expert, domain: indices.
        cost: mean over the domain's samples of the other half, nats per token.
        interval: (low, high), its 95% bootstrap interval over them.
    """

    expert: int
    domain: int
    cost: float
    interval: tuple[float, float]


def costliest(
    cost_EN: Floats, domain_N: Ints, *, num_resamplings: int, rng: np.random.Generator
) -> Costliest:
    """See `Costliest`: choosing and measuring on the same samples would overstate the cost."""
    turn_N = np.zeros(len(domain_N), dtype=np.int64)
    for z in np.unique(domain_N):
        rows = np.flatnonzero(domain_N == z)
        turn_N[rows] = np.arange(len(rows)) % 2
    mean_EZ = domain_means(cost_EN[:, turn_N == 0], domain_N[turn_N == 0], int(domain_N.max()) + 1)
    expert, domain = np.unravel_index(int(mean_EZ.argmax()), mean_EZ.shape)
    measured = cost_EN[expert, (turn_N == 1) & (domain_N == domain)]
    drawn = measured[rng.integers(len(measured), size=(num_resamplings, len(measured)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Costliest(int(expert), int(domain), float(measured.mean()), (float(low), float(high)))


def domain_means(cost: Floats, domain_N: Ints, num_domains: int) -> Floats:
    """Mean over the samples of each domain: [..., N] -> [..., Z]."""
    member_NZ = np.eye(num_domains)[domain_N]
    return cost @ (member_NZ / np.maximum(member_NZ.sum(axis=0), 1))


@dataclass(frozen=True, eq=False)
class PairTest:
    """Do the experts of a block stand in for each other?

    The interaction of a pair is the cost of removing both less the two costs of removing one: above 0 each makes
    up for a part of what the other's loss would cost, below 0 one is of less use without the other.

    Attributes:
        interaction: [E, E] mean over the samples that use both, nats per token; NaN where none does, and on the
            diagonal.
        mean: over the samples of their mean over pairs, nats per token; NaN where no sample uses two experts.
        interval: (low, high), its 95% bootstrap interval over samples.
        p_value: two-sided, of a mean of 0, under random signs of the samples; None where fewer than `FEWEST_SAMPLES`
            samples use two experts.
        num_samples: that use two experts.
    """

    interaction: Floats
    mean: float
    interval: tuple[float, float]
    p_value: float | None
    num_samples: int


def pairs_interact(
    single_EM: Floats, both_EEM: Floats, used_EM: Bools, *, num_resamplings: int, rng: np.random.Generator
) -> PairTest:
    """See `PairTest`.

    Args:
        single_EM: cost of removing each expert.
        both_EEM: cost of removing each pair; read above the diagonal.
        used_EM: which samples use the expert.
    """
    num_experts = len(single_EM)
    first, second = np.triu_indices(num_experts, k=1)
    inter_PM = both_EEM[first, second] - single_EM[first] - single_EM[second]
    inter_PM = np.where(np.abs(inter_PM) < NOISE, 0.0, inter_PM)
    shared_PM = used_EM[first] & used_EM[second]
    table = np.full((num_experts, num_experts), np.nan)
    has_P = shared_PM.any(axis=1)
    mean_P = (inter_PM * shared_PM).sum(axis=1)[has_P] / shared_PM.sum(axis=1)[has_P]
    table[first[has_P], second[has_P]] = table[second[has_P], first[has_P]] = mean_P
    known_M = shared_PM.any(axis=0)
    values_M = (inter_PM * shared_PM).sum(axis=0)[known_M] / shared_PM.sum(axis=0)[known_M]
    if len(values_M) == 0:
        return PairTest(table, float("nan"), (float("nan"), float("nan")), None, 0)
    drawn = values_M[rng.integers(len(values_M), size=(num_resamplings, len(values_M)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    p_value = None
    if len(values_M) >= FEWEST_SAMPLES:
        signs_WM = rng.choice([-1.0, 1.0], size=(num_resamplings, len(values_M)))
        null_W = np.abs(signs_WM @ values_M)
        p_value = float((1 + (null_W >= abs(values_M.sum()) - 1e-12).sum()) / (1 + num_resamplings))
    return PairTest(table, float(values_M.mean()), (float(low), float(high)), p_value, len(values_M))
