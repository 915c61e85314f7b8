"""The curriculum's rule, without a model."""

from pathlib import Path

import pytest

from hydra_lab.taps import PATHS
from hydra_lab.training.curriculum import Curriculum
from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import CurriculumConfig, TrainConfig, staged

STEPS = 100


def curriculum_of(*, margin: float = 0.1, max_hold: float = 0.05, smoothing: float = 0.5) -> Curriculum:
    config = TrainConfig(
        model="nano",
        sequence_length=8,
        rows_per_step=1,
        max_steps=STEPS,
        curriculum=CurriculumConfig(
            stages=staged(0.2, 0.4, 0.6, 0.8), ramp=0.1, margin=margin, max_hold=max_hold, smoothing=smoothing
        ),
    )
    plan = TrainingPlan.of(config, preset="nano", seed=0, max_steps=STEPS)
    return Curriculum(config.curriculum, plan)


def run(curriculum: Curriculum, steps: range, loss: float = 2.0) -> list[dict[str, float]]:
    """Scales at each step while the loss stays the same."""
    scales = []
    for step in steps:
        curriculum.advance(step)
        scales.append(curriculum.scales())
        curriculum.observe({"code": loss})
    return scales


def test_paths_join_in_order_and_rise_linearly() -> None:
    scales = run(curriculum_of(), range(STEPS))
    assert all(row["ssm"] == 1.0 for row in scales)
    for path, begin in (("attention", 20), ("moe", 40), ("workspace", 60), ("memory", 80)):
        assert all(row[path] == 0.0 for row in scales[:begin])
        rise = [row[path] for row in scales[begin : begin + 10]]
        assert rise == pytest.approx([i / 10 for i in range(1, 11)])
        assert all(row[path] == 1.0 for row in scales[begin + 10 :])


def test_rise_holds_while_the_loss_stands_above_the_stage_start() -> None:
    curriculum = curriculum_of(max_hold=1.0)
    run(curriculum, range(25))
    risen = curriculum.scales()["attention"]
    assert 0 < risen < 1
    curriculum.observe({"code": 10.0})
    assert [row["attention"] for row in run(curriculum, range(25, 28), loss=10.0)] == [risen] * 3
    # Back at its old value, the smoothed loss comes down to within the margin and the rise goes on.
    after = run(curriculum, range(28, 60), loss=2.0)
    assert after[0]["attention"] == risen
    assert after[-1]["attention"] == 1.0
    assert curriculum.state.held["attention"] > 3


def test_no_path_stays_weak_for_good(caplog: pytest.LogCaptureFixture) -> None:
    curriculum = curriculum_of(max_hold=0.05)
    run(curriculum, range(20))
    scales = run(curriculum, range(20, 60), loss=10.0)
    assert scales[0]["attention"] > 0  # the rise began before the loss went up
    held = [row["attention"] for row in scales].count(scales[5]["attention"])
    assert held >= 5
    assert scales[-1]["attention"] == 1.0
    warnings = [record for record in caplog.records if "goes on rising" in record.message]
    assert len([record for record in warnings if "attention" in record.message]) == 1


def test_a_new_and_hard_domain_is_no_setback() -> None:
    curriculum = curriculum_of(max_hold=1.0)
    run(curriculum, range(80))
    for step in range(80, 95):
        curriculum.advance(step)
        curriculum.observe({"code": 2.0, "facts": 9.0})
    assert curriculum.scales()["memory"] == 1.0
    assert curriculum.state.held["memory"] == 0


def test_paths_without_a_stage_are_on() -> None:
    config = curriculum_of().config.finished()
    whole = TrainConfig(model="nano", sequence_length=8, rows_per_step=1, max_steps=STEPS, curriculum=config)
    plan = TrainingPlan.of(whole, preset="nano", seed=0, max_steps=STEPS)
    curriculum = Curriculum(config, plan)
    curriculum.advance(0)
    assert curriculum.scales() == dict.fromkeys(PATHS, 1.0)


def test_state_survives_the_disk(tmp_path: Path) -> None:
    curriculum = curriculum_of()
    run(curriculum, range(45))
    curriculum.write(tmp_path)
    restored = curriculum_of()
    restored.read(tmp_path)
    assert restored.state == curriculum.state
    assert run(restored, range(45, STEPS)) == run(curriculum, range(45, STEPS))
