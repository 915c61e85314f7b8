"""From routing and ablations to evidence: numpy only, so that it can be tested on data with a known answer.

Shape suffixes: Y blocks with experts, N samples, C chunks, L positions, E experts, Z domains, A token classes,
R random routers.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_lab import metrics
from hydra_lab.probing import Finding
from hydra_lab.probing.resampling import rank_correlation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.05
"""Of all tests, after correction for their number."""

_CONTROL_RESAMPLINGS = 200  # the mean of a null needs fewer permutations than its tail
_REDRAWS = 500  # of an interval


@dataclass(frozen=True, eq=False)
class Observation:
    """What a model's routers chose on some samples.

    Attributes:
        routing: of all blocks with experts, with the token weights.
        tokens_class: [N, L] class of each token; -1 past a sample's end.
        classes: [A] names of the token classes.
        margin: [Y, N, C] by how much the last chosen expert's logit beat the best other one; NaN past a sample's end.
    """

    routing: metrics.RoutingRecord
    tokens_class: Ints
    classes: tuple[str, ...]
    margin: Floats

    def take(self, rows: Sequence[int]) -> "Observation":
        """The given samples alone."""
        record = self.routing
        chosen = dataclasses.replace(
            record,
            experts=record.experts[:, rows],
            length=record.length[rows],
            domains=tuple(record.domains[row] for row in rows),
            weights=None if record.weights is None else record.weights[:, rows],
        )
        return Observation(chosen, self.tokens_class[rows], self.classes, self.margin[:, rows])

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
        domain_share: [Y, Z, E] share of the domain's chunks whose first choice is the expert.
        domain_adjusted: [Y, Z, E] p-value of that share differing from the other domains', corrected by
            Benjamini and Hochberg over all cells.
        class_share: [Y, A, E] share of the class's tokens whose heaviest expert is the expert.
        class_adjusted: [Y, A, E] p-value of that share differing from the other classes', corrected the same
            way.
        margin: [Y, Z] mean routing margin of the domain's chunks, logits: how far they were from other experts.
        num_samples: [Z] samples per domain.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    domain_tests: tuple[metrics.InformationTest, ...]
    class_tests: tuple[metrics.InformationTest, ...]
    domain_share: Floats
    domain_adjusted: Floats
    class_share: Floats
    class_adjusted: Floats
    margin: Floats
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
        domain_share=_shares(np.einsum("zn,yne->yze", member_ZN, counts_YNE)),
        domain_adjusted=metrics.benjamini_hochberg(np.stack(domain_p)),
        class_share=_shares(class_counts),
        class_adjusted=metrics.benjamini_hochberg(np.stack(class_p)),
        margin=np.array(
            [[_mean(margin[codes == z]) for z in range(len(names))] for margin in observation.margin]
        ),
        num_samples=member_ZN.sum(axis=1).astype(np.int64),
    )


def _mean(values: Floats) -> float:
    """Mean of the entries that are not NaN; NaN where there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


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


