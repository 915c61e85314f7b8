"""Rows depend on their index only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hydra_lab.data import DOMAINS, MixtureDataset
from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import CurriculumConfig, Stage, TrainConfig
from hydra_lab.training.rows import StagedRows, collate

STAGES = (
    Stage(path="ssm", begin=0.0, weights={"code": 1.0}),
    Stage(path="memory", begin=0.5, weights={"code": 1.0, "facts": 3.0}),
)


def rows_of(corpus: Path) -> StagedRows:
    config = TrainConfig(
        model="nano",
        sequence_length=16,
        rows_per_step=4,
        max_steps=10,
        curriculum=CurriculumConfig(stages=STAGES),
    )
    plan = TrainingPlan.of(config, preset="nano", seed=3, max_steps=10)
    mixture = MixtureDataset(corpus, 16, STAGES[0].weights, 3, length=40)
    return StagedRows(mixture, plan, STAGES)


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first["domain"] == second["domain"] and all(
        torch.equal(first[key], second[key]) for key in ("input_ids", "labels")
    )


def test_a_row_is_the_same_in_any_order(corpus: Path) -> None:
    forward = [rows_of(corpus)[index] for index in range(40)]
    rows = rows_of(corpus)
    backward = [rows[index] for index in reversed(range(40))][::-1]
    assert len(rows) == 40
    assert all(map(same, forward, backward))


def test_the_mixture_changes_at_the_stage(corpus: Path) -> None:
    rows = rows_of(corpus)
    domains = [DOMAINS[rows[index]["domain"]] for index in range(40)]
    assert set(domains[:20]) == {"code"}
    assert 12 <= domains[20:].count("facts") <= 18


def test_collate_stacks(corpus: Path) -> None:
    rows = rows_of(corpus)
    batch = collate([rows[0], rows[20]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["domain"].tolist() == [rows[0]["domain"], rows[20]["domain"]]
