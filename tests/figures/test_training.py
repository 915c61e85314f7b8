"""Figures of a run's log."""

import json
from pathlib import Path
from typing import Any

import pytest

from hydra_lab import figures
from hydra_lab.loading import model_directory
from hydra_lab.training_log import LOG_FILE, TrainingLog, read_training_log


@pytest.fixture
def log(tmp_path: Path) -> TrainingLog:
    """A log of 600 lines in which one expert has died."""
    rows = [
        {
            "step": step, "tokens": 64 * step, "loss": 3.0, "language_loss": 3.0 - step / 1000, "loss_code": 2.0,
            "gate_0_ssm": 1.0, "gate_0_moe": 0.5, "load_0_0": 1.0, "load_0_1": 0.0, "memory_use_1": 0.2,
            "memory_gate_1": 0.4, "state_norm_0": 1.5,
        }
        for step in range(1, 601)
    ]  # fmt: skip
    (tmp_path / LOG_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_training_log(tmp_path)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_of_a_run(log: TrainingLog, theme: figures.Theme) -> None:
    loss: Any = figures.training_loss(log, theme=theme)
    assert [trace.name for trace in loss.data] == ["all", "code"]
    assert len(loss.data[0].x) == 250 and loss.data[0].x[-1] == 600, (
        "the last step must stay when a log is thinned"
    )
    assert loss.data[0].y[:2] == pytest.approx([3 - 0.0015, 3 - 0.004]), "a point is the mean of its lines"
    gates: Any = figures.path_gates(log, theme=theme)
    assert {trace.name for trace in gates.data} == {"ssm, block 0", "moe, block 0"}
    load: Any = figures.expert_load_over_training(log, theme=theme)
    assert "without any load in the last: 1" in load.layout.title.text and load.data[0].z[0][-1] == 100
    use: Any = figures.memory_use_over_training(log, theme=theme)
    assert len(use.data) == 2
    norms: Any = figures.state_norms_over_training(log, theme=theme)
    assert norms.data[0].y[0] == 1.5


def test_what_an_old_run_did_not_report_is_said() -> None:
    log = read_training_log(model_directory("demo"))
    gates: Any = figures.path_gates(log)
    assert len(gates.data) == len(log.gates) == 14
    for draw in (
        figures.expert_load_over_training,
        figures.memory_use_over_training,
        figures.state_norms_over_training,
    ):
        with pytest.raises(ValueError, match="before training reported it"):
            draw(log)