def control(observations: list[Observation]) -> Control:
    """Information about the domain in the choices of random routers."""
    corrected = [
        [
            metrics.information_of_groups(
                counts.astype(np.float64), each.domain_codes[1], num_resamplings=_CONTROL_RESAMPLINGS
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
        slope: [Y] extra cost where preferred: the slope of `increase` against `preference` over experts and domains,
            each expert's own mean taken off: nats per token for a preference of 1 (all of the domain's chunks). NaN
            where no domain prefers anything.
        slope_interval: [Y, 2] its 95% bootstrap interval over the samples of the cost.
        slope_p: [Y] one-sided p-value of it under permutation of the domains over samples; 1 where it is NaN.
        agreement: [Y] Spearman's rank correlation of `preference` and `increase` over experts and domains;
            NaN where either is constant.
        matches: [Y] experts (of those in use) whose removal costs most in the domain that prefers them most.
        num_used: [Y] experts in use.
        num_samples: [Z] samples per domain.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    preference: Floats
    increase: Floats
    interval: Floats
    slope: Floats
    slope_interval: Floats
    slope_p: Floats
    agreement: Floats
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

    redrawn = np.zeros((*mean_YEZ.shape, _REDRAWS))
    for z in range(len(names)):
        rows = np.flatnonzero(codes == z)
        drawn = rng.integers(len(rows), size=(_REDRAWS, len(rows)))
        redrawn[:, :, z] = increase_YEN[..., rows][..., drawn].mean(axis=-1)

    slope = _slopes(preference_YEZ, mean_YEZ)
    null_WY = np.stack(
        [
            _slopes(preference_YEZ, _domain_means(increase_YEN, rng.permutation(codes), len(names)))
            for _ in range(num_resamplings)
        ]
    )
    # a slope that does not exist (no preference anywhere) is no evidence
    exceeded = (null_WY >= slope - 1e-12).sum(axis=0)
    p_values = np.where(np.isnan(slope), 1.0, (1 + exceeded) / (1 + num_resamplings))
    redrawn_WY = np.stack([_slopes(preference_YEZ, redrawn[..., w]) for w in range(_REDRAWS)])
    used_YE = share_YZE.sum(axis=1) > 0
    same_YE = preference_YEZ.argmax(axis=-1) == mean_YEZ.argmax(axis=-1)
    return Causation(
        layers=preferring.routing.layers,
        domains=names,
        preference=preference_YEZ,
        increase=mean_YEZ,
        interval=np.moveaxis(np.quantile(redrawn, [0.025, 0.975], axis=-1), 0, -1),
        slope=slope,
        slope_interval=np.quantile(redrawn_WY, [0.025, 0.975], axis=0).T,
        slope_p=p_values,
        agreement=np.array(
            [rank_correlation(p.ravel(), m.ravel()) for p, m in zip(preference_YEZ, mean_YEZ, strict=True)]
        ),
        matches=(same_YE & used_YE).sum(axis=1).astype(np.int64),
        num_used=used_YE.sum(axis=1).astype(np.int64),
        num_samples=np.bincount(codes, minlength=len(names)).astype(np.int64),
    )


def _slopes(preference_YEZ: Floats, cost_YEZ: Floats) -> Floats:
    """[Y] slope of cost against preference, which is centred over domains: an expert's mean cost drops out."""
    spread_Y = (preference_YEZ**2).sum(axis=(1, 2))
    shared_Y = (preference_YEZ * cost_YEZ).sum(axis=(1, 2))
    return np.where(spread_Y > 0, shared_Y / np.maximum(spread_Y, 1e-300), np.nan)


def _domain_means(values: Floats, codes: Ints, num_domains: int) -> Floats:
    """Mean over the samples of each domain: [..., N] -> [..., Z]."""
    member_NZ = (codes[:, None] == np.arange(num_domains)).astype(np.float64)
    return values @ (member_NZ / np.maximum(member_NZ.sum(axis=0), 1.0))


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
    share: Floats, adjusted: Floats, names: tuple[str, ...], layers: tuple[int, ...]
) -> tuple[Preference, ...]:
    """The significant preferences [Y, rows, E] for an expert (not those against one), by falling ratio in
    each block."""
    found: list[Preference] = []
    ratio = share / np.maximum(share.mean(axis=1, keepdims=True), 1e-300)
    for y, layer in enumerate(layers):
        cells = [
            Preference(layer, names[row], int(e), float(share[y, row, e]), float(ratio[y, row, e]), float(p))
            for (row, e), p in np.ndenumerate(adjusted[y])
            if p <= LEVEL and ratio[y, row, e] > 1
        ]
        found += sorted(cells, key=lambda cell: -cell.ratio)
    return tuple(found)


def domain_verdicts(
    findings: Sequence[Finding], controls: Control, path_use: metrics.PathUse
) -> tuple[str, ...]:
    """One sentence per block: what the evidence together allows to say about its experts and the domains.

    Args:
        findings: [Y] about the domain, with their causal effects and corrected p-values.
    """
    lines: list[str] = []
    for y, finding in enumerate(findings):
        assert finding.layer is not None and finding.causal is not None
        causal_p = finding.causal.p_corrected
        assert causal_p is not None
        where = f"Block {finding.layer}"
        if path_use.is_idle("moe", finding.layer):
            lines.append(f"{where}: idle. The model hardly uses these experts, so their choices mean little.")
        elif not finding.is_claimed(LEVEL):
            lines.append(f"{where}: no evidence that the choice of expert depends on the domain.")
        elif finding.estimate <= controls.corrected[:, y].max():
            lines.append(
                f"{where}: the choice depends on the domain, but no more than a random router's does."
            )
        elif causal_p > LEVEL:
            lines.append(
                f"{where}: the choice of expert depends on the domain; that this matters for the loss is not shown."
            )
        else:
            lines.append(
                f"{where}: specialized by domain. Experts are chosen for it, and cost more where preferred: "
                f"{finding.causal.estimate:.3f} nats per token for a preference of 100 points."
            )
    return tuple(lines)


def class_verdicts(findings: Sequence[Finding], path_use: metrics.PathUse) -> tuple[str, ...]:
    """One sentence per block: whether its experts follow the kind of token, beyond the domain."""
    lines: list[str] = []
    for finding in findings:
        assert finding.layer is not None
        where = f"Block {finding.layer}"
        if path_use.is_idle("moe", finding.layer):
            lines.append(f"{where}: idle. The model hardly uses these experts, so their choices mean little.")
        elif not finding.is_claimed(LEVEL):
            lines.append(
                f"{where}: inside a domain, no evidence that the expert depends on the kind of token."
            )
        else:
            lines.append(
                f"{where}: inside a domain, the heaviest expert tells something of the kind of token. What goes "
                "together; no intervention was made on token classes."
            )
    return tuple(lines)


def with_verdict(finding: Finding, verdict: str) -> Finding:
    """The same finding with its sentence."""
    return dataclasses.replace(finding, verdict=verdict)
