"""Checkpoints appear whole or not at all, and the random generators come back."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_lab.training.checkpoint import checkpoints, keep_last, load_rng, replacing, save_rng, step_of


def test_a_failed_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), replacing(tmp_path / "checkpoint-5") as directory:
        (directory / "model.safetensors").write_text("half")
        raise OSError("disk full")
    assert checkpoints(tmp_path) == []
    with replacing(tmp_path / "checkpoint-5") as directory:
        assert list(directory.iterdir()) == []
        (directory / "model.safetensors").write_text("whole")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5"]
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for name in (
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-100",
        "incomplete-checkpoint-7",
        "checkpoint-x",
    ):
        (tmp_path / name).mkdir()
    keep_last(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-10", "checkpoint-100", "checkpoint-x"]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [10, 100]


def test_random_generators_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))

    draw()
    save_rng(tmp_path)
    expected = [draw() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    load_rng(tmp_path)
    assert [draw() for _ in range(3)] == expected
