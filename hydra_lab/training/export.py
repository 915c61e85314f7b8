"""From a training checkpoint to a model that ships."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.training.log import LOG_FILE
from hydra_lab.training.optimizer import GATE

RUN_FILE = "training.json"


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
    log: Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "15MB",
) -> None:
    """Write weights, configuration, tokenizer, `training.json` and the training log to `out`.

    The model is converted to `dtype` in place.

    Args:
        run: what `training.json` says of the run (preset, seed, command, plan).
        log: the run's `training_log.jsonl`.
        max_shard_size: size limit of a safetensors file.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors*"):
        old.unlink()
    nn.Module.to(model, dtype=dtype)  # transformers' wrapper of it has no types
    model.save_pretrained(out, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(out)
    (out / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n")
    shutil.copyfile(log, out / LOG_FILE)
