"""The study: does the model take facts from its memory when, and only when, the context does not hold them?

hydra-lab probe memory-recall demo --out results
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hydra_lab.capture.path_use import path_use_of_samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Outcome, Probe, Study
from probes.memory_recall import drawings, measure
from probes.memory_recall.analysis import Evidence, findings
from probes.memory_recall.editing import edit_all
from probes.memory_recall.questions import FORMS, Question, editable_facts, world_questions
from probes.memory_recall.settings import Settings

_USE_SAMPLES = 8  # per domain, for the remark on every figure


def gather(
    model: HydraForCausalLM,
    questions: Sequence[Question],
    settings: Settings,
    *,
    progress: Callable[[str], None] = lambda _line: None,
) -> Evidence:
    """Ask every question in every form, with and without the memory, and delete the first ones' facts.

    Raises:
        ValueError: the model has no memory.
    """
    layers = tuple(model.config.layers_with("memory"))
    if not layers:
        raise ValueError("this model has no block with a memory, so there is nothing to study")
    batch_size = settings.batch_size
    whole, without = {}, {}
    for form in FORMS:
        progress(f"asking {len(questions)} questions: {form}")
        whole[form] = measure.answers(model, questions, form, batch_size=batch_size)
        without[form] = measure.answers_without_memory(model, questions, form, batch_size=batch_size)
    deleted = questions[: settings.num_deleted]
    mass = measure.read_mass(model, deleted, batch_size=batch_size)
    addresses = measure.own_addresses(mass, settings.num_addresses)
    deletion = measure.delete(model, deleted, addresses, batch_size=batch_size, progress=progress)
    names = list(dict.fromkeys(question.relation for question in questions))
    relations = np.array([names.index(question.relation) for question in questions], dtype=np.int64)
    return Evidence(layers, relations, whole, without, deletion)


def run(probe: Probe, settings: dict[str, Any]) -> Outcome:
    """Put the question to a model that was trained on the world's facts."""
    chosen = Settings(**settings)
    questions = world_questions(
        probe.tokenizer,
        num_questions=chosen.num_questions,
        num_notes=chosen.num_notes,
        seed=probe.seed,
    )
    evidence = gather(probe.model, questions, chosen, progress=probe.progress)
    if chosen.num_edited:
        editing = edit_all(
            probe.model,
            probe.tokenizer,
            editable_facts(probe.tokenizer, num_facts=chosen.num_edited, seed=probe.seed),
            questions,
            layer=evidence.layers[0],
            batch_size=chosen.batch_size,
            progress=probe.progress,
        )
        evidence = replace(evidence, editing=editing)
    probe.progress("use of the memory")
    use = path_use_of_samples(probe.model, probe.samples.first_of_each(_USE_SAMPLES), batch_size=8)
    found = findings(evidence, num_resamplings=chosen.num_resamplings, seed=probe.seed)
    return Outcome(
        findings=found,
        figures=drawings.draw(evidence, questions, use),
        notes=(
            "Facts are drawn from those that the shipped model was trained on, in the phrasing of its open-book "
            "documents; a model that never saw them answers at chance, and the study then says so.",
            "Answers are compared by their first token, and counted right when every token is the most likely one.",
            "A masked address adds nothing; what the model would have learned without it is another question.",
        ),
        tables={"deleted facts": _table(evidence, questions)},
    )


def _table(evidence: Evidence, questions: Sequence[Question]) -> list[dict[str, Any]]:
    deletion = evidence.deletion
    size = len(deletion.drop)
    elsewhere = (deletion.drop.sum(axis=0) - np.diagonal(deletion.drop)) / max(1, size - 1)
    return [
        {
            "fact": questions[index].text,
            "right": bool(evidence.whole["closed"].right[index]),
            "right without its addresses": bool(deletion.right[index, index]),
            "fall of log-probability, own addresses": float(deletion.drop[index, index]),
            "fall of log-probability, others' addresses": float(elsewhere[index]),
            "addresses": {str(layer): rows[index].tolist() for layer, rows in deletion.addresses.items()},
        }
        for index in range(size)
    ]


STUDY = Study(
    name="memory-recall",
    question="Does the model take facts from its memory, and only when the context does not hold them?",
    claim="The memory's gate beta is low when the context holds the answer and high when it does not; the memory then "
    "supplies the answer, from addresses of that fact's own.",
    null="Answers, notes and addresses handed out at random: beta, the cost of a cut and that of a deletion do not "
    "know which question they belong to.",
    causal_check="The memory is cut in every block, and the addresses that a question reads most are masked, against "
    "those of other questions.",
    run=run,
    config=Path(__file__).with_name("config.toml"),
    needs=("memory",),
)
