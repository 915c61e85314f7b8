"""`hydra-lab bench throughput`: tokens per second and memory of Hydra and of its peers, by context length."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hydra_lab.accounting import account
from hydra_lab.bench.ceilings import matmul_rate
from hydra_lab.bench.environment import describe_environment
from hydra_lab.bench.peers import build, num_parameters, peer_configs
from hydra_lab.bench.result import BenchResult, Goal
from hydra_lab.bench.timing import (
    Progress,
    Timing,
    peak_memory,
    ratio,
    resampled_medians,
    synchronize,
    take_turns,
)
from hydra_lab.config import HydraConfig
from hydra_lab.decoding import PIECE, DecodeGraph, prefill
from hydra_lab.ops import use_backend
from hydra_lab.ops.backend import current_backends
from hydra_lab.taps import PATHS

GIB = 1 << 30

GRAPH = "hydra, captured graph"

GPU_PIECE = 65536
"""Tokens that Hydra reads at a time on a GPU; on a CPU it is `PIECE`. Peers read a prompt at once: the fused causal
attention has no such form, and Mamba-2 in transformers takes single tokens only once it has a state."""


@dataclass(frozen=True, kw_only=True)
class ThroughputPlan:
    """What to measure.

    Attributes:
        preset: `29m` or `1.6b`; peers have its total number of parameters.
        contexts: prefill lengths, tokens, ascending; decoding is measured behind each.
        rounds: prefills of each model and context that are timed, after one that is not.
        decode_steps: single tokens that are timed behind each context.
        longest_seconds: a model is not run at a context where a prefill would take longer than this, by extrapolation
            from the one before.
        training_context: length of the training step that is measured too (Hydra only, batch 1, AdamW); None for none.
    """

    preset: str
    contexts: tuple[int, ...]
    rounds: int
    decode_steps: int
    longest_seconds: float
    training_context: int | None
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    @property
    def piece(self) -> int:
        """Tokens that Hydra reads at a time."""
        return PIECE if self.device.type == "cpu" else GPU_PIECE


def measure_throughput(plan: ThroughputPlan, progress: Progress) -> BenchResult:
    """Run the plan in one process, models taking turns.

    Raises:
        ValueError: the preset has no peers, or there is no context.
    """
    if not plan.contexts or list(plan.contexts) != sorted(set(plan.contexts)):
        raise ValueError(f"contexts must ascend, got {list(plan.contexts)}")
    configs, skipped = peer_configs(plan.preset, plan.device)
    models = {name: build(config, plan.device, plan.dtype, plan.seed) for name, config in configs.items()}
    parameters = {name: num_parameters(config) for name, config in configs.items()}
    bench = _Throughput(plan, models, parameters, skipped, progress)
    with torch.no_grad():
        for context in plan.contexts:
            bench.prefill(context)
        bench.decode()
    findings: dict[str, Any] = {
        "crossover": bench.crossovers(),
        "time": [
            time_by_path(models["hydra"], bench.ids[:, :context], plan, progress) for context in plan.contexts
        ],
    }
    if plan.training_context is not None:
        hydra = configs["hydra"]
        assert isinstance(hydra, HydraConfig)
        findings["training"] = training_step(hydra, models["hydra"], plan, progress)
    return BenchResult(
        bench="throughput",
        environment=describe_environment(plan.device),
        settings={
            "preset": plan.preset,
            "contexts": list(plan.contexts),
            "rounds": plan.rounds,
            "decode_steps": plan.decode_steps,
            "backends": current_backends(bench.ids),
            "piece": plan.piece,
            "batch": 1,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "seed": plan.seed,
            "parameters": parameters,
        },
        rows=bench.rows,
        findings=findings,
        goals=bench.goals(),
        skipped=skipped,
    )


class _Throughput:
    """Measurements so far, and the caches that prefills leave for decoding."""

    def __init__(
        self,
        plan: ThroughputPlan,
        models: dict[str, Any],
        parameters: dict[str, int],
        skipped: dict[str, str],
        progress: Progress,
    ) -> None:
        self.plan, self.models, self.parameters = plan, models, parameters
        self.skipped, self.progress = skipped, progress
        self.rows: list[dict[str, Any]] = []
        self.prefills: dict[tuple[str, int], Timing] = {}
        self.decodes: dict[tuple[str, int], Timing] = {}
        self.peaks: dict[tuple[str, int], int | None] = {}
        self.caches: dict[tuple[str, int], Any] = {}
        generator = torch.Generator().manual_seed(plan.seed)
        vocabulary = min(model.config.vocab_size for model in models.values())
        self.ids = torch.randint(vocabulary, (1, plan.contexts[-1]), generator=generator).to(plan.device)

    def prefill(self, context: int) -> None:
        """Time a prefill of each model that can be expected to finish, and keep what it leaves."""
        calls: dict[str, Callable[[], None]] = {}
        for name in self.models:
            expected = self._expected_seconds(name, context)
            if expected > self.plan.longest_seconds:
                self.skipped[f"{name} at {context}"] = f"a prefill would take about {expected:.0f} s"
                continue
            call = partial(self._run_prefill, name, context)
            self.progress(f"{name} at {context:,}: warming up")
            try:
                self.peaks[name, context] = peak_memory(call, self.plan.device)
            except torch.cuda.OutOfMemoryError:
                self.skipped[f"{name} at {context}"] = "out of memory"
                continue
            calls[name] = call
        told = partial(_tell, self.progress, f"prefill of {context:,} tokens, ")
        timings = take_turns(
            calls, device=self.plan.device, rounds=self.plan.rounds, warm=True, progress=told
        )
        self.prefills |= {(name, context): timing for name, timing in timings.items()}
        for name, timing in timings.items():
            self._add_row("prefill", name, context, timing, tokens=context)

    def _run_prefill(self, name: str, context: int) -> None:
        self.caches.pop((name, context), None)
        ids = self.ids[:, :context]
        if name == "hydra":
            out = prefill(self.models[name], ids, piece=self.plan.piece)
        else:
            out = self.models[name](input_ids=ids, use_cache=True, logits_to_keep=1)
        self.caches[name, context] = out

    def _expected_seconds(self, name: str, context: int) -> float:
        """From the longest context measured so far, for Hydra in proportion, for peers to the square; 0 before the
        first, infinite once one was left out."""
        earlier = [length for length in self.plan.contexts if length < context]
        if not earlier:
            return 0.0
        if (name, earlier[-1]) not in self.prefills:
            return math.inf
        power = 1 if name == "hydra" else 2
        return self.prefills[name, earlier[-1]].median * (context / earlier[-1]) ** power

    def decode(self) -> None:
        """Time single tokens behind every context, contexts and models taking turns; on a GPU also as a graph.

        A turn is two tokens, of which the second is timed: one token after another, as in generation.
        """
        calls: dict[str, Callable[[], Any]] = {}
        keys: dict[str, tuple[str, int]] = {}
        for name, context in self.caches:
            keys[f"{name}@{context}"] = name, context
            calls[f"{name}@{context}"] = partial(self._run_decode, name, context)
            if name == "hydra" and self.plan.device.type == "cuda":
                keys[f"{GRAPH}@{context}"] = GRAPH, context
                calls[f"{GRAPH}@{context}"] = partial(self._graph(context).step, self.ids[:, :1])
        timings = take_turns(
            calls,
            device=self.plan.device,
            rounds=self.plan.decode_steps,
            untimed=1,
            progress=partial(_tell, self.progress, "decoding, "),
        )
        self.decodes = {keys[label]: timing for label, timing in timings.items()}
        for (name, context), timing in self.decodes.items():
            self._add_row("decode", name, context, timing, tokens=1)
        self.caches.clear()

    def _graph(self, context: int) -> DecodeGraph:
        """Hydra's decode step behind a context, captured on the Triton backend."""
        model = self.models["hydra"]
        with use_backend("triton"):
            cache = self.caches["hydra", context].past_key_values
            return DecodeGraph(model, cache, 2 * self.plan.decode_steps + 1)

    def _run_decode(self, name: str, context: int) -> None:
        out = self.caches[name, context]
        kind = "cache_params" if "cache_params" in out else "past_key_values"
        past: dict[str, Any] = {kind: out[kind]}
        self.caches[name, context] = self.models[name](input_ids=self.ids[:, :1], use_cache=True, **past)

    def _add_row(self, phase: str, name: str, context: int, timing: Timing, *, tokens: int) -> None:
        low, high = timing.quartiles
        hydra = (self.prefills if phase == "prefill" else self.decodes).get(("hydra", context))
        faster = None if hydra is None or name == "hydra" else ratio(timing, hydra).to_dict()
        self.rows.append(
            {
                "phase": phase,
                "model": name,
                "parameters": self.parameters["hydra" if name == GRAPH else name],
                "context": context,
                "tokens_per_second": tokens / timing.median,
                "tokens_per_second_q25": tokens / high,
                "tokens_per_second_q75": tokens / low,
                "peak_bytes": self.peaks[name, context] if phase == "prefill" else None,
                "hydra_times_faster": faster,
                **timing.to_dict(),
            }
        )

    def crossovers(self) -> dict[str, dict[str, float | str]]:
        """By peer, the context from which Hydra's prefill is faster, interpolated in log(ratio) over log(context).

        `value` with a 95% bootstrap interval over rounds; the shortest context measured where Hydra is always faster,
        infinity where it never is.
        """
        found: dict[str, dict[str, float | str]] = {}
        for peer in self.models:
            contexts = [c for c in self.plan.contexts if {(peer, c), ("hydra", c)} <= self.prefills.keys()]
            if peer == "hydra" or not contexts:
                continue
            logs = np.stack(
                [
                    resampled_medians(
                        np.log(self.prefills[peer, c].seconds) - np.log(self.prefills["hydra", c].seconds), c
                    )
                    for c in contexts
                ]
            )
            samples = np.array([_crossing(np.log(contexts), of_sample) for of_sample in logs.T])
            centre = _crossing(np.log(contexts), np.median(logs, axis=1))
            low, high = np.percentile(samples, (2.5, 97.5), method="nearest")
            note = "or below: the shortest context measured" if centre == contexts[0] else "interpolated"
            found[peer] = {"value": centre, "low": float(low), "high": float(high), "note": note}
        return found

    def goals(self) -> list[Goal]:
        """The figures that this project set itself for the 29m preset on a CPU, as far as they were measured."""
        if self.plan.preset != "29m" or self.plan.device.type != "cpu":
            return []
        goals: list[Goal] = []
        for context, least in ((8192, 3.0), (32768, 8.0)):
            if {("hydra", context), ("transformer", context)} <= self.prefills.keys():
                r = ratio(self.prefills["transformer", context], self.prefills["hydra", context])
                measure = f"29m prefill at {context:,} against the equal-parameter SDPA transformer"
                goals.append(Goal(measure, f"at least {least:g}x", r.value, r.low, r.high, r.value >= least))
        contexts = [c for c in self.plan.contexts if ("hydra", c) in self.decodes]
        if len(contexts) > 1:
            first = self.decodes["hydra", contexts[0]]
            rates = [ratio(first, self.decodes["hydra", c]) for c in contexts[1:]]
            worst = max(rates, key=lambda r: abs(r.value - 1))
            measure = f"29m decode rate, {contexts[0]:,} to {contexts[-1]:,} tokens of context, over that at the first"
            goals.append(
                Goal(measure, "within 10%", worst.value, worst.low, worst.high, abs(worst.value - 1) <= 0.1)
            )
        peak = self.peaks.get(("hydra", 65536))
        if peak is not None:
            gib = peak / GIB
            measure = "29m peak memory of a prefill of 65,536 tokens above the weights, GiB"
            goals.append(Goal(measure, "under 2 GB", gib, gib, gib, peak < 2e9))
        return goals


