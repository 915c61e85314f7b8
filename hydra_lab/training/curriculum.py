"""The staged curriculum: paths join one after another, and each one's multiplier rises while the loss is
watched."""

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_lab.taps import PATHS
from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import CurriculumConfig

logger = logging.getLogger(__name__)
STATE_FILE = "curriculum.json"


class Staged(Protocol):
    """A model whose paths have a multiplier (`HydraForCausalLM`)."""

    def set_path_scale(self, path: str, scale: float) -> None: ...


@dataclass
class CurriculumState:
    """What a resumed curriculum must know."""

    progress: dict[str, int] = field(default_factory=dict)
    """Steps that each begun path has risen."""
    held: dict[str, int] = field(default_factory=dict)
    """Steps for which each begun path's rise has held."""
    baseline: dict[str, dict[str, float]] = field(default_factory=dict)
    """Smoothed loss by domain when each path's stage began, in nats per token."""
    smoothed: dict[str, float] = field(default_factory=dict)
    """Smoothed loss by domain now, in nats per token."""


class Curriculum:
    """The rule that says how strong each path is at each step; knows no model."""

    def __init__(
        self, config: CurriculumConfig, plan: TrainingPlan, state: CurriculumState | None = None
    ) -> None:
        self.config = config
        self.plan = plan
        self.state = state if state is not None else CurriculumState()

    def advance(self, step: int) -> None:
        """Enter step `step`: begin the stages that are due, and let the begun paths rise or hold."""
        state = self.state
        for stage in self.config.stages:
            path = stage.path
            if step < self.plan.begins[path]:
                continue
            if path not in state.progress:
                state.baseline[path] = dict(state.smoothed)
                state.held[path] = 0
                state.progress[path] = self.plan.ramp_steps if self.plan.begins[path] == 0 else 0
                logger.info("step %d: path %s joins", step, path)
            if state.progress[path] >= self.plan.ramp_steps:
                continue
            if self.excess(path) <= self.config.margin:
                state.progress[path] += 1
            elif state.held[path] < self.plan.max_hold_steps:
                state.held[path] += 1
            else:
                if state.held[path] == self.plan.max_hold_steps:
                    logger.warning(
                        "step %d: %s goes on rising after a hold of %d steps, the loss %.2f nats up",
                        step,
                        path,
                        self.plan.max_hold_steps,
                        self.excess(path),
                    )
                    state.held[path] += 1
                state.progress[path] += 1

    def observe(self, losses: dict[str, float]) -> None:
        """Take in the loss of one step by domain, in nats per token."""
        decay = self.config.smoothing
        for domain, loss in losses.items():
            before = self.state.smoothed.get(domain, loss)
            self.state.smoothed[domain] = decay * before + (1 - decay) * loss

    def excess(self, path: str) -> float:
        """How far the smoothed loss stands above its value when the stage of `path` began (mean over the
        domains known then), in nats per token; 0 where none was known."""
        baseline = self.state.baseline[path]
        if not baseline:
            return 0.0
        return sum(self.state.smoothed[domain] - loss for domain, loss in baseline.items()) / len(baseline)

    def scales(self) -> dict[str, float]:
        """The multiplier of every path: 0 before its stage, 1 after its rise, and 1 where it has no stage."""
        scales = dict.fromkeys(PATHS, 1.0)
        for path in self.plan.begins:
            scales[path] = min(1.0, self.state.progress.get(path, 0) / self.plan.ramp_steps)
        return scales

    def write(self, directory: Path) -> None:
        """Write the state, and the multipliers that follow from it, as JSON into a checkpoint directory."""
        content = {**dataclasses.asdict(self.state), "scales": self.scales()}
        (directory / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n")

    def read(self, directory: Path) -> None:
        """Take over the state of a checkpoint directory."""
        content = json.loads((directory / STATE_FILE).read_text())
        del content["scales"]
        self.state = CurriculumState(**content)


class CurriculumCallback(TrainerCallback):
    """Sets the model's path multipliers before each step, and shows each step's loss to the curriculum.

    Args:
        curriculum: the rule.
        model: what has the paths.
        step_losses: called once after each step; gives its loss by domain, in nats per token.
    """

    def __init__(
        self, curriculum: Curriculum, model: Staged, step_losses: Callable[[], dict[str, float]]
    ) -> None:
        self.curriculum = curriculum
        self.model = model
        self.step_losses = step_losses
        self.applied: dict[str, float] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.curriculum.advance(state.global_step)
        for path, scale in self.curriculum.scales().items():
            if self.applied.get(path) != scale:
                self.model.set_path_scale(path, scale)
                self.applied[path] = scale

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.curriculum.observe(self.step_losses())
