"""The study: which slot of the workspace holds which premise?

hydra-lab probe workspace-tracing demo --out results
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydra_lab.capture.path_use import path_use_of_samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Outcome, Probe, Study
from probes.workspace_tracing import drawings, measure
from probes.workspace_tracing.analysis import Patched, Trace, findings, share_of_way, split_solved
from probes.workspace_tracing.measure import Patch
from probes.workspace_tracing.problems import KINDS, Problem, draw_problems
from probes.workspace_tracing.settings import Settings

_USE_SAMPLES = 8  # per domain, for the remark on every figure


def trace(
    model: HydraForCausalLM,
    kind: str,
    problems: Sequence[Problem],
    settings: Settings,
    *,
    progress: Callable[[str], None] = lambda _line: None,
) -> Trace:
    """Patch slots from runs in which a premise differs.

    Raises:
        ValueError: the model has no workspace.
    """
    layers, num_slots = tuple(model.config.layers_with("workspace")), model.config.workspace_num_slots
    if not layers:
        raise ValueError("this model has no block with a workspace, so there is nothing to trace")
    batch = {"batch_size": settings.batch_size}
    progress(f"{kind}: {len(problems)} problems")
    baseline = measure.baseline(model, problems, **batch)
    choosing, testing = split_solved(baseline)
    if len(testing) == 0:
        nothing = np.full((len(layers), num_slots), np.nan)
        return Trace(
            kind=kind,
            layers=layers,
            baseline=baseline,
            choosing=choosing,
            testing=testing,
            slot_share=nothing,
            chosen=np.full(len(layers), -1),
            slot=(),
            block=(),
            everything=None,
            cut=np.zeros((len(layers), 0)),
        )

    progress(f"{kind}: {len(choosing)} solved problems choose a slot")
    every_slot = range(num_slots)
    single = [Patch.of({layer: [slot]}) for layer in layers for slot in every_slot]
    contrasts = measure.patched(model, [problems[row] for row in choosing], single, "changed", **batch)
    way = (baseline.contrast - baseline.contrast_changed)[choosing]
    shares = [share_of_way(baseline.contrast[choosing] - each, way) for each in contrasts]
    slot_share = np.array(shares).reshape(len(layers), num_slots)
    chosen = slot_share.argmax(axis=1)

    progress(f"{kind}: {len(testing)} solved problems test it")
    tested = [problems[row] for row in testing]
    patches = [Patch.of({layer: [int(slot)]}) for layer, slot in zip(layers, chosen, strict=True)]
    patches += [Patch.of({layer: every_slot}) for layer in layers]
    patches.append(Patch.of(dict.fromkeys(layers, every_slot)))
    own, other = (
        baseline.contrast[testing] - measure.patched(model, tested, patches, version, **batch)
        for version in ("changed", "control")
    )
    moved = [Patched(*each) for each in zip(own, other, strict=True)]
    cut = [measure.cut(model, tested, layer, **batch) for layer in layers]
    return Trace(
        kind=kind,
        layers=layers,
        baseline=baseline,
        choosing=choosing,
        testing=testing,
        slot_share=slot_share,
        chosen=chosen,
        slot=tuple(moved[: len(layers)]),
        block=tuple(moved[len(layers) : -1]),
        everything=moved[-1],
        cut=baseline.contrast[testing] - np.stack(cut),
    )


def run(probe: Probe, settings: dict[str, Any]) -> Outcome:
    """Trace the premises of three kinds of problems through a model that was trained on such problems."""
    chosen = Settings(**settings)
    traces: list[Trace] = []
    for kind in KINDS:
        problems = draw_problems(
            kind,
            probe.tokenizer,
            num_problems=chosen.num_problems,
            chunk_size=probe.model.config.workspace_chunk_size,
            most_tokens=chosen.most_tokens,
            seed=probe.seed,
        )
        traces.append(trace(probe.model, kind, problems, chosen, progress=probe.progress))
    probe.progress("use of the workspace")
    use = path_use_of_samples(probe.model, probe.samples.first_of_each(_USE_SAMPLES), batch_size=8)
    found = findings(
        traces, least_share=chosen.least_share, num_resamplings=chosen.num_resamplings, seed=probe.seed
    )
    return Outcome(
        findings=found,
        figures=drawings.draw(traces, use),
        notes=(
            "A premise is one value, or one answer in a note; its two versions have equally many tokens and differ in "
            "nothing else. It stands in a chunk that is over before the question, so that a slot can hold it.",
            "What is patched is what later tokens read from a slot; how the slot is written goes on undisturbed.",
            "Only problems that the model solves in both versions are traced. Every second one chooses the slot, the "
            "others test it, so the share of the chosen slot is not the largest of many by luck.",
        ),
        tables={"slots": [_table(each) for each in traces]},
    )


def _table(trace: Trace) -> dict[str, Any]:
    solved = np.concatenate([trace.choosing, trace.testing])
    baseline = trace.baseline
    means = {
        name: (values[:, solved].mean(axis=1) if len(solved) else np.full_like(trace.slot_share, np.nan))
        for name, values in (
            ("difference of content", baseline.content),
            ("written from the premise", baseline.written),
            ("read by the last token", baseline.read),
        )
    }
    return {
        "kind": trace.kind,
        "blocks": list(trace.layers),
        "problems": len(baseline.contrast),
        "solved": len(solved),
        "mean lag, tokens": float(baseline.lag.mean()),
        "share of the way, patched alone": trace.slot_share.tolist(),
        **{name: values.tolist() for name, values in means.items()},
    }


STUDY = Study(
    name="workspace-tracing",
    question="Which slot of the workspace holds which premise, and does the answer depend on it?",
    claim="A premise that is needed later is written into a slot, and the question reads it there.",
    null="Premises swapped at random: a slot from the run with another premise moves the answer no further than one "
    "from a run whose unasked premise differs.",
    causal_check="One slot's content is taken from a run that differs in one premise only, and the answer follows, on "
    "problems that did not choose the slot; and the workspace is cut.",
    run=run,
    config=Path(__file__).with_name("config.toml"),
    needs=("workspace",),
)
