"""Which path does in-context copying? See README.md.

hydra-lab probe induction demo --out DIR
"""

from pathlib import Path
from typing import Any

from hydra_lab.metrics import mean_interval
from hydra_lab.probing import Outcome, Probe, Study
from probes.induction import analysis, drawings
from probes.induction.episodes import random_episodes, recall_episodes, whole_words
from probes.induction.measure import CopyGain, block_cuts, copy_gain, pair_cuts, path_cuts
from probes.induction.settings import Settings


def run(probe: Probe, settings: dict[str, Any]) -> Outcome:
    """Measure `probe.model`; `settings` as in settings.py.

    Raises:
        ValueError: a setting is wrong, or the vocabulary is too small for a distance.
    """
    chosen = Settings(**settings)
    model, seed = probe.model, probe.seed
    words = whole_words(probe.tokenizer)
    singles = path_cuts(model)
    every = [*singles, *block_cuts(model), *pair_cuts(model)]
    measuring = {"batch_size": chosen.batch_size, "progress": probe.progress}
    random: list[CopyGain] = []
    for distance in chosen.distances:
        episodes = random_episodes(
            words, num_sequences=chosen.num_sequences, distance=distance, repeat=chosen.repeat, seed=seed
        )
        cuts = every if distance == chosen.block_distance else singles
        random.append(copy_gain(model, episodes, cuts, **measuring))
    problems = recall_episodes(
        probe.tokenizer, num_problems=chosen.num_sequences, num_pairs=chosen.num_pairs, seed=seed
    )
    recall = copy_gain(model, problems, every, **measuring)
    by_block = [random[list(chosen.distances).index(chosen.block_distance)], recall]
    return Outcome(
        findings=analysis.findings([*random, recall], num_resamplings=chosen.num_resamplings, seed=seed),
        figures=drawings.draw(random, recall, by_block),
        notes=(
            "A path is cut while the repeat is read. What it stored before, and what it wrote into keys "
            "and states of the first occurrence, is still there: the cut shows where the copying is done, "
            "not where it was prepared.",
            "Random words are not what the model was trained on; the recall problems are.",
        ),
        tables={"gains": [_row(gain) for gain in [*random, recall]]},
    )


def _row(gain: CopyGain) -> dict[str, Any]:
    return {
        "episodes": gain.name,
        "distance": gain.distance,
        "loss": float(gain.loss.mean()),
        "gain": float(gain.intact.mean()),
        "gain_interval": list(mean_interval(gain.intact)),
        "lost": {analysis.describe(cut): float(gain.lost(cut).mean()) for cut in gain.under},
        "interaction": {
            analysis.describe(cut): float(analysis.interaction(gain, cut).mean())
            for cut in gain.under
            if len(cut) == 2
        },
    }


STUDY = Study(
    name="induction",
    question="Which path copies from the context what followed the earlier occurrence of a token?",
    claim="Copying of what stood behind an earlier occurrence (induction, Olsson et al. 2022) is the "
    "attention's work.",
    null="Other cues before the same targets serve as well; a path's cut costs as much where there is "
    "nothing to copy.",
    causal_check="Each path, of all blocks and of each block, is cut while the repeat is read, and paths in pairs.",
    run=run,
    config=Path(__file__).with_name("config.toml"),
)
