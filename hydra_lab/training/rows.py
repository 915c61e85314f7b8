"""Training rows in a fixed order: row i is the same whoever asks for it, and when."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import Stage


class Mixture(Protocol):
    """A data set whose row is a pure function of its seed, its weights and the index (`MixtureDataset`)."""

    def set_weights(self, weights: Mapping[str, float]) -> None: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class StagedRows(Dataset[Mapping[str, Any]]):
    """The rows of a run: row `i` belongs to step `i // rows_per_step` and has the mixture of that step's
    stage.

    The stage follows from the index alone, not from when the row is read, so that rows prefetched across a
    stage's start, rows read by worker processes and rows read after a resume are the same.
    """

    def __init__(self, mixture: Mixture, plan: TrainingPlan, stages: tuple[Stage, ...]) -> None:
        self.mixture = mixture
        self.plan = plan
        self.stages = stages
        self.current: Stage | None = None

    def __len__(self) -> int:
        return self.plan.max_steps * self.plan.rows_per_step

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        stage = self.plan.stage_at(index // self.plan.rows_per_step, self.stages)
        if stage is not self.current:
            self.mixture.set_weights(stage.weights)
            self.current = stage
        return self.mixture[index]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack rows into `input_ids` and `labels` [B, L] and `domain` [B]."""
    return {
        key: torch.stack([torch.as_tensor(row[key]) for row in rows])
        for key in ("input_ids", "labels", "domain")
    }