def time_by_path(model: Any, ids: Tensor, plan: ThroughputPlan, progress: Progress) -> dict[str, Any]:
    """Where the time of a prefill goes: seconds in each path over all blocks, and in the rest, medians over rounds.

    Returns:
        `context`; `seconds` by path, with `rest` (embedding, norms, sums, head) and `total`; `flops` of the prefill and
        `of_matmul`, their rate over what a matmul reaches on the device.
    """
    context = ids.shape[1]
    clock = _PathClock(plan.device)
    handles = [
        handle for block in model.model.blocks for path in block.paths for handle in clock.watch(block, path)
    ]
    rounds: list[dict[str, float]] = []
    try:
        for turn in range(plan.rounds):
            progress(f"time by path at {context:,}: round {turn + 1} of {plan.rounds}")
            clock.seconds = dict.fromkeys(PATHS, 0.0)
            begin = clock.now()
            prefill(model, ids, piece=plan.piece)
            total = clock.now() - begin
            rounds.append({**clock.seconds, "rest": total - sum(clock.seconds.values()), "total": total})
    finally:
        for handle in handles:
            handle.remove()
    seconds = {part: float(np.median([each[part] for each in rounds])) for part in rounds[0]}
    flops = account(model.config, (context,)).flops[0].prefill * context
    rate = matmul_rate(plan.device, plan.dtype)
    return {
        "context": context,
        "seconds": seconds,
        "flops": flops,
        "of_matmul": flops / seconds["total"] / rate,
    }


