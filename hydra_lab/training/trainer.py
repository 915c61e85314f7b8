"""transformers' Trainer for a Hydra: our parameter groups, data order and reporting, and no pickle
anywhere."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.training import checkpoint
from hydra_lab.training.curriculum import Curriculum, CurriculumCallback
from hydra_lab.training.log import (
    DecisionMeter,
    LogWriter,
    Meter,
    ProgressBar,
    by_domain,
    gate_values,
    row_losses,
)
from hydra_lab.training.optimizer import build_optimizer, build_scheduler, move_scheduler
from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import TrainConfig
from hydra_lab.training.rows import StagedRows, collate
from hydra_lab.training_log import LOG_FILE

CHECKPOINTS_KEPT = 2


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM: finish the step, save, stop. A second signal acts as it did before."""

    def __init__(self) -> None:
        self.stopped = False
        self.previous: dict[int, Any] = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restore()


class HydraTrainer(Trainer):
    """Trains a `HydraForCausalLM` by a plan; see `hydra_lab.training.checkpoint` for what a checkpoint
    holds."""

    loss_is_scaled_for_ga = False
    """Read by the base class: the loss of a part is a mean, so the parts of a step are averaged."""

    def __init__(
        self,
        model: HydraForCausalLM,
        *,
        config: TrainConfig,
        plan: TrainingPlan,
        rows: StagedRows,
        tokenizer: PreTrainedTokenizerBase,
        domains: tuple[str, ...],
        out: Path,
        use_cpu: bool,
        tensorboard: bool = True,
    ) -> None:
        self.hydra = model
        self.tokenizer = tokenizer
        self.out = out
        self.train_config = config
        self.plan = plan
        self.curriculum = Curriculum(config.curriculum, plan)
        self.meter = Meter(domains)
        self.decisions = DecisionMeter(model)
        self.stop = StopOnSignal()
        super().__init__(
            model=model,
            args=TrainingArguments(
                output_dir=str(out),
                max_steps=plan.max_steps,
                per_device_train_batch_size=config.rows_per_step // config.accumulation,
                gradient_accumulation_steps=config.accumulation,
                max_grad_norm=config.optimizer.max_grad_norm,
                bf16=config.bf16,
                use_cpu=use_cpu,
                seed=plan.seed,
                save_strategy="steps",
                save_steps=config.save_every,
                logging_strategy="steps",
                logging_steps=config.log_every,
                logging_nan_inf_filter=False,
                include_num_input_tokens_seen="all",
                report_to=["tensorboard"] if tensorboard else [],
                remove_unused_columns=False,
                dataloader_pin_memory=not use_cpu,
                # The base class writes this value into the model's configuration, which is what we ship.
                use_cache=True,
            ),
            data_collator=collate,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[
                CurriculumCallback(self.curriculum, model, self.meter.take_step),
                LogWriter(out / LOG_FILE),
                ProgressBar(),
                self.stop,
            ],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self.hydra if model is None else model, self.train_config.optimizer
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            wrapped = self.optimizer if optimizer is None else optimizer
            inner = getattr(wrapped, "optimizer", wrapped)
            self.lr_scheduler = build_scheduler(inner, self.plan, self.train_config.curriculum)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        # The mixture draws its rows by index already. Skipping to the start of a resume counts indices only.
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean over the batch's rows of their loss per supervised token, plus the model's auxiliary terms.

        Rows weigh the same, so that a domain's share of the gradient is its share of the rows: a mean over tokens
        would give recall, whose answers are a quarter of its tokens, a quarter of what its rows deserve. Also feeds
        the log.
        """
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        sums_B, counts_B = row_losses(outputs.logits, inputs["labels"])
        supervised_B = counts_B > 0
        loss = (sums_B / counts_B.clamp(min=1)).sum() / supervised_B.sum().clamp(min=1)
        config = self.hydra.config
        loss = (
            loss
            + config.moe_load_balance_weight * outputs.load_balance_loss
            + config.moe_router_z_weight * outputs.router_z_loss
        )
        domain, num_domains = inputs["domain"], len(self.meter.domains)
        self.meter.add(
            inputs["labels"].numel(),
            by_domain(sums_B.detach(), domain, num_domains),
            by_domain(counts_B, domain, num_domains),
            float(outputs.load_balance_loss.detach()),
        )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {
                "loss": logs["loss"],
                "tokens": self.state.num_input_tokens_seen,
                "grad_norm": logs["grad_norm"],
                "learning_rate": logs["learning_rate"],
                **self.meter.scalars(),
                **{f"scale_{path}": scale for path, scale in self.curriculum.scales().items()},
                **gate_values(self.hydra),
                **self.decisions.take(),
            }
            self.meter.reset()
            start_time = None
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        with checkpoint.replacing(self.out / f"checkpoint-{self.state.global_step}") as directory:
            self._save(str(directory))
            checkpoint.save_optimizer(getattr(self.optimizer, "optimizer", self.optimizer), directory)
            checkpoint.save_rng(directory)
            self.plan.write(directory)
            self.curriculum.write(directory)
            self.state.save_to_json(str(directory / "trainer_state.json"))
        checkpoint.keep_last(self.out, CHECKPOINTS_KEPT)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # The base class would add its arguments as a pickle.
        directory = self.out if output_dir is None else Path(output_dir)
        self.hydra.save_pretrained(directory, state_dict=state_dict)
        self.tokenizer.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        load_model(self.hydra if model is None else model, directory / "model.safetensors", strict=True)
        self.curriculum.read(directory)

    def _load_optimizer_and_scheduler(self, checkpoint_directory: str | None) -> None:  # type: ignore[override]
        if checkpoint_directory is None:
            return
        directory = Path(checkpoint_directory)
        checkpoint.load_optimizer(getattr(self.optimizer, "optimizer", self.optimizer), directory)
        move_scheduler(self.lr_scheduler, checkpoint.step_of(directory))  # type: ignore[arg-type]

    def _load_rng_state(self, checkpoint_directory: str | None) -> None:  # type: ignore[override]
        if checkpoint_directory is not None:
            checkpoint.load_rng(Path(checkpoint_directory))
