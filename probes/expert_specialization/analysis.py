"""From routing and ablations to evidence: numpy only, so that it can be tested on data with a known answer.

Shape suffixes: Y blocks with experts, N samples, C chunks, L positions, E experts, Z domains, A token
    classes,
R random routers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_lab import metrics

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Observation:
    """What a model's routers chose on some samples.

    Attributes:
        routing: of all blocks with experts, with the token weights.
        tokens_class: [N, L] class of each token; -1 past a sample's end.
        classes: [A] names of the token classes.
    """

    routing: metrics.RoutingRecord
    tokens_class: Ints
    classes: tuple[str, ...]

    @property
    def first_counts(self) -> Ints:
        """[Y, N, E] chunks of each sample whose first choice is the expert."""
        record = self.routing
        first = record.experts[..., 0][..., None] == np.arange(record.num_experts)
        return (first & record.chunk_mask[None, :, :, None]).sum(axis=2)

    @property
    def heaviest(self) -> Ints:
        """[Y, N, L] the expert with the largest weight at each token; -1 past a sample's end."""
        record = self.routing
        assert record.weights is not None
        size = record.weights.shape[2]
        chunk_L = np.arange(size) // record.chunk_size
        rank = record.weights.argmax(axis=-1)
        chosen = np.take_along_axis(record.experts[:, :, chunk_L], rank[..., None], axis=-1)[..., 0]
        return np.where(np.arange(size) < record.length[:, None], chosen, -1)

    @property
    def domain_codes(self) -> tuple[tuple[str, ...], Ints]:
        """Names of the domains, and each sample's."""
        names = tuple(dict.fromkeys(self.routing.domains))
        return names, np.array([names.index(label) for label in self.routing.domains], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Association:
    """Correlational evidence.

    Attributes:
        layers: [Y] blocks.
        domains: [Z].
        classes: [A].
        domain_tests: [Y] information between a chunk's first expert and its sample's domain.
        class_tests: [Y] information between a token's heaviest expert and its class, given the domain.
        domain_holm, class_holm: [Y] p-values of those, corrected by Holm over all 2Y tests.
        domain_share: [Y, Z, E] share of the domain's chunks whose first choice is the expert.
        domain_adjusted: [Y, Z, E] p-value of that share differing from the other domains', corrected by
            Benjamini and Hochberg over all cells.
        class_share: [Y, A, E] share of the class's tokens whose heaviest expert is the expert.
        class_adjusted: [Y, A, E] p-value of that share differing from the other classes', corrected the same
            way.
        num_samples: [Z] samples per domain.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    domain_tests: tuple[metrics.InformationTest, ...]
    class_tests: tuple[metrics.InformationTest, ...]
    domain_holm: Floats
    class_holm: Floats
    domain_share: Floats
    domain_adjusted: Floats
    class_share: Floats
    class_adjusted: Floats
    num_samples: Ints


def associate(observation: Observation, *, num_resamplings: int, seed: int) -> Association:
    """Tests whether expert choice depends on domain and on token class; see `Association`."""
    names, codes = observation.domain_codes
    counts_YNE = observation.first_counts.astype(np.float64)
    heaviest_YNL = observation.heaviest
    num_experts, num_classes = observation.routing.num_experts, len(observation.classes)
    resampling = {"num_resamplings": num_resamplings, "seed": seed}
    sizes = {"num_decisions": num_experts, "num_labels": num_classes}
    domain_tests = tuple(metrics.information_of_groups(counts, codes, **resampling) for counts in counts_YNE)
    class_tests = tuple(
        metrics.information_of_labels(heaviest, observation.tokens_class, codes, **sizes, **resampling)
        for heaviest in heaviest_YNL
    )
    adjusted = metrics.holm(np.array([test.p_value for test in (*domain_tests, *class_tests)]))
    domain_p = [metrics.group_preference_p_values(counts, codes, **resampling) for counts in counts_YNE]
    class_p = [
        metrics.label_preference_p_values(heaviest, observation.tokens_class, codes, **sizes, **resampling)
        for heaviest in heaviest_YNL
    ]
    member_ZN = (codes == np.arange(len(names))[:, None]).astype(np.float64)
    class_counts = np.stack(
        [
            _joint_counts(heaviest, observation.tokens_class, num_experts, num_classes)
            for heaviest in heaviest_YNL
        ]
    )
    return Association(
        layers=observation.routing.layers,
        domains=names,
        classes=observation.classes,
        domain_tests=domain_tests,
        class_tests=class_tests,
        domain_holm=adjusted[: len(domain_tests)],
        class_holm=adjusted[len(domain_tests) :],
        domain_share=_shares(np.einsum("zn,yne->yze", member_ZN, counts_YNE)),
        domain_adjusted=metrics.benjamini_hochberg(np.stack(domain_p)),
        class_share=_shares(class_counts),
        class_adjusted=metrics.benjamini_hochberg(np.stack(class_p)),
        num_samples=member_ZN.sum(axis=1).astype(np.int64),
    )


def _joint_counts(decisions_NL: Ints, labels_NL: Ints, num_decisions: int, num_labels: int) -> Floats:
    known = (decisions_NL >= 0) & (labels_NL >= 0)
    cell = labels_NL[known] * num_decisions + decisions_NL[known]
    return (
        np.bincount(cell, minlength=num_labels * num_decisions)
        .reshape(num_labels, num_decisions)
        .astype(float)
    )


def _shares(counts: Floats) -> Floats:
    """Counts [..., E] over their sum; 0 where there are none."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-300)


@dataclass(frozen=True, eq=False)
class Control:
    """The same information with routers that nobody trained.

    Attributes:
        corrected: [R, Y] information between first expert and domain, less the mean of its null, nats.
    """

    corrected: Floats


def control(observations: list[Observation], *, num_resamplings: int, seed: int) -> Control:
    """Information about the domain in the choices of random routers."""
    corrected = [
        [
            metrics.information_of_groups(
                counts.astype(np.float64), each.domain_codes[1], num_resamplings=num_resamplings, seed=seed
            ).corrected
            for counts in each.first_counts
        ]
        for each in observations
    ]
    return Control(np.array(corrected))


@dataclass(frozen=True, eq=False)
class Causation:
    """What removing an expert costs, and whether it costs most where the expert is preferred.

    Preference is measured on other samples than the cost, so that chance cannot make the two agree.

    Attributes:
        layers: [Y] blocks.
        domains: [Z].
        preference: [Y, E, Z] share of the domain's chunks whose first choice is the expert, less the mean
            over domains.
        increase: [Y, E, Z] mean loss without the expert minus the loss with it, nats per token, over the
            domain's samples.
        interval: [Y, E, Z, 2] its 95% bootstrap interval over samples.
        agreement: [Y] Spearman's rank correlation of `preference` and `increase` over experts and domains;
            NaN where either is constant.
        agreement_holm: [Y] one-sided p-value of it under permutation of the domains over samples, corrected
            by Holm over blocks.
        matches: [Y] experts (of those in use) whose removal costs most in the domain that prefers them most.
        num_used: [Y] experts in use.
        num_samples: [Z] samples per domain.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    preference: Floats
    increase: Floats
    interval: Floats
    agreement: Floats
    agreement_holm: Floats
    matches: Ints
    num_used: Ints
    num_samples: Ints


def compare_with_ablation(
    preferring: Observation,
    increase_YEN: Floats,
    domains: tuple[str, ...],
    *,
    num_resamplings: int,
    seed: int,
) -> Causation:
    """Sets what the experts are preferred for beside what their removal costs.

    Args:
        preferring: the samples that preference is measured on.
        increase_YEN: loss increase of each of N other samples without each expert, nats per token.
        domains: [N] domain of those samples.
    """
    rng = np.random.default_rng(seed)
    names, codes_of_preferring = preferring.domain_codes
    codes = np.array([names.index(label) for label in domains])
    member_ZN = (codes_of_preferring == np.arange(len(names))[:, None]).astype(np.float64)
    share_YZE = _shares(np.einsum("zn,yne->yze", member_ZN, preferring.first_counts.astype(np.float64)))
    preference_YEZ = (share_YZE - share_YZE.mean(axis=1, keepdims=True)).swapaxes(1, 2)
    mean_YEZ = _domain_means(increase_YEN, codes, len(names))

    interval = np.zeros((*mean_YEZ.shape, 2))
    for z in range(len(names)):
        rows = np.flatnonzero(codes == z)
        drawn = rng.integers(len(rows), size=(num_resamplings, len(rows)))
        means = increase_YEN[..., rows][..., drawn].mean(axis=-1)
        interval[:, :, z] = np.moveaxis(np.quantile(means, [0.025, 0.975], axis=-1), 0, -1)

    agreement = np.array(
        [rank_correlation(p.ravel(), m.ravel()) for p, m in zip(preference_YEZ, mean_YEZ, strict=True)]
    )
    exceeded = np.zeros(len(agreement))
    for _ in range(num_resamplings):
        permuted = _domain_means(increase_YEN, rng.permutation(codes), len(names))
        for y in range(len(agreement)):
            exceeded[y] += (
                rank_correlation(preference_YEZ[y].ravel(), permuted[y].ravel()) >= agreement[y] - 1e-12
            )
    # a correlation that does not exist (no expert in use, or no cost anywhere) is no evidence
    p_values = np.where(np.isnan(agreement), 1.0, (1 + exceeded) / (1 + num_resamplings))
    used_YE = share_YZE.sum(axis=1) > 0
    same_YE = preference_YEZ.argmax(axis=-1) == mean_YEZ.argmax(axis=-1)
    return Causation(
        layers=preferring.routing.layers,
        domains=names,
        preference=preference_YEZ,
        increase=mean_YEZ,
        interval=interval,
        agreement=agreement,
        agreement_holm=metrics.holm(p_values),
        matches=(same_YE & used_YE).sum(axis=1).astype(np.int64),
        num_used=used_YE.sum(axis=1).astype(np.int64),
        num_samples=np.bincount(codes, minlength=len(names)).astype(np.int64),
    )


def _domain_means(values: Floats, codes: Ints, num_domains: int) -> Floats:
    """Mean over the samples of each domain: [..., N] -> [..., Z]."""
    member_NZ = (codes[:, None] == np.arange(num_domains)).astype(np.float64)
    return values @ (member_NZ / np.maximum(member_NZ.sum(axis=0), 1.0))


def rank_correlation(first: Floats, second: Floats) -> float:
    """Spearman's rank correlation of two vectors, ties at their mean rank; NaN where one is constant."""
    ranks = [_ranks(first), _ranks(second)]
    centred = [each - each.mean() for each in ranks]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / norm if norm > 0 else float("nan")


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


@dataclass(frozen=True)
class Preference:
    """One significant preference: `share` of the choices in `name` (a domain or token class) falls on
    `expert`, which is `ratio` times its mean share over all names."""

    layer: int
    name: str
    expert: int
    share: float
    ratio: float
    p_adjusted: float


def clearest(
    share: Floats, adjusted: Floats, names: tuple[str, ...], layers: tuple[int, ...], *, alpha: float
) -> tuple[Preference, ...]:
    """The significant preferences [Y, rows, E] for an expert (not those against one), by falling ratio in
    each block."""
    found: list[Preference] = []
    ratio = share / np.maximum(share.mean(axis=1, keepdims=True), 1e-300)
    for y, layer in enumerate(layers):
        cells = [
            Preference(layer, names[row], int(e), float(share[y, row, e]), float(ratio[y, row, e]), float(p))
            for (row, e), p in np.ndenumerate(adjusted[y])
            if p <= alpha and ratio[y, row, e] > 1
        ]
        found += sorted(cells, key=lambda cell: -cell.ratio)
    return tuple(found)


def verdicts(
    association: Association,
    controls: Control,
    causation: Causation,
    path_use: metrics.PathUse,
    *,
    alpha: float,
) -> tuple[str, ...]:
    """[Y] one sentence per block: what the evidence together allows to say about its experts and the
    domains."""
    lines: list[str] = []
    for y, layer in enumerate(association.layers):
        if path_use.is_idle("moe", layer):
            lines.append("idle: the model hardly uses these experts, so their choices mean little")
        elif association.domain_holm[y] > alpha:
            lines.append("no evidence that the choice of expert depends on the domain")
        elif association.domain_tests[y].corrected <= controls.corrected[:, y].max():
            lines.append("the choice depends on the domain, but no more than a random router's does")
        elif causation.agreement_holm[y] > alpha:
            lines.append("the choice depends on the domain; that this matters for the loss is not shown")
        else:
            lines.append("specialized by domain: chosen for it, and costliest to remove where preferred")
    return tuple(lines)
