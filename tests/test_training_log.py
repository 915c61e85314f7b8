"""The log of a run, read while it runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from hydra_lab.loading import model_directory
from hydra_lab.training_log import LOG_FILE, read_training_log

FIRST = {
    "step": 10,
    "tokens": 640,
    "loss": 3.0,
    "language_loss": 2.9,
    "learning_rate": 1e-3,
    "tokens_per_second": 9.0,
}


def write(directory: Path, *lines: str) -> Path:
    (directory / LOG_FILE).write_text("\n".join(lines))
    return directory


def test_series_are_sorted_by_what_they_are_of(tmp_path: Path) -> None:
    more = {
        "loss_code": 2.5, "gate_0_moe": 0.7, "scale_moe": 1.0, "load_0_0": 0.25, "load_0_1": 0.75, "memory_use_3": 0.1,
        "memory_gate_3": 0.4, "state_norm_0": 2.0,
    }  # fmt: skip
    log = read_training_log(write(tmp_path, json.dumps(FIRST), json.dumps({**FIRST, "step": 20, **more})))
    assert log.step.tolist() == [10, 20]
    assert list(log.domain_loss) == ["code"] and log.domain_loss["code"][1] == 2.5
    assert np.isnan(log.domain_loss["code"][0])
    assert list(log.gates) == [(0, "moe")] and log.path_scales["moe"][1] == 1.0
    assert log.expert_load[0][1].tolist() == [0.25, 0.75]
    assert log.memory_use[3][1] == 0.1 and log.memory_gate[3][1] == 0.4 and log.state_norm[0][1] == 2.0


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    log = read_training_log(write(tmp_path, json.dumps(FIRST), '{"step": 20, "lo'))
    assert log.step.tolist() == [10]


def test_what_is_no_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hydra-lab train"):
        read_training_log(tmp_path)
    with pytest.raises(ValueError, match="no step yet"):
        read_training_log(write(tmp_path, ""))
    with pytest.raises(ValueError, match="damaged at line 1"):
        read_training_log(write(tmp_path, "{", json.dumps(FIRST)))


def test_the_log_of_the_shipped_model_is_read() -> None:
    log = read_training_log(model_directory("demo"))
    assert log.language_loss[-1] < log.language_loss[0]
    assert {path for _, path in log.gates} == {"ssm", "attention", "moe", "workspace", "memory"}
