"""The plan of a run: fractions become steps once, and another end moves only the decay."""

import json
from pathlib import Path

import pytest

from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import PRESETS, CurriculumConfig, Stage, staged, training_preset


def plan_of(max_steps: int = 1000) -> TrainingPlan:
    return TrainingPlan.of(training_preset("demo"), preset="demo", seed=0, max_steps=max_steps)


def test_stage_boundaries_are_fractions_of_the_run() -> None:
    stages = training_preset("demo").curriculum.stages
    for steps in (500, 3000):
        plan = plan_of(steps)
        assert plan.begins == {stage.path: round(stage.begin * steps) for stage in stages}


def test_learning_rate_warms_up_stays_and_decays() -> None:
    plan = plan_of(1000)
    factors = [plan.learning_rate_factor(step) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / plan.warmup_steps)
    assert factors[plan.warmup_steps : plan.decay_begin] == [1.0] * (plan.decay_begin - plan.warmup_steps)
    decay = factors[plan.decay_begin :]
    assert decay == sorted(decay, reverse=True)
    assert decay[0] == 1.0
    assert 0 < decay[-1] < 0.01
    assert plan.learning_rate_factor(1000) == plan.floor


def test_an_earlier_end_starts_the_decay_now_and_leaves_the_stages() -> None:
    plan = plan_of(1000)
    shorter = plan.until(650, now=600, decay=0.2)
    assert shorter.begins == plan.begins
    assert shorter.ramp_steps == plan.ramp_steps
    assert shorter.decay_begin == 600
    assert shorter.learning_rate_factor(600) == plan.learning_rate_factor(600) == 1.0
    assert shorter.learning_rate_factor(650) == 0.0


def test_a_later_end_delays_the_decay() -> None:
    assert plan_of(1000).until(2000, now=600, decay=0.2).decay_begin == 1600


def test_the_same_end_changes_nothing_even_inside_the_decay() -> None:
    plan = plan_of(1000).until(650, now=600, decay=0.2)
    assert plan.until(650, now=630, decay=0.2) is plan


def test_an_end_in_the_past_is_refused() -> None:
    with pytest.raises(ValueError, match="max_steps=500 lies before step 600"):
        plan_of(1000).until(500, now=600, decay=0.2)


def test_plan_survives_the_disk(tmp_path: Path) -> None:
    plan = plan_of(77)
    plan.write(tmp_path)
    assert TrainingPlan.read(tmp_path) == plan
    json.loads((tmp_path / "training_plan.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_facts_for_the_memory(name: str) -> None:
    """A run from random weights lets every path join, the memory last; one that continues a model trains its last."""
    stages = training_preset(name).curriculum.stages
    joining = ["ssm", "attention", "moe", "workspace", "memory"]
    assert [stage.path for stage in stages] == (joining[-1:] if name == "demo-lookups" else joining)
    for stage in stages[:-1]:
        assert not {"facts", "structured"} & set(stage.weights)
    assert {"facts", "structured"} <= set(stages[-1].weights)


def test_unusable_stages_are_refused() -> None:
    first, second = staged(0.1, 0.2, 0.3, 0.4)[:2]
    with pytest.raises(ValueError, match="stage path 'mlp'"):
        Stage(path="mlp", begin=0.0, weights={"code": 1.0})
    with pytest.raises(ValueError, match=r"begins at 1\.5"):
        Stage(path="ssm", begin=1.5, weights={"code": 1.0})
    with pytest.raises(ValueError, match="positive sum"):
        Stage(path="ssm", begin=0.0, weights={"code": 0.0})
    with pytest.raises(ValueError, match="must begin at 0"):
        CurriculumConfig(stages=(second, first))
    with pytest.raises(ValueError, match="joins once"):
        CurriculumConfig(stages=(first, first))
    with pytest.raises(ValueError, match="training preset 'huge' is not one of nano, demo"):
        training_preset("huge")
