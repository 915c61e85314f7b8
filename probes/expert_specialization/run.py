"""Which expert prefers which domain and token class, and does it matter? See README.md.

hydra-lab probe expert-specialization demo --out DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hydra_lab import metrics
from hydra_lab.capture.path_use import path_use_of_samples, scored_tokens
from hydra_lab.data.samples import Samples
from hydra_lab.probing import Effect, Finding, Outcome, Probe, Study, corrected
from hydra_lab.probing.experts import cost_of_each_expert
from probes.expert_specialization import analysis, drawings, measure

_FEWEST_SAMPLES = 4  # per domain: two that measure preference and two that measure cost


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that the study measured, before anybody is told."""

    association: analysis.Association
    controls: analysis.Control
    causation: analysis.Causation
    use: metrics.PathUse


def gather(probe: Probe, settings: dict[str, Any]) -> Evidence:
    """Measure routing, its dependence on domain and token class, and what the experts' removal costs.

    Raises:
        ValueError: there are too few samples.
    """
    model, batch_size, seed = probe.model, settings["batch_size"], probe.seed
    resampling = {"num_resamplings": settings["num_resamplings"], "seed": seed}
    samples = probe.samples.take(np.flatnonzero(scored_tokens(probe.samples) > 0))
    check_enough(samples)
    preferring_rows, costing_rows = halves(samples)
    costing = samples.take(costing_rows)
    classes = measure.token_classes(probe.tokenizer)

    probe.progress(f"routing of {len(samples)} samples")
    observation = measure.observe(model, samples, classes, batch_size=batch_size)
    probe.progress("tests of dependence")
    association = analysis.associate(observation, **resampling)
    random = []
    for number in range(settings["num_controls"]):
        probe.progress(f"random router {number + 1} of {settings['num_controls']}")
        other = measure.with_random_routers(model, seed + number)
        random.append(measure.observe(other, samples, classes, batch_size=batch_size))
    increase = cost_of_each_expert(
        model,
        costing,
        observation.take(costing_rows).routing,
        batch_size=batch_size,
        progress=probe.progress,
    )
    probe.progress("comparison with the ablations")
    return Evidence(
        association,
        analysis.control(random),
        analysis.compare_with_ablation(
            observation.take(preferring_rows), increase, costing.domains, **resampling
        ),
        path_use_of_samples(model, costing, batch_size=batch_size, progress=probe.progress),
    )


def findings(evidence: Evidence) -> tuple[Finding, ...]:
    """Two findings per block: what its choices tell of the domain, and of the token's class given the domain."""
    association, causation, use = evidence.association, evidence.causation, evidence.use
    about_domain = [
        Finding(
            name=f"block {layer}: information about the domain",
            estimate=test.corrected,
            unit="nats",
            interval=test.interval,
            null="a chunk's first expert tells nothing of its sample's domain (domains permuted over samples)",
            null_value=0.0,
            p_value=test.p_value,
            n=test.num_samples,
            n_unit="samples",
            verdict="",
            layer=layer,
            causal=Effect(
                description="each expert removed: how much more the loss rises in a domain that prefers the expert "
                "by 100 points (share of its chunks, less the mean over domains)",
                estimate=float(causation.slope[y]),
                unit="nats per token",
                interval=(float(causation.slope_interval[y, 0]), float(causation.slope_interval[y, 1])),
                p_value=float(causation.slope_p[y]),
            ),
        )
        for y, (layer, test) in enumerate(zip(association.layers, association.domain_tests, strict=True))
    ]
    about_class = [
        Finding(
            name=f"block {layer}: information about the token's class, given the domain",
            estimate=test.corrected,
            unit="nats",
            interval=test.interval,
            null="inside a domain, a token's heaviest expert tells nothing of its class (sequences of experts "
            "exchanged between samples)",
            null_value=0.0,
            p_value=test.p_value,
            n=test.num_samples,
            n_unit="samples",
            verdict="",
            layer=layer,
        )
        for layer, test in zip(association.layers, association.class_tests, strict=True)
    ]
    told = corrected([*about_domain, *about_class])
    said = [
        *analysis.domain_verdicts(told[: len(about_domain)], evidence.controls, use),
        *analysis.class_verdicts(told[len(about_domain) :], use),
    ]
    return tuple(
        analysis.with_verdict(each, verdict)
        for each, verdict in zip([*about_domain, *about_class], said, strict=True)
    )


