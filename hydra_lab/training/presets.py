"""What a training run is made of: sizes, stages, learning rates. One frozen dataclass per part."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from hydra_lab.taps import PATHS

COMPONENTS: tuple[str, ...] = ("backbone", "workspace", "memory")
"""Parts of the model that may have a learning rate of their own; `backbone` is all that is neither of the
others."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the curriculum: a path joins, and the mixture of domains changes."""

    path: str
    """The path that this stage switches on, one of `hydra_lab.taps.PATHS`."""
    begin: float
    """When it begins, as a fraction of the run's steps. A stage that begins at 0 starts at full strength."""
    weights: Mapping[str, float]
    """Share of each domain in the training rows from here on (any positive scale; absent domains get
    none)."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Learning-rate factor of a component (see `COMPONENTS`) from here on; 1 where absent."""

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ValueError(f"stage path {self.path!r} is not one of {', '.join(PATHS)}")
        if not 0 <= self.begin < 1:
            raise ValueError(
                f"stage {self.path!r} begins at {self.begin}; a fraction of the run in [0, 1) is needed"
            )
        if not self.weights or min(self.weights.values()) < 0 or sum(self.weights.values()) <= 0:
            raise ValueError(
                f"stage {self.path!r} needs domain weights >= 0 with a positive sum: {self.weights}"
            )
        unknown = set(self.learning_rates) - set(COMPONENTS)
        if unknown:
            raise ValueError(f"stage {self.path!r}: no component {sorted(unknown)}; there are {COMPONENTS}")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """How the paths join one after another.

    While a path's multiplier rises, the loss is watched: the rise holds while the smoothed loss stands more
    than `margin` above its value when the stage began. The loss is compared domain by domain over the domains
    seen by then, so that a change of mixture is not mistaken for a setback.
    """

    stages: tuple[Stage, ...]
    """In order of `begin`; the first begins at 0."""
    ramp: float = 0.03
    """Length of a path's rise from 0 to 1, as a fraction of the run's steps."""
    margin: float = 0.1
    """Nats per token by which the smoothed loss may stand above its value at the stage's start."""
    smoothing: float = 0.95
    """Decay per step of the exponential average of each domain's loss."""
    max_hold: float = 0.03
    """Longest total hold of one rise, as a fraction of the run's steps; after it the rise goes on and the log
    says so (a path left below 1 for good would be a path that died unseen)."""

    def __post_init__(self) -> None:
        begins = [stage.begin for stage in self.stages]
        if not begins or begins[0] != 0 or begins != sorted(begins):
            raise ValueError(f"stages must begin at 0 and be in order; they begin at {begins}")
        if len({stage.path for stage in self.stages}) != len(self.stages):
            raise ValueError(f"a path joins once; stages are {[stage.path for stage in self.stages]}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing} must lie in [0, 1)")
        if self.ramp < 0 or self.max_hold < 0 or self.margin < 0:
            raise ValueError(
                f"ramp={self.ramp}, max_hold={self.max_hold} and margin={self.margin} must be >= 0"
            )

    def finished(self) -> "CurriculumConfig":
        """The curriculum of a model that has been through this one: its last stage, with every path at full
        strength."""
        return dataclasses.replace(self, stages=(dataclasses.replace(self.stages[-1], begin=0.0),))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon for the matrices and AdamW for the rest (see `hydra_lab.training.muon`), with a warm-up, a stable phase and
    a decay (WSD; the decay is `1 - sqrt`, arXiv 2405.18392).

    On the demo, after 390 steps of the same rows and all factors at 1, AdamW alone stood at 3.0 nats on chains and 5.3
    on prose, this at 2.0 and 5.2. It is not better everywhere: two ssm blocks alone, recalling 2 to 4 single letters
    (chance 36%), were right in 92% after 250 steps of AdamW and still at chance after 450 of this; with AdamW on the
    ssm's input projection and Muon on the rest they had reached 56% after 250.
    """

    learning_rate: float = 3e-3
    """Peak learning rate, which the factors below multiply."""
    matrices: float = 2.0
    """Learning-rate factor of the matrices, which Muon trains."""
    embedding: float = 2.5
    """Learning-rate factor of the token embedding."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decay of matrices and tables; gates, norms, biases, A_log, D, dt_bias and the memory's values have none."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 means no clipping."""
    gates: float = 0.1
    """Learning-rate factor of the blocks' gates g_p (at the common rate they were seen to collapse to 0)."""
    memory_values: float = 3.0
    """Learning-rate factor of the memory's value table, of which each token trains a few rows only."""
    workspace: float = 1.0
    """Learning-rate factor of the workspace paths."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly from 0."""
    decay: float = 0.2
    """Length of the final decay, as a fraction of the run's steps."""
    floor: float = 0.0
    """Learning rate at the end, relative to the peak."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.decay <= 1 or not 0 <= self.floor <= 1:
            raise ValueError(f"{self}: warmup_steps must be >= 0, decay and floor between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    model: str
    """Preset of the model's size (`HydraConfig.from_preset`)."""
    sequence_length: int
    """Tokens per row."""
    rows_per_step: int
    """Rows of one optimizer step."""
    max_steps: int
    """Optimizer steps."""
    curriculum: CurriculumConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulation: int = 1
    """Parts that the rows of a step are computed in (saves memory, changes nothing else)."""
    bf16: bool = True
    """Forward and backward under bfloat16 autocast (weights and optimizer stay in float32)."""
    save_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of the training log."""

    def __post_init__(self) -> None:
        if self.rows_per_step % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation} must divide rows_per_step={self.rows_per_step}"
            )

    def replace(self, **changes: object) -> "TrainConfig":
        """This configuration with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


