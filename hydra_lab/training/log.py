"""What a run reports: a line of JSON per logging step, TensorBoard scalars, and a progress bar."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import Lookup, Routing, StateSummary
from hydra_lab.training.optimizer import GATE


def row_losses(logits_BLV: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the next-token losses (nats) and number of supervised tokens of each row: two [B] tensors."""
    targets = labels_BL[:, 1:]
    loss_BL = F.cross_entropy(
        logits_BLV[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    ).view(targets.shape)
    return loss_BL.sum(dim=1), (targets != -100).sum(dim=1).float()


def by_domain(per_row_B: Tensor, domain_B: Tensor, num_domains: int) -> Tensor:
    """[num_domains] sums of `per_row_B` over the rows of each domain."""
    return torch.zeros(num_domains, device=per_row_B.device).index_add_(0, domain_B, per_row_B)


class Meter:
    """Sums what the steps since the last log line have in common."""

    def __init__(self, domains: tuple[str, ...]) -> None:
        self.domains = domains
        self.step_sums = torch.zeros(len(domains))
        self.step_counts = torch.zeros(len(domains))
        self.reset()

    def reset(self) -> None:
        """Start a new log line."""
        self.started = time.perf_counter()
        self.tokens = 0
        self.batches = 0
        self.load_balance = 0.0
        self.sums = torch.zeros(len(self.domains))
        self.counts = torch.zeros(len(self.domains))

    def add(self, tokens: int, sums: Tensor, counts: Tensor, load_balance: float) -> None:
        """Take in one batch: its tokens, its loss sums and counts by domain, its load-balance loss."""
        self.tokens += tokens
        self.batches += 1
        self.load_balance += load_balance
        self.step_sums += sums.cpu()
        self.step_counts += counts.cpu()

    def take_step(self) -> dict[str, float]:
        """End a step: its mean loss by domain, in nats per supervised token, domains without any left out."""
        losses = self._means(self.step_sums, self.step_counts)
        self.sums += self.step_sums
        self.counts += self.step_counts
        self.step_sums.zero_()
        self.step_counts.zero_()
        return losses

    def _means(self, sums: Tensor, counts: Tensor) -> dict[str, float]:
        means = (sums / counts).tolist()
        return {name: means[i] for i, name in enumerate(self.domains) if counts[i] > 0}

    def scalars(self) -> dict[str, float]:
        """Flat names and values for the log line."""
        seconds = time.perf_counter() - self.started
        total = float(self.counts.sum())
        values = {f"loss_{name}": loss for name, loss in self._means(self.sums, self.counts).items()}
        values["language_loss"] = float(self.sums.sum()) / total if total else float("nan")
        values["load_balance_loss"] = self.load_balance / max(1, self.batches)
        values["tokens_per_second"] = self.tokens / seconds
        return values


class DecisionMeter:
    """Sums what the model decides in training between two log lines, from hooks on its taps.

    Nothing is waited for until a line is written, and gradients are not held up.
    """

    def __init__(self, model: HydraForCausalLM) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._touched: dict[int, Tensor] = {}
        for index, block in enumerate(model.model.blocks):
            taps: dict[str, Callable[[int, Any], None]] = {
                "moe.routing": self._add_routing,
                "memory.lookup": self._add_lookup,
                "ssm.state": self._add_state,
            }
            for tap, add in taps.items():
                path = tap.split(".")[0]
                if path in block.paths:
                    block.get_submodule(tap).register_forward_hook(self._hook(index, add))
        self._num_experts = model.config.moe_num_experts
        first, second = model.config.memory_num_keys
        self._num_addresses = first * second

    def _hook(self, index: int, add: Callable[[int, Any], None]) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, decision: Any) -> None:
            if module.training:
                with torch.no_grad():
                    add(index, decision)

        return hook

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def _add_routing(self, index: int, decision: Routing) -> None:
        chosen = torch.bincount(decision.experts.flatten(), minlength=self._num_experts).float()
        self._add(f"load_{index}", chosen / chosen.sum())

    def _add_lookup(self, index: int, decision: Lookup) -> None:
        if index not in self._touched:
            self._touched[index] = torch.zeros(
                self._num_addresses, dtype=torch.bool, device=decision.addresses.device
            )
        self._touched[index][decision.addresses.flatten()] = True
        self._add(f"memory_gate_{index}", decision.gate.float().mean())

    def _add_state(self, index: int, decision: StateSummary) -> None:
        self._add(f"state_norm_{index}", decision.norms.float().mean())

    def take(self) -> dict[str, float]:
        """End a log line: `load_<block>_<expert>`, `memory_use_<block>`, `memory_gate_<block>` and
        `state_norm_<block>`, as
        `hydra_lab.training_log.TrainingLog` explains them."""
        values: dict[str, float] = {}
        for name, total in self._sums.items():
            mean = (total / self._counts[name]).tolist()
            if isinstance(mean, list):
                values |= {f"{name}_{expert}": share for expert, share in enumerate(mean)}
            else:
                values[name] = mean
        for index, touched in self._touched.items():
            values[f"memory_use_{index}"] = float(touched.float().mean())
        self._sums, self._counts, self._touched = {}, {}, {}
        return values


def gate_values(model: nn.Module) -> dict[str, float]:
    """The gate g_p of every block and path, as `gate_<block>_<path>`."""
    values: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if GATE.search(name):
            parts = name.split(".")
            values[f"gate_{parts[-3]}_{parts[-1]}"] = float(parameter.detach())
    return values


class LogWriter(TrainerCallback):
    """Appends every log line to `training_log.jsonl`; a resumed run first drops the lines after its
    checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # A kill may have cut the last line short; whatever it said is said again.
        whole = [line for line in lines if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        named = {key: value for key, value in logs.items() if key not in ("epoch", "num_input_tokens_seen")}
        rounded = {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in named.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **rounded}) + "\n")


class ProgressBar(TrainerCallback):
    """A bar with loss and speed on a terminal, one short line per log line elsewhere."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        speed, rate = logs["tokens_per_second"], logs["learning_rate"]
        text = f"loss {logs['loss']:.3f}, {speed:.0f} tokens/s, lr {rate:.2e}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            print(f"step {state.global_step}/{state.max_steps}: {text}", file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
