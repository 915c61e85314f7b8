"""What does the model lose without an expert, in which domain, and do experts stand in for each other? See README.md.

hydra-lab probe expert-ablation demo --out DIR
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from hydra_lab import metrics
from hydra_lab.capture.path_use import scored_tokens
from hydra_lab.metrics.arrays import domain_codes
from hydra_lab.probing import Effect, Finding, Outcome, Probe, Study
from hydra_lab.probing.experts import (
    cost_of_each_expert,
    cost_of_random_removals,
    costs_of_removal,
    observe_routing,
)
from probes.expert_ablation import drawings
from probes.expert_ablation.analysis import (
    Bools,
    Costliest,
    DomainTest,
    Floats,
    Ints,
    PairTest,
    costliest,
    domain_means,
    domains_matter,
    pairs_interact,
)

_FEWEST_SAMPLES = 4  # per domain: two on which the costliest expert is chosen, two on which it is measured


@dataclass(frozen=True, eq=False)
class Costs:
    """What the model loses. Axes: Y blocks, E experts, N samples, M samples on which pairs were removed, R controls.

    Attributes:
        layers: [Y].
        domains: [Z] names.
        domain: [N] domain of each sample.
        load: [Y, E] share of the chunks' choices that fall on the expert.
        single: [Y, E, N] nats per token.
        pair_rows: [M] samples on which pairs were removed.
        both: [Y, E, E, M] nats per token; read above the diagonal.
        used: [Y, E, N] whether the sample uses the expert.
        random: [Y, R, N] cost of removing choices at random, as many as a mean expert has.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    domain: Ints
    load: Floats
    single: Floats
    pair_rows: Ints
    both: Floats
    used: Bools
    random: Floats


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the costs say, by block."""

    domain_tests: tuple[DomainTest, ...]
    costliest: tuple[Costliest, ...]
    pair_tests: tuple[PairTest, ...]


def measure(probe: Probe, settings: dict[str, Any]) -> Costs:
    """Remove every expert, every pair of experts that a sample uses, and choices at random.

    Raises:
        ValueError: there are too few samples.
    """
    model, batch_size = probe.model, settings["batch_size"]
    samples = probe.samples.take(np.flatnonzero(scored_tokens(probe.samples) > 0))
    names, domain_N = domain_codes(samples.domains)
    counts = np.bincount(domain_N)
    if len(names) < 2:
        raise ValueError(
            f"the samples are of one domain ({', '.join(names)}); the study compares at least two"
        )
    if counts.min() < _FEWEST_SAMPLES:
        told = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        raise ValueError(f"too few samples ({told}): each domain needs at least {_FEWEST_SAMPLES}")
    probe.progress(f"routing of {len(samples)} samples")
    routing = observe_routing(model, samples, batch_size=batch_size).record
    single = cost_of_each_expert(model, samples, routing, batch_size=batch_size, progress=probe.progress)
    used_YEN = np.moveaxis(np.asarray(routing.chosen.any(axis=2)), 2, 1)

    pair_rows = np.concatenate(
        [np.flatnonzero(domain_N == z)[: settings["pair_samples_per_domain"]] for z in range(len(names))]
    )
    pairs = list(combinations(range(routing.num_experts), 2))
    removals = [(layer, pair) for layer in routing.layers for pair in pairs]
    used_YEM = used_YEN[:, :, pair_rows]
    shared = [used_YEM[y, i] & used_YEM[y, j] for y in range(len(routing.layers)) for i, j in pairs]
    both_RM = costs_of_removal(
        model,
        samples.take(pair_rows),
        removals,
        np.stack(shared),
        batch_size=batch_size,
        progress=probe.progress,
    )
    num_experts = routing.num_experts
    both = np.zeros((len(routing.layers), num_experts, num_experts, len(pair_rows)))
    first, second = np.array(pairs).T
    both[:, first, second] = both_RM.reshape(len(routing.layers), len(pairs), len(pair_rows))
    return Costs(
        layers=routing.layers,
        domains=names,
        domain=domain_N,
        load=metrics.expert_load(routing).share,
        single=single,
        pair_rows=pair_rows,
        both=both,
        used=used_YEN,
        random=cost_of_random_removals(
            model,
            samples,
            routing,
            num_draws=settings["num_controls"],
            seed=probe.seed,
            batch_size=batch_size,
            progress=probe.progress,
        ),
    )


def weigh(costs: Costs, *, num_resamplings: int, seed: int) -> Evidence:
    """The tests of every block."""
    rng = np.random.default_rng(seed)
    resampling = {"num_resamplings": num_resamplings, "rng": rng}
    rows = costs.pair_rows
    return Evidence(
        tuple(domains_matter(single, costs.domain, **resampling) for single in costs.single),
        tuple(costliest(single, costs.domain, **resampling) for single in costs.single),
        tuple(
            pairs_interact(costs.single[y][:, rows], costs.both[y], costs.used[y][:, rows], **resampling)
            for y in range(len(costs.layers))
        ),
    )


def findings(costs: Costs, evidence: Evidence) -> tuple[Finding, ...]:
    """Two findings per block: costs by domain, and the interaction of pairs."""
    found: list[Finding] = []
    for y, layer in enumerate(costs.layers):
        test, most, pair = evidence.domain_tests[y], evidence.costliest[y], evidence.pair_tests[y]
        domain = costs.domains[most.domain]
        effect = Effect(
            description=f"expert {most.expert} removed, loss on {domain}; chosen on other samples as the costliest",
            estimate=most.cost,
            unit="nats per token",
            interval=most.interval,
        )
        found.append(
            Finding(
                name=f"block {layer}: costs of removal by domain",
                estimate=test.explained,
                unit="of the variance between samples",
                interval=test.interval,
                null="an expert's removal costs every domain the same (domains permuted over samples)",
                null_value=test.null_mean,
                p_value=test.p_value,
                n=len(costs.domain),
                n_unit="samples",
                verdict=_domain_verdict(layer, test, most, domain),
                causal=effect,
                layer=layer,
            )
        )
        found.append(
            Finding(
                name=f"block {layer}: interaction of pairs",
                estimate=pair.mean,
                unit="nats per token",
                interval=pair.interval,
                null="removing two experts costs the sum of removing each (signs of the samples at random)",
                null_value=0.0,
                p_value=pair.p_value,
                n=pair.num_samples,
                n_unit="samples that use two experts",
                verdict=_pair_verdict(layer, pair),
                layer=layer,
            )
        )
    return tuple(found)


def _domain_verdict(layer: int, test: DomainTest, most: Costliest, domain: str) -> str:
    if test.p_value > 0.05:
        return f"Block {layer}: no evidence that removing an expert costs some domains more than others."
    return (
        f"Block {layer}: what an expert's removal costs depends on the domain; removing expert {most.expert} raises "
        f"the loss on {domain} by {most.cost:.3f} nats per token."
    )


def _pair_verdict(layer: int, pair: PairTest) -> str:
    if pair.p_value is None:
        return f"Block {layer}: too few samples use two of its experts to say whether they interact."
    if pair.p_value > 0.05:
        return f"Block {layer}: no evidence that two experts cost more or less than the sum of each."
    if pair.mean > 0:
        return (
            f"Block {layer}: its experts stand in for each other; two removed together cost "
            f"{pair.mean:.4f} nats per token more than the sum of each."
        )
    return (
        f"Block {layer}: its experts work together; two removed together cost {-pair.mean:.4f} nats per token "
        "less than the sum of each."
    )


def run_study(probe: Probe, settings: dict[str, Any]) -> Outcome:
    """Measure, weigh and lay out."""
    costs = measure(probe, settings)
    probe.progress("tests")
    evidence = weigh(costs, num_resamplings=settings["num_resamplings"], seed=probe.seed)
    mean_YEZ = domain_means(costs.single, costs.domain, len(costs.domains))
    return Outcome(
        findings=findings(costs, evidence),
        figures=drawings.draw(costs, evidence),
        notes=(
            "An expert is removed by writing its weight to 0; the router cannot choose another instead, and the "
            "weights of the chunk's other experts stay as they were.",
            "Every estimate here is itself an intervention. The causal effect of a block is that of one expert on "
            "one domain, chosen on every second sample and measured on the others.",
            "Loss is no straight line in what is removed, so some interaction is to be expected of any path that "
            "matters; its sign and size say how much the experts of a block make up for each other.",
            f"Pairs were removed on {len(costs.pair_rows)} of the {len(costs.domain)} samples. An interaction below "
            "1e-6 nats is rounding and counts as 0.",
        ),
        tables={
            "domains": list(costs.domains),
            "cost_by_domain": {
                "axes": ["block", "expert", "domain"],
                "unit": "nats per token",
                "mean": mean_YEZ.tolist(),
            },
            "load": {"axes": ["block", "expert"], "share_of_choices": costs.load.tolist()},
            "random_removal_of_a_mean_load": {
                "axes": ["block", "draw"],
                "unit": "nats per token",
                "mean": costs.random.mean(axis=-1).tolist(),
            },
            "interaction": {
                "axes": ["block", "expert", "expert"],
                "unit": "nats per token",
                "mean": [test.interaction.tolist() for test in evidence.pair_tests],
            },
        },
    )


STUDY = Study(
    name="expert-ablation",
    question="What does the model lose without an expert, in which domain, and do experts stand in for each other?",
    claim="Experts matter for the domains they serve, and two cost more than the sum where each covers for the other.",
    null="An expert's removal costs every domain the same, and two experts cost the sum of each.",
    causal_check="The study is an intervention: experts, pairs of experts, and as many choices at random are removed.",
    run=run_study,
    config=Path(__file__).with_name("config.toml"),
    needs=("moe",),
)
