"""From a training checkpoint to a model that ships."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.training.optimizer import GATE
from hydra_lab.training_log import LOG_FILE

RUN_FILE = "training.json"
EARLIER = "earlier"
"""Folder of a run's directory that holds what is known of the runs that made the model it started from."""


@torch.no_grad()
def fold_scales(model: HydraForCausalLM, scales: dict[str, float]) -> None:
    """Multiply the gates by the curriculum's multipliers, which a saved model does not have; outputs stay the
    same."""
    for name, parameter in model.named_parameters():
        gate = GATE.search(name)
        if gate:
            parameter.mul_(scales[gate.group(1)])
    for path in scales:
        model.set_path_scale(path, 1.0)


def export_model(
    model: HydraForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    run: dict[str, Any],
    run_dir: Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "15MB",
) -> None:
    """Write weights, configuration, tokenizer, `training.json` and the training logs to `out`.

    The model is converted to `dtype` in place.

    Args:
        run: what `training.json` says of the run (preset, seed, command, plan).
        run_dir: the run's directory, with its `training_log.jsonl`; logs of earlier runs are written beside it as
            `training_log.<preset>.jsonl`.
        max_shard_size: size limit of a safetensors file.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors*"):
        old.unlink()
    nn.Module.to(model, dtype=dtype)  # transformers' wrapper of it has no types
    model.save_pretrained(out, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(out)
    (out / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n")
    shutil.copyfile(run_dir / LOG_FILE, out / LOG_FILE)
    for log in (run_dir / EARLIER).glob("training_log.*.jsonl"):
        shutil.copyfile(log, out / log.name)


def remember_run(model_dir: Path, run_dir: Path) -> None:
    """Keep the record and the logs of the model in `model_dir`, from which the run in `run_dir` starts."""
    kept = run_dir / EARLIER
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    record = model_dir / RUN_FILE
    if record.is_file():
        shutil.copyfile(record, kept / RUN_FILE)
        preset = json.loads(record.read_text())["preset"]
        shutil.copyfile(model_dir / LOG_FILE, kept / f"training_log.{preset}.jsonl")
    for log in model_dir.glob("training_log.*.jsonl"):
        shutil.copyfile(log, kept / log.name)


def earlier_runs(run_dir: Path) -> list[dict[str, Any]]:
    """Preset, seed, command, steps, tokens and versions of each earlier run, oldest first."""
    record = run_dir / EARLIER / RUN_FILE
    if not record.is_file():
        return []
    run = json.loads(record.read_text())
    said = ("preset", "seed", "command", "steps", "tokens", "device", "versions")
    return [*run.get("earlier", []), {name: run[name] for name in said}]
