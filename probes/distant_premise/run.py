"""Does the attention select the block that holds the premise, and to what distance does the model answer? See
README.md.

hydra-lab probe distant-premise demo --out DIR
"""

from pathlib import Path
from typing import Any

from hydra_lab.probing import Outcome, Probe, Study
from probes.distant_premise import analysis, drawings
from probes.distant_premise.measure import Answers, ask
from probes.distant_premise.problems import make_problems
from probes.distant_premise.settings import Settings


def run(probe: Probe, settings: dict[str, Any]) -> Outcome:
    """Measure `probe.model`; `settings` as in settings.py.

    Raises:
        ValueError: a setting is wrong, the attention selects nothing, or recall problems cannot be written in this
            tokenizer.
    """
    chosen = Settings(**settings)
    config = probe.model.config
    if config.attention_num_selected == 0:
        raise ValueError("the attention of this model selects no blocks (attention_num_selected=0)")
    problems = make_problems(
        probe.tokenizer,
        probe.samples,
        num_problems=chosen.num_problems,
        num_pairs=chosen.num_pairs,
        num_questions=chosen.num_questions,
        largest_distance=max(chosen.distances),
        lead=2 * config.attention_block_size,
        seed=probe.seed,
    )
    answers = ask(probe.model, problems, chosen.distances, progress=probe.progress)
    in_view = [each.distance for each in answers if not analysis.is_selectable(each)]
    notes = [
        analysis.breaks_at(answers, problems.asked),
        "The filler is random common words, as in training, where it was 320 tokens at most.",
        f"Each problem is read once, and {chosen.num_questions} of its {chosen.num_pairs} pairs are asked "
        "for at every distance, so the distances share their problems.",
    ]
    if in_view:
        notes.append(
            f"At {', '.join(map(str, in_view))} tokens a pair still lies in the attention's window of "
            f"{config.attention_window}, so the selection was not judged there."
        )
    return Outcome(
        findings=analysis.findings(
            answers, problems.asked, num_resamplings=chosen.num_resamplings, seed=probe.seed
        ),
        figures=drawings.draw(answers, problems.asked),
        notes=tuple(notes),
        tables={"distances": [_row(each, problems.asked) for each in answers]},
    )


def _row(answers: Answers, asked: analysis.Ints) -> dict[str, Any]:
    selected = answers.selected == answers.premise[:, None, None]
    return {
        "distance": answers.distance,
        "candidates": answers.num_candidates,
        "accuracy_among_values": float(analysis.is_right(answers.score, asked).mean()),
        "accuracy_among_all_tokens": float(answers.is_exact.mean()),
        "accuracy_under": {
            name: float(analysis.is_right(score, asked).mean()) for name, score in answers.score_under.items()
        },
        "hit_rate_by_head": {
            f"block {layer}": selected[y].any(axis=-1).mean(axis=(0, 1)).tolist()
            for y, layer in enumerate(answers.layers)
        },
        "chance_per_head": analysis.chance_of_selection(answers),
    }


STUDY = Study(
    name="distant-premise",
    question="Does the attention select the block that holds the premise, and to what distance does the "
    "model answer?",
    claim="The selection of blocks finds a premise at any distance.",
    null="What is selected, and what is answered, does not depend on which of the pairs is asked for.",
    causal_check="While the question is read, the premise's block is forbidden or forced, the attention is "
    "cut, or the ssm remembers another problem.",
    run=run,
    config=Path(__file__).with_name("config.toml"),
    needs=("attention",),
)
