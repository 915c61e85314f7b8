"""State of a run on disk, without pickle: tensors as safetensors, all else as JSON.

A checkpoint directory `checkpoint-<step>` holds `model.safetensors`, `config.json` and the tokenizer (a model
that `from_pretrained` loads), `optimizer.safetensors`, `rng.safetensors` and `rng.json`,
`training_plan.json`, `curriculum.json` and `trainer_state.json`. It appears under that name only when it is
complete.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
RNG_JSON = "rng.json"


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints below `out`, oldest first."""
    return sorted((path for path in out.glob("checkpoint-*") if CHECKPOINT.search(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was made."""
    match = CHECKPOINT.search(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not called checkpoint-<step>")
    return int(match.group(1))


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A scratch directory that becomes `directory` when the block ends without an error.

    A process killed in between leaves only a scratch directory (`incomplete-...`), which the next call
    removes.
    """
    scratch = directory.with_name(f"incomplete-{directory.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    for file in scratch.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(scratch, directory)


def keep_last(out: Path, count: int) -> None:
    """Delete all but the last `count` checkpoints below `out`, and what a killed save left behind."""
    for old in checkpoints(out)[:-count]:
        # Renamed first: a deletion that is cut short must not leave half a checkpoint under a good name.
        doomed = old.with_name(f"incomplete-{old.name}")
        os.replace(old, doomed)
    for doomed in out.glob("incomplete-*"):
        shutil.rmtree(doomed)


def save_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Write AdamW's state as `<parameter>/<field>` tensors."""
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = value.detach().contiguous()
    save_file(tensors, directory / OPTIMIZER_FILE)


def load_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Restore what `save_optimizer` wrote. Parameters that had no gradient yet have no state.

    Raises:
        ValueError: if the file holds state of a parameter that the optimizer does not have.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(directory / OPTIMIZER_FILE).items():
        name, _, field = key.rpartition("/")
        by_parameter.setdefault(name, {})[field] = value
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    unknown = set(by_parameter) - set(names)
    if unknown:
        raise ValueError(
            f"{directory / OPTIMIZER_FILE} has state of unknown parameters: {sorted(unknown)[:3]}"
        )
    content = optimizer.state_dict()
    content["state"] = {index: by_parameter[name] for index, name in enumerate(names) if name in by_parameter}
    optimizer.load_state_dict(content)


def save_rng(directory: Path) -> None:
    """Write the state of Python's, numpy's and torch's random number generators."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    content = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }
    (directory / RNG_JSON).write_text(json.dumps(content) + "\n")
    tensors = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda{index}"] = torch.cuda.get_rng_state(index)
    save_file(tensors, directory / RNG_FILE)


def load_rng(directory: Path) -> None:
    """Restore what `save_rng` wrote (the generators of GPUs only where they were saved and exist)."""
    content = json.loads((directory / RNG_JSON).read_text())
    version, internal, gauss = content["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = content["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    tensors = load_file(directory / RNG_FILE)
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{index}"], index)
