"""Train a Hydra by a preset, from scratch, from a checkpoint of the same run, or from the weights of
another."""

import dataclasses
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase, set_seed

from hydra_lab.config import HydraConfig
from hydra_lab.data import DOMAINS, MixtureDataset, load_tokenizer
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.training import checkpoint
from hydra_lab.training.export import earlier_runs, export_model, fold_scales, remember_run
from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import TrainConfig, training_preset
from hydra_lab.training.rows import StagedRows
from hydra_lab.training.trainer import HydraTrainer


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    """Steps that the run has made in all."""
    finished: bool
    """Whether the run reached its end (False after a signal)."""
    model: Path | None
    """Directory of the exported model, if the run is finished."""


def train(
    preset: str,
    out: str | Path,
    *,
    corpus: str | Path,
    resume: bool = False,
    max_steps: int | None = None,
    seed: int = 0,
    init_from: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    config: TrainConfig | None = None,
    tensorboard: bool = True,
) -> TrainResult:
    """Train, leaving checkpoints and the log in `out` and, at the end, the model that ships in `out/model`.

    Args:
        preset: name of the training preset.
        out: directory of the run; made if absent.
        corpus: corpus directory, with its tokenizer.
        resume: go on from the last checkpoint in `out`. The plan in it stands: stages keep their steps, and
            another `max_steps` moves only the decay of the learning rate (at once, if fewer steps are left
            than it takes).
        max_steps: optimizer steps of the whole run; None means the preset's, or on a resume the plan's.
        seed: of the initial weights and the data order.
        init_from: directory of a model to start from instead of random weights. Its paths are all on from the
            first step, and the mixture is that of the last stage.
        threads: torch's CPU threads; None leaves them as they are.
        device: `cpu` or `cuda`.
        config: the preset's content, where it is to differ from the named one.
        tensorboard: write TensorBoard events to `out/runs`.

    Raises:
        ValueError: for an unknown preset or device, a run directory that holds checkpoints without `resume`,
            or one that holds none with it.
    """
    out, corpus = Path(out), Path(corpus)
    config = training_preset(preset) if config is None else config
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not one of cpu, cuda")
    if threads is not None:
        torch.set_num_threads(threads)
    last = _last_checkpoint(out, resume)
    if last is not None and init_from is not None:
        raise ValueError("resume and init_from exclude each other: a resumed run has its weights")

    continued = init_from is not None
    plan = _plan(config, preset=preset, seed=seed, max_steps=max_steps, last=last, continued=continued)
    config = _staged_as(config, plan)
    set_seed(plan.seed)
    if init_from is not None:
        tokenizer = load_tokenizer(init_from)
        model = HydraForCausalLM.from_pretrained(init_from, dtype=torch.float32)
    else:
        tokenizer = load_tokenizer(corpus / "tokenizer")
        model = HydraForCausalLM(_model_config(config.model, tokenizer))
    stages = config.curriculum.stages
    num_rows = plan.max_steps * plan.rows_per_step
    weights = stages[0].weights
    mixture = MixtureDataset(corpus, config.sequence_length, weights, plan.seed, length=num_rows)
    out.mkdir(parents=True, exist_ok=True)
    if init_from is not None:
        remember_run(Path(init_from), out)
    trainer = HydraTrainer(
        model,
        config=config,
        plan=plan,
        rows=StagedRows(mixture, plan, stages),
        tokenizer=tokenizer,
        domains=tuple(DOMAINS),
        out=out,
        use_cpu=device == "cpu",
        tensorboard=tensorboard,
    )
    started = time.time()
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    step = trainer.state.global_step
    if step < plan.max_steps:
        return TrainResult(step=step, finished=False, model=None)

    fold_scales(model, trainer.curriculum.scales())
    earlier = earlier_runs(out)
    command = f"hydra-lab train --preset {preset} --seed {plan.seed} --max-steps {plan.max_steps}"
    if earlier:
        command += f" --init-from {earlier[-1]['preset']}/model"
    run = {
        "preset": preset,
        "seed": plan.seed,
        "command": command,
        "earlier": earlier,
        "steps": step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds_of_last_session": round(time.time() - started),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "plan": dataclasses.asdict(plan),
        "config": dataclasses.asdict(config),
    }
    export_model(model, tokenizer, out / "model", run=run, run_dir=out)
    return TrainResult(step=step, finished=True, model=out / "model")


def _last_checkpoint(out: Path, resume: bool) -> Path | None:
    found = checkpoint.checkpoints(out)
    if resume and not found:
        raise ValueError(f"nothing to resume: {out} has no checkpoint")
    if found and not resume:
        raise ValueError(f"{out} already holds {found[-1].name}: resume it, or name another directory")
    return found[-1] if resume else None


def _plan(
    config: TrainConfig, *, preset: str, seed: int, max_steps: int | None, last: Path | None, continued: bool
) -> TrainingPlan:
    if last is None:
        if continued:
            config = config.replace(curriculum=config.curriculum.finished())
        return TrainingPlan.of(
            config, preset=preset, seed=seed, max_steps=config.max_steps if max_steps is None else max_steps
        )
    plan = TrainingPlan.read(last)
    if (plan.preset, plan.seed, plan.rows_per_step) != (preset, seed, config.rows_per_step):
        raise ValueError(
            f"{last} is of preset {plan.preset!r}, seed {plan.seed}, {plan.rows_per_step} rows per step; "
            f"asked for {preset!r}, seed {seed}, {config.rows_per_step} rows"
        )
    if max_steps is None:
        return plan
    return plan.until(max_steps, now=checkpoint.step_of(last), decay=config.optimizer.decay)


def _staged_as(config: TrainConfig, plan: TrainingPlan) -> TrainConfig:
    """The configuration with the stages that the plan has (a run begun from given weights has the last one
    only)."""
    if len(plan.begins) == len(config.curriculum.stages):
        return config
    return config.replace(curriculum=config.curriculum.finished())


def _model_config(name: str, tokenizer: PreTrainedTokenizerBase) -> HydraConfig:
    tokens: dict[str, Any] = {
        key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    return HydraConfig.from_preset(name, vocab_size=len(tokenizer), **tokens)