def run_study(probe: Probe, settings: dict[str, Any]) -> Outcome:
    """Gather the evidence and lay it out."""
    evidence = gather(probe, settings)
    association, causation = evidence.association, evidence.causation
    return Outcome(
        findings=findings(evidence),
        figures=drawings.draw(association, evidence.controls, causation, evidence.use),
        notes=(
            "Domains differ in their tokens, so an expert that follows tokens follows domains; a random router's "
            "choices tell of the domain too, which is why the trained one must beat "
            f"{settings['num_controls']} random ones.",
            "Removing an expert writes its weight to 0; the router cannot choose another instead.",
            "A path that the model hardly uses is called idle whatever its routing shows.",
            "Preference and cost are measured on different samples. Stars in the tables of single cells: "
            "Benjamini and Hochberg over all cells, 5%.",
        ),
        tables={
            "domains": list(association.domains),
            "token_classes": list(association.classes),
            "samples_per_domain": association.num_samples.tolist(),
            "random_routers": {
                str(layer): evidence.controls.corrected[:, y].tolist()
                for y, layer in enumerate(association.layers)
            },
            "domain_preferences": _preferences(
                association.domain_share, association.domain_adjusted, association.domains, association
            ),
            "token_class_preferences": _preferences(
                association.class_share, association.class_adjusted, association.classes, association
            ),
            "expert_by_domain": {
                "axes": ["block", "domain", "expert"],
                "share": association.domain_share.tolist(),
                "p_adjusted": association.domain_adjusted.tolist(),
            },
            "expert_by_token_class": {
                "axes": ["block", "token_class", "expert"],
                "share": association.class_share.tolist(),
                "p_adjusted": association.class_adjusted.tolist(),
            },
            "routing_margin": {
                "axes": ["block", "domain"],
                "unit": "logits",
                "mean": association.margin.tolist(),
            },
            "ablation": {
                "axes": ["block", "expert", "domain"],
                "unit": "nats per token",
                "preference": causation.preference.tolist(),
                "loss_increase": causation.increase.tolist(),
                "interval_95": causation.interval.tolist(),
                "samples_per_domain": causation.num_samples.tolist(),
                "experts_costliest_where_preferred": causation.matches.tolist(),
                "experts_in_use": causation.num_used.tolist(),
                "rank_correlation_of_preference_and_cost": causation.agreement.tolist(),
            },
            "path_use": evidence.use.to_dict(),
        },
    )


def _preferences(
    share: analysis.Floats,
    adjusted: analysis.Floats,
    names: tuple[str, ...],
    association: analysis.Association,
) -> list[dict[str, Any]]:
    found = analysis.clearest(share, adjusted, names, association.layers)
    return [
        {
            "block": each.layer,
            "name": each.name,
            "expert": each.expert,
            "share": each.share,
            "ratio": each.ratio,
            "p_adjusted": each.p_adjusted,
        }
        for each in found
    ]


def check_enough(samples: Samples) -> None:
    """Raises ValueError unless there are at least two domains with at least four samples each."""
    counts = {domain: samples.domains.count(domain) for domain in dict.fromkeys(samples.domains)}
    few = {domain: count for domain, count in counts.items() if count < _FEWEST_SAMPLES}
    if len(counts) < 2:
        raise ValueError(
            f"the samples are of one domain ({', '.join(counts)}); the study compares at least two"
        )
    if few:
        told = ", ".join(f"{domain} {count}" for domain, count in few.items())
        raise ValueError(f"too few samples ({told}): each domain needs at least {_FEWEST_SAMPLES}")


def halves(samples: Samples) -> tuple[list[int], list[int]]:
    """Every domain's samples by turns: those that measure preference, those that measure cost."""
    split: tuple[list[int], list[int]] = ([], [])
    seen: dict[str, int] = {}
    for row, domain in enumerate(samples.domains):
        split[seen.get(domain, 0) % 2].append(row)
        seen[domain] = seen.get(domain, 0) + 1
    return split


STUDY = Study(
    name="expert-specialization",
    question="Which expert prefers which domain, and which class of token; and does it matter for the loss?",
    claim="The experts of a chunk-routed mixture specialize by domain (arXiv 2508.15099 names this as an open risk).",
    null="A chunk's expert tells nothing of the domain of its text, beyond what a random router's choice would tell.",
    causal_check="Each expert is removed, and the loss measured by domain on samples that the preferences were not "
    "measured on: it should rise most where the expert is preferred.",
    run=run_study,
    config=Path(__file__).with_name("config.toml"),
    needs=("moe",),
)