class _PathClock:
    """Adds up the time between a path's begin and its end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.begin = 0.0

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def watch(self, block: nn.Module, path: str) -> list[Any]:
        """Hooks on one path of one block."""
        module = getattr(block, path)

        def start(*_: Any) -> None:
            self.begin = self.now()

        def stop(*_: Any) -> None:
            self.seconds[path] += self.now() - self.begin

        return [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]


def _tell(progress: Progress, prefix: str, what: str) -> None:
    progress(prefix + what)


def _crossing(log_contexts: np.ndarray, log_ratio: np.ndarray) -> float:
    """Context from which the log ratio stays above 0: the first one if it always is, infinity if it ends below."""
    below = np.flatnonzero(log_ratio <= 0)
    if len(below) == 0:
        return float(np.exp(log_contexts[0]).round())
    last = int(below[-1])
    if last == len(log_ratio) - 1:
        return math.inf
    share = -log_ratio[last] / (log_ratio[last + 1] - log_ratio[last])
    return float(np.exp(log_contexts[last] + share * (log_contexts[last + 1] - log_contexts[last])))


def training_step(
    config: HydraConfig, model: Any, plan: ThroughputPlan, progress: Progress
) -> dict[str, Any]:
    """Time forward, backward and AdamW on one sequence, under gradient checkpointing, in bf16 autocast on a GPU.

    Returns:
        tokens per second with quartiles, peak bytes above the weights, and `model_flops_utilisation`: three times the
        forward FLOPs of the accounting (the recomputation not counted) over what a matmul reaches on the device.
    """
    context = plan.training_context
    assert context is not None
    generator = torch.Generator().manual_seed(plan.seed)
    ids = torch.randint(config.vocab_size, (1, context), generator=generator).to(plan.device)
    model.train()
    # The name changed in transformers 5.23; both are supported.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    mixed = plan.device.type == "cuda"

    def step() -> None:
        with torch.autocast(plan.device.type, torch.bfloat16, enabled=mixed):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    progress(f"training step at {context:,}: warming up")
    step()
    peak = peak_memory(step, plan.device)
    timing = take_turns(
        {"training step": step}, device=plan.device, rounds=plan.rounds, warm=True, progress=progress
    )["training step"]
    model.eval()
    forward = account(config, (context,)).flops[0].prefill * context
    rate = matmul_rate(plan.device, torch.bfloat16 if mixed else plan.dtype)
    return {
        "context": context,
        "tokens_per_second": context / timing.median,
        **timing.to_dict(),
        "peak_bytes": peak,
        "flops": 3 * forward,
        "model_flops_utilisation": 3 * forward / timing.median / rate,
    }
