"""How far back does a token still change the output, and is it as far as the decays predict? See README.md.

hydra-lab probe state-horizon demo --out DIR
"""

from pathlib import Path
from typing import Any

from hydra_lab.probing import Outcome, Probe, Study
from probes.state_horizon import analysis, drawings
from probes.state_horizon.measure import choose_texts, measure
from probes.state_horizon.settings import Settings


def run(probe: Probe, settings: dict[str, Any]) -> Outcome:
    """Measure `probe.model`; `settings` as in settings.py.

    Raises:
        ValueError: a setting is wrong, or too few samples are long enough.
    """
    chosen = Settings(**settings)
    texts = choose_texts(
        probe.samples,
        num_samples=chosen.num_samples,
        size=chosen.context + chosen.horizon + 1,
        seed=probe.seed,
    )
    measurement = measure(
        probe.model,
        texts,
        context=chosen.context,
        batch_size=chosen.batch_size,
        seed=probe.seed,
        progress=probe.progress,
    )
    found = analysis.horizon(measurement)
    return Outcome(
        findings=analysis.findings(
            measurement,
            measurement.decay_half_life,
            num_resamplings=chosen.num_resamplings,
            seed=probe.seed,
        ),
        figures=drawings.draw(measurement, found),
        notes=(
            f"The change was followed for {chosen.horizon} tokens after {chosen.context} tokens of context; "
            "a half-life well above that is an extrapolation, and one of a state that did not fall at all "
            "counts as endless.",
            "A state counts as changed as long as the two runs differ in it, whatever keeps the difference "
            "alive: its own decay, or what other heads and paths write again.",
        ),
        tables={
            "heads": [
                {
                    "block": layer,
                    "head": head,
                    "half_life_from_decay": float(measurement.decay_half_life[h]),
                    "half_life_of_state_change": float(found.state_half_life[h]),
                    "half_life_of_output_change": float(found.output_half_life[h]),
                }
                for h, (layer, head) in enumerate(measurement.heads)
            ],
            "output_change": found.output_change.tolist(),
        },
    )


STUDY = Study(
    name="state-horizon",
    question="How far back does a token still change the output, and is that as far as the decays of the "
    "state predict?",
    claim="A state-space head remembers for the half-life that its decay predicts, and the ssm carries "
    "what lies beyond the attention's window.",
    null="Which head has which half-life is chance; a path's memory of the token makes no difference.",
    causal_check="One token is replaced; then one path's or one head's memory alone is exchanged between "
    "the two runs.",
    run=run,
    config=Path(__file__).with_name("config.toml"),
    needs=("ssm",),
)
