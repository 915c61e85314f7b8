"""`hydra-lab bench capture`: what it costs to look, from idle taps to a trace of everything."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hydra_lab.bench.contests import Arena
from hydra_lab.bench.environment import describe_environment
from hydra_lab.bench.result import BenchResult, Goal
from hydra_lab.bench.timing import Progress, Timing, ratio, take_turns
from hydra_lab.capture.record import record, select_taps
from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.ops.backend import Backend, unavailable
from hydra_lab.ops.sparse_attention import sparse_attention
from hydra_lab.ops.ssd import ssd
from hydra_lab.taps import Tap

PLAIN, IDLE, RECORDED, TRACED = "plain forward", "taps idle", "record, all taps", "nnsight trace, all taps"


@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """What to measure.

    Attributes:
        hidden_size: width of a model that otherwise is the `29m` preset.
        length: tokens, batch 1.
        rounds: turns of each contestant.
    """

    hidden_size: int
    length: int
    rounds: int
    device: torch.device
    dtype: torch.dtype
    seed: int = 0


def measure_capture(plan: CapturePlan, progress: Progress) -> BenchResult:
    """Time a forward pass without taps, with idle ones, recorded and traced; and operations with and without signals.

    Raises:
        ValueError: the width does not fit the preset's heads.
    """
    heads = plan.hidden_size // HydraConfig.from_preset("29m").attention_head_dim
    config = HydraConfig.from_preset(
        "29m", hidden_size=plan.hidden_size, attention_num_heads=heads, attention_num_kv_heads=heads
    )
    torch.manual_seed(plan.seed)
    model: Any = HydraForCausalLM(config).eval()
    model = model.to(plan.device, plan.dtype)
    ids = torch.randint(config.vocab_size, (1, plan.length), device=plan.device)
    calls: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: _without_taps(model, ids),
        IDLE: lambda: _forward(model, ids),
        RECORDED: lambda: record(model, ids),
    }
    skipped: dict[str, str] = {}
    if importlib.util.find_spec("nnsight") is None:
        skipped[TRACED] = "nnsight is not installed"
    else:
        calls[TRACED] = _traced(model, ids)
    timings = take_turns(calls, device=plan.device, rounds=plan.rounds, progress=progress)
    rows = [_row("model", name, timing, timings[PLAIN]) for name, timing in timings.items()]
    goals = []
    for name, most in ((IDLE, 0.01), (RECORDED, 0.1)):
        over = ratio(timings[name], timings[PLAIN])
        goals.append(
            Goal(
                f"{name} over the {PLAIN}, d={plan.hidden_size}, L={plan.length:,}",
                f"at most {most:.0%} more",
                over.value - 1,
                over.low - 1,
                over.high - 1,
                over.value - 1 <= most,
            )
        )
    for operation, (silent, telling) in _emissions(config, plan, skipped).items():
        pair = take_turns(
            {"silent": silent, "with signals": telling},
            device=plan.device,
            rounds=plan.rounds,
            least_seconds=0.05,
            progress=progress,
        )
        rows += [_row(operation, name, timing, pair["silent"]) for name, timing in pair.items()]
        if plan.device.type == "cuda" and operation.endswith("triton"):
            over = ratio(pair["with signals"], pair["silent"])
            values = (over.value - 1, over.low - 1, over.high - 1)
            goals.append(
                Goal(f"{operation}: signals on over off", "at most 3% more", *values, values[0] <= 0.03)
            )
    return BenchResult(
        bench="capture",
        environment=describe_environment(plan.device),
        settings={
            "preset": "29m",
            "hidden_size": plan.hidden_size,
            "length": plan.length,
            "batch": 1,
            "rounds": plan.rounds,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "seed": plan.seed,
        },
        rows=rows,
        goals=goals,
        skipped=skipped,
    )


def _forward(model: HydraForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def _without_taps(model: HydraForCausalLM, ids: Tensor) -> None:
    """A forward pass in which a tap is not even a module that is called."""
    with patch.object(Tap, "__call__", lambda _tap, decision: decision):
        _forward(model, ids)


def _traced(model: HydraForCausalLM, ids: Tensor) -> Callable[[], Any]:
    from hydra_lab.lens import HydraLens

    lens: Any = HydraLens(model)
    paths = [f"model.{path}" for path in select_taps(model)]

    def call() -> Any:
        with torch.no_grad(), lens.trace(ids) as tracer:
            cache = tracer.cache(modules=paths)
        assert len(cache.keys()) == len(paths)
        return cache

    return call


def _emissions(
    config: HydraConfig, plan: CapturePlan, skipped: dict[str, str]
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Per operation and backend, a call without and one with what the taps need."""
    arena = Arena(config, plan.length, plan.device, plan.dtype, plan.seed)
    recurrence = arena.ssd_inputs()
    q, k, v, blocks, options = arena.attention_inputs()

    def scan(on: bool, backend: Backend) -> Any:
        return ssd(*recurrence, chunk_size=config.ssm_chunk_size, squared_norms=on, backend=backend)

    def attend(on: bool, backend: Backend) -> Any:
        return sparse_attention(q, k, v, blocks, **options, mass=on, backend=backend)

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    backends: tuple[Backend, ...] = ("torch", "triton")
    for backend in backends:
        reason = unavailable("ssd", backend, plan.device, plan.dtype)
        if reason is not None:
            skipped[f"signals of {backend}"] = reason
            continue
        calls[f"ssd state norms, {backend}"] = _pair(partial(scan, backend=backend))
        calls[f"sparse_attention mass by kind, {backend}"] = _pair(partial(attend, backend=backend))
    return calls


def _pair(run: Callable[[bool], Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def silent() -> None:
        with torch.no_grad():
            run(False)

    def telling() -> None:
        with torch.no_grad():
            run(True)

    return silent, telling


def _row(subject: str, name: str, timing: Timing, plain: Timing) -> dict[str, Any]:
    return {
        "subject": subject,
        "contestant": name,
        **timing.to_dict(),
        "over_plain": ratio(timing, plain).to_dict(),
    }