NATURAL = {"code": 0.30, "technical": 0.16, "prose": 0.26}
"""Shares of the natural domains before facts join."""
TASKS = {"arithmetic": 0.03, "chains": 0.12, "recall": 0.13}
"""Shares of the synthetic tasks before facts join."""
WITHOUT_FACTS = {**NATURAL, **TASKS}
WITH_FACTS = {
    "code": 0.20,
    "technical": 0.13,
    "prose": 0.20,
    "arithmetic": 0.02,
    "chains": 0.12,
    "recall": 0.12,
    "facts": 0.16,
    "structured": 0.05,
}
"""Facts, and the tables that state them, enter with the memory only: learned earlier they would sit in the
SSM."""
MORE_LOOKUPS = {
    "code": 0.13,
    "technical": 0.11,
    "prose": 0.18,
    "arithmetic": 0.02,
    "chains": 0.24,
    "recall": 0.18,
    "facts": 0.11,
    "structured": 0.03,
}
"""Shares for a model that has learned to read: two of five rows look names up."""


def staged(attention: float, moe: float, workspace: float, memory: float) -> tuple[Stage, ...]:
    """The five stages, given when each begins.

    The paths that join last learn faster from then on: at the common rate the blocks before them had taken up what
    they are for, and the memory made 4% of its block's update.
    """
    return (
        Stage(path="ssm", begin=0.0, weights=WITHOUT_FACTS),
        Stage(path="attention", begin=attention, weights=WITHOUT_FACTS),
        Stage(path="moe", begin=moe, weights=WITHOUT_FACTS),
        Stage(path="workspace", begin=workspace, weights=WITHOUT_FACTS),
        Stage(
            path="memory",
            begin=memory,
            weights=WITH_FACTS,
            learning_rates={"workspace": 2.0, "memory": 2.0},
        ),
    )


PRESETS: dict[str, TrainConfig] = {
    "nano": TrainConfig(
        model="nano",
        sequence_length=64,
        rows_per_step=4,
        max_steps=12,
        curriculum=CurriculumConfig(stages=staged(0.2, 0.3, 0.4, 0.5), ramp=0.1, margin=0.1, max_hold=0.1),
        optimizer=OptimizerConfig(warmup_steps=2),
        bf16=False,
        save_every=6,
        log_every=1,
    ),
    "demo": TrainConfig(
        model="demo",
        sequence_length=512,
        rows_per_step=8,
        max_steps=5000,
        curriculum=CurriculumConfig(stages=staged(0.05, 0.09, 0.13, 0.17)),
        optimizer=OptimizerConfig(decay=0.3),
    ),
    "demo-lookups": TrainConfig(
        model="demo",
        sequence_length=512,
        rows_per_step=8,
        max_steps=2500,
        curriculum=CurriculumConfig(stages=(Stage(path="memory", begin=0.0, weights=MORE_LOOKUPS),)),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, decay=0.5),
    ),
    "29m": TrainConfig(
        model="29m",
        sequence_length=2048,
        rows_per_step=64,
        max_steps=10_000,
        curriculum=CurriculumConfig(stages=staged(0.08, 0.14, 0.20, 0.26)),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=300),
        accumulation=4,
        save_every=500,
    ),
    "1.6b": TrainConfig(
        model="1.6b",
        sequence_length=4096,
        rows_per_step=128,
        max_steps=50_000,
        curriculum=CurriculumConfig(stages=staged(0.08, 0.14, 0.20, 0.26)),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=1000),
        accumulation=32,
        save_every=1000,
    ),
}
"""Training presets by name; `nano` is for tests. `29m` and `1.6b` want a GPU and more text than the demo's corpus;
their learning rates are customary for their sizes, not tuned."""


def training_preset(name: str) -> TrainConfig:
    """The training preset called `name`.

    Raises:
        ValueError: if there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"training preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]
