"""Read what a training run reports, also while it is still running."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LOG_FILE = "training_log.jsonl"
"""The file in a run's directory, one JSON object per logging step."""

_DOMAIN = "loss_"
_GATE = re.compile(r"gate_(\d+)_(\w+)")
_LOAD = re.compile(r"load_(\d+)_(\d+)")
_SCALE = "scale_"


@dataclass(frozen=True, eq=False)
class TrainingLog:
    """The log of a run. Axes: T logging steps, D domains, Y blocks with experts, E experts.

    Attributes:
        directory: of the run.
        step: [T] training step of each line.
        tokens: [T] tokens trained on so far.
        loss: [T] mean training loss since the line before, nats per supervised token, auxiliary losses included.
        language_loss: [T] the same without auxiliary losses.
        domain_loss: by domain, [T] its language loss; NaN where no row of it was drawn.
        learning_rate: [T].
        tokens_per_second: [T].
        gates: by (block, path), [T] the gate g.
        path_scales: by path, [T] the curriculum's multiplier: 0 while the path is switched off.
        expert_load: by block, [T, E] share of the chunks' choices, 0..1; empty where the run did not report it.
        memory_use: by block, [T] share of the addresses that the line's batches touched, 0..1; empty likewise.
        memory_gate: by block, [T] mean beta; empty likewise.
        state_norm: by block, [T] mean Frobenius norm of a head's state at chunk ends; empty likewise.
    """

    directory: Path
    step: NDArray[np.int64]
    tokens: NDArray[np.float64]
    loss: NDArray[np.float64]
    language_loss: NDArray[np.float64]
    domain_loss: dict[str, NDArray[np.float64]]
    learning_rate: NDArray[np.float64]
    tokens_per_second: NDArray[np.float64]
    gates: dict[tuple[int, str], NDArray[np.float64]]
    path_scales: dict[str, NDArray[np.float64]]
    expert_load: dict[int, NDArray[np.float64]]
    memory_use: dict[int, NDArray[np.float64]]
    memory_gate: dict[int, NDArray[np.float64]]
    state_norm: dict[int, NDArray[np.float64]]


def read_training_log(directory: str | Path) -> TrainingLog:
    """The log of the run in `directory`, or of the run that made the model there.

    A last line that is still being written is left out.

    Raises:
        ValueError: there is no log, it has no whole line yet, or a line in the middle is damaged.
    """
    path = Path(directory) / LOG_FILE
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no {LOG_FILE}: give the --out directory of `hydra-lab train`, or a model it made"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path} is damaged at line {number}") from None
    if not rows:
        raise ValueError(f"{path} holds no step yet: the first line comes with the first logging step")
    names = list(dict.fromkeys(name for row in rows for name in row))

    def column(name: str) -> NDArray[np.float64]:
        return np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)

    def by_block(prefix: str) -> dict[int, NDArray[np.float64]]:
        found = [re.fullmatch(rf"{prefix}_(\d+)", name) for name in names]
        return {int(each[1]): column(each[0]) for each in found if each}

    gates = [found for name in names if (found := _GATE.fullmatch(name))]
    loads = [found for name in names if (found := _LOAD.fullmatch(name))]
    blocks = sorted({int(found[1]) for found in loads})
    return TrainingLog(
        directory=Path(directory),
        step=column("step").astype(np.int64),
        tokens=column("tokens"),
        loss=column("loss"),
        language_loss=column("language_loss"),
        domain_loss={name.removeprefix(_DOMAIN): column(name) for name in names if name.startswith(_DOMAIN)},
        learning_rate=column("learning_rate"),
        tokens_per_second=column("tokens_per_second"),
        gates={(int(found[1]), found[2]): column(found[0]) for found in gates},
        path_scales={name.removeprefix(_SCALE): column(name) for name in names if name.startswith(_SCALE)},
        expert_load={
            block: np.stack([column(found[0]) for found in loads if int(found[1]) == block], axis=-1)
            for block in blocks
        },
        memory_use=by_block("memory_use"),
        memory_gate=by_block("memory_gate"),
        state_norm=by_block("state_norm"),
    )
