"""A run's plan in absolute steps. It is made when a run starts and travels in every checkpoint.

Fractions of a run become step numbers here, once: a run that is resumed with another number of steps keeps
its stages where they were, and only the learning rate's decay moves.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from hydra_lab.training.presets import CurriculumConfig, OptimizerConfig, Stage, TrainConfig

PLAN_FILE = "training_plan.json"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Where everything of a run happens, in optimizer steps counted from 0."""

    preset: str
    """Name of the training preset."""
    seed: int
    """Seed of the data order and of the initial weights."""
    rows_per_step: int
    """Rows of one step: step `s` reads the dataset's rows `s * rows_per_step` and on."""
    max_steps: int
    """Steps of the whole run."""
    begins: dict[str, int]
    """First step of each path's stage."""
    ramp_steps: int
    """Steps of a path's rise from 0 to 1."""
    max_hold_steps: int
    """Steps for which one rise may hold."""
    warmup_steps: int
    """Steps of the learning rate's warm-up."""
    decay_begin: int
    """First step of the learning rate's decay, which ends at `max_steps`."""
    floor: float
    """Learning rate at the end, relative to the peak."""

    @classmethod
    def of(cls, config: TrainConfig, *, preset: str, seed: int, max_steps: int) -> "TrainingPlan":
        """The plan of a fresh run of `max_steps` steps.

        Raises:
            ValueError: if `max_steps` is not positive.
        """
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps} must be at least 1")
        curriculum: CurriculumConfig = config.curriculum
        optimizer: OptimizerConfig = config.optimizer
        return cls(
            preset=preset,
            seed=seed,
            rows_per_step=config.rows_per_step,
            max_steps=max_steps,
            begins={stage.path: round(stage.begin * max_steps) for stage in curriculum.stages},
            ramp_steps=max(1, round(curriculum.ramp * max_steps)),
            max_hold_steps=round(curriculum.max_hold * max_steps),
            warmup_steps=min(optimizer.warmup_steps, max_steps),
            decay_begin=max_steps - round(optimizer.decay * max_steps),
            floor=optimizer.floor,
        )

    def until(self, max_steps: int, *, now: int, decay: float) -> "TrainingPlan":
        """This plan with another end, seen from step `now`.

        The decay takes the last `decay` of the new length but never begins before `now`, so that the learning
        rate makes no jump: ending a run early is resuming it with fewer steps. With the same end nothing
        changes.

        Raises:
            ValueError: if the new end lies before `now`.
        """
        if max_steps == self.max_steps:
            return self
        if max_steps < now:
            raise ValueError(f"max_steps={max_steps} lies before step {now}, at which the run stands")
        decay_begin = max(now, max_steps - round(decay * max_steps))
        return dataclasses.replace(self, max_steps=max_steps, decay_begin=decay_begin)

    def learning_rate_factor(self, step: int) -> float:
        """Learning rate of step `step` relative to the peak: warm-up, stable, then `1 - sqrt` decay to
        `floor`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step < self.decay_begin:
            return 1.0
        length = self.max_steps - self.decay_begin
        done = min(1.0, (step - self.decay_begin) / length) if length else 1.0
        return self.floor + (1 - self.floor) * (1 - math.sqrt(done))

    def stage_at(self, step: int, stages: tuple[Stage, ...]) -> Stage:
        """The last of `stages` that has begun at `step`."""
        return [stage for stage in stages if self.begins[stage.path] <= step][-1]

    def write(self, directory: Path) -> None:
        """Write the plan as JSON into a checkpoint directory."""
        (directory / PLAN_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> "TrainingPlan":
        """The plan of a checkpoint directory."""
        return cls(**json.loads((directory / PLAN_FILE).read_text()))
