"""What can be read off the residual stream, router logits, ssm states and slots by a linear map? See README.md.

hydra-lab probe linear-probe demo --out DIR
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hydra_lab.capture.path_use import sample_losses, scored_tokens
from hydra_lab.data.samples import Samples
from hydra_lab.locks import model_lock
from hydra_lab.metrics import mean_interval
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Effect, Finding, Outcome, Probe, Study
from probes.linear_probe import drawings
from probes.linear_probe.analysis import (
    KindScore,
    SiteScore,
    best_of,
    directions,
    folds_by_sample,
    permutations,
    score_site,
    sign_test,
)
from probes.linear_probe.features import KIND_NAMES, KINDS, Site, collect
from probes.linear_probe.tasks import Floats, Task, binding_task, depth_task, domain_task, position_task


@dataclass(frozen=True, eq=False)
class Removal:
    """What taking a probe's directions out of the residual stream costs.

    Attributes:
        site: whose output they are taken from.
        rank: how many.
        cost: [M] loss without them less the loss with them, nats per scored token, on samples that the probe was not
            fitted on.
        control: [R, M] the same for the directions of probes that were fitted to permuted labels.
        p_value: one-sided, of "costs no more than those" (signs of the samples at random).
    """

    site: Site
    rank: int
    cost: Floats
    control: Floats
    p_value: float

    @property
    def excess(self) -> Floats:
        """[M] cost beyond that of the control directions."""
        return self.cost - self.control.mean(axis=0)


@dataclass(frozen=True, eq=False)
class TaskEvidence:
    """All that was measured of one task."""

    task: Task
    scores: tuple[SiteScore, ...]
    removal: Removal

    def of_kind(self, kind: str) -> list[SiteScore]:
        """Scores of the sites of one kind, by block."""
        return [score for score in self.scores if score.site.kind == kind]


TASKS: dict[str, Callable[[Probe, dict[str, Any], np.random.Generator], Task]] = {
    "domain": lambda probe, settings, rng: domain_task(_texts(probe), every=settings["every"], rng=rng),
    "position": lambda probe, settings, rng: position_task(_texts(probe), every=settings["every"], rng=rng),
    "depth": lambda probe, settings, rng: depth_task(
        probe.tokenizer, num_problems=settings["num_problems"], rng=rng
    ),
    "binding": lambda probe, settings, rng: binding_task(
        probe.tokenizer, num_problems=settings["num_problems"], rng=rng
    ),
}
"""What can be asked for, by name."""


def gather(probe: Probe, settings: dict[str, Any]) -> tuple[TaskEvidence, ...]:
    """Probe every site for every task.

    Raises:
        ValueError: a task is unknown, or the samples are too few or too short for it.
    """
    unknown = [name for name in settings["tasks"] if name not in TASKS]
    if unknown or not settings["tasks"]:
        raise ValueError(f"tasks={settings['tasks']} must name some of {', '.join(TASKS)}")
    return tuple(_probe_task(probe, settings, name) for name in settings["tasks"])


def _texts(probe: Probe) -> Samples:
    return probe.samples.take(np.flatnonzero(scored_tokens(probe.samples) > 0))


def _probe_task(probe: Probe, settings: dict[str, Any], name: str) -> TaskEvidence:
    rng = np.random.default_rng([probe.seed, list(TASKS).index(name)])
    task = TASKS[name](probe, settings, rng)
    if len(task.row) == 0 or len(np.unique(task.label)) < 2:
        raise ValueError(
            f"{name}: needs different labels and samples of at least every={settings['every']} tokens"
        )
    probe.progress(f"{name}: {len(task.row)} observations of {len(np.unique(task.row))} samples")
    features = collect(
        probe.model,
        task,
        most_features=settings["most_features"],
        seed=probe.seed,
        batch_size=settings["batch_size"],
    )
    permuted_WO = permutations(task, settings["num_permutations"], rng)
    folds = folds_by_sample(task, settings["num_folds"], rng)
    scores: list[SiteScore] = []
    for site, values in features.items():
        probe.progress(f"{name}: {site}")
        scores.append(score_site(site, values, task, permuted_WO, folds, ridge=settings["ridge"], rng=rng))
    best = best_of([score for score in scores if score.site.kind == "residual"]).best.site
    controls = permuted_WO[: settings["num_controls"]]
    removal = _remove(probe, settings, task, features[best], best, controls, rng)
    return TaskEvidence(task, tuple(scores), removal)


def _remove(
    probe: Probe,
    settings: dict[str, Any],
    task: Task,
    values: NDArray[np.float32],
    site: Site,
    permuted_RO: Floats,
    rng: np.random.Generator,
) -> Removal:
    """Fit a probe on half of the samples, take its directions out of the residual stream, and measure the loss on the
    other half."""
    rows = rng.permutation(np.unique(task.row))
    fit = np.flatnonzero(np.isin(task.row, rows[: len(rows) // 2]))
    judged = task.samples.take(np.sort(rows[len(rows) // 2 :]))
    found = directions(values, task.label, task, fit, ridge=settings["ridge"])
    batch_size = settings["batch_size"]
    intact_M = sample_losses(probe.model, judged, batch_size=batch_size)
    centre = values[fit].mean(axis=0)

    def cost(basis: Floats) -> Floats:
        with model_lock(probe.model), without_directions(probe.model, site.layer, basis, centre):
            return sample_losses(probe.model, judged, batch_size=batch_size) - intact_M

    probe.progress(f"{task.name}: {len(found)} directions taken out after block {site.layer}")
    cost_M = cost(found)
    control_RM = np.stack(
        [cost(directions(values, label, task, fit, ridge=settings["ridge"])) for label in permuted_RO]
    )
    p_value = sign_test(cost_M - control_RM.mean(axis=0), settings["num_permutations"], rng)
    return Removal(site, len(found), cost_M, control_RM, p_value)


@contextmanager
def without_directions(
    model: HydraForCausalLM, layer: int, basis_RD: Floats, centre_D: NDArray[np.float32]
) -> Iterator[None]:
    """Within the context, the residual stream after block `layer` stands at `centre_D` along every direction of
    `basis_RD`, whatever the input."""
    basis = torch.from_numpy(basis_RD).float().to(model.device)
    centre = torch.from_numpy(centre_D).float().to(model.device)

    def project(_module: nn.Module, _inputs: object, residual_BLD: Tensor) -> Tensor:
        along = (residual_BLD.float() - centre) @ basis.T
        return residual_BLD - (along @ basis).to(residual_BLD.dtype)

    handle = model.model.layers[layer].register_forward_hook(project)
    try:
        yield
    finally:
        handle.remove()


def findings(evidence: tuple[TaskEvidence, ...]) -> tuple[Finding, ...]:
    """One finding per task and kind of site; those of the residual stream carry the causal check."""
    found: list[Finding] = []
    for each in evidence:
        for kind in KINDS:
            scores = each.of_kind(kind)
            if scores:
                found.append(_finding(each, kind, best_of(scores)))
    return tuple(found)


def _finding(evidence: TaskEvidence, kind: str, score: KindScore) -> Finding:
    task, best = evidence.task, score.best
    unit = "balanced accuracy" if task.kind == "class" else "of the variance (R squared)"
    return Finding(
        name=f"{task.name} in the {KIND_NAMES[kind]}",
        estimate=best.score,
        unit=unit,
        interval=best.interval,
        null=f"{task.asks}, cannot be read off ({_NULLS[task.null]}, best block of each permutation)",
        null_value=score.null_mean,
        p_value=score.p_value,
        n=len(np.unique(task.row)),
        n_unit="samples",
        verdict=_verdict(task, kind, score),
        causal=_effect(evidence, score.p_value) if kind == "residual" else None,
        layer=best.site.layer,
    )


_NULLS = {
    "exchange": "labels permuted over samples",
    "turn": "labels turned round inside each sample",
    "choose": "the label any of the problem's values",
}


def _verdict(task: Task, kind: str, score: KindScore) -> str:
    best = score.best
    if score.p_value > 0.05:
        return f"It is not shown that {task.asks}, can be read off the {KIND_NAMES[kind]} of any block."
    measure = "balanced accuracy" if task.kind == "class" else "R squared"
    said = (
        f"{task.asks[0].upper()}{task.asks[1:]}, can be read off the {KIND_NAMES[kind]} of block {best.site.layer}: "
        f"{measure} {best.score:.2f}, by chance {score.null_mean:.2f}. The same probe reaches {best.control:.2f} for "
        f"{task.control_asks} (selectivity {best.selectivity:.2f})."
    )
    return said if kind == "residual" else said + " No intervention was made here."


def _effect(evidence: TaskEvidence, p_label: float) -> Effect:
    """What the removal costs. Directions of a label that cannot be read mean nothing: the larger p-value counts."""
    removal = evidence.removal
    what = "direction" if removal.rank == 1 else "directions"
    return Effect(
        description=f"the probe's {removal.rank} {what} taken out after block {removal.site.layer}: rise of the loss "
        "beyond that of the directions of probes fitted to permuted labels, on samples that no probe was fitted on",
        estimate=float(removal.excess.mean()),
        unit="nats per token",
        interval=mean_interval(removal.excess),
        p_value=max(p_label, removal.p_value),
    )


def run_study(probe: Probe, settings: dict[str, Any]) -> Outcome:
    """Gather the evidence and lay it out."""
    evidence = gather(probe, settings)
    return Outcome(
        findings=findings(evidence),
        figures=drawings.draw(evidence),
        notes=(
            "A linear probe shows what can be read off, not what the model reads. The causal check takes a probe's "
            "directions out of the residual stream for every token, and counts only where the label can be read; none "
            "was made on router logits, states and slots, "
            "because what a probe reads there is no direction that the model's own read-out could be denied.",
            "The block is the best of its kind; the null takes the best block of every permutation too, so the p-value "
            "allows for the choice, but the estimate is a little favoured by it.",
            f"States and slots are projected at random to {settings['most_features']} numbers: less may be read off "
            "them here than they hold.",
            "What is held along more directions than the probe found stays when these are taken out: a small causal "
            "effect does not say that the label is not used.",
            f"The causal effect is taken against the mean of {settings['num_controls']} probes fitted to permuted "
            "labels; its interval is over samples and leaves out that other such probes would give another mean.",
            "Depth and binding are asked of made problems (brackets and letters; four keys with values), domain and "
            "position of text.",
        ),
        tables={
            "scores": {
                each.task.name: [
                    {
                        "site": str(score.site),
                        "score": score.score,
                        "interval_95": list(score.interval),
                        "control": score.control,
                        "selectivity": score.selectivity,
                        "null_mean": float(score.null.mean()),
                        "null_95": float(np.quantile(score.null, 0.95)),
                    }
                    for score in each.scores
                ]
                for each in evidence
            },
            "removal": {
                each.task.name: {
                    "site": str(each.removal.site),
                    "directions": each.removal.rank,
                    "cost": float(each.removal.cost.mean()),
                    "cost_with_permuted_labels": each.removal.control.mean(axis=1).tolist(),
                }
                for each in evidence
            },
        },
    )


STUDY = Study(
    name="linear-probe",
    question="What do the residual stream, router logits, ssm states and slots hold that a linear map can read?",
    claim="Domain, position, nesting depth and the binding of keys to values can be read off, more than labels that "
    "have nothing to do with them.",
    null="The label cannot be read off on samples that the probe was not fitted on.",
    causal_check="The directions that the probe reads are taken out of the residual stream; the loss should rise more "
    "than without the directions of probes fitted to permuted labels.",
    run=run_study,
    config=Path(__file__).with_name("config.toml"),
)
