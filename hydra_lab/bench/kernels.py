"""`hydra-lab bench kernels`: every operation's backends and peers side by side, and their share of the limits."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from hydra_lab.bench.agreement import LENGTH, measure_agreement
from hydra_lab.bench.ceilings import copy_bandwidth, matmul_rate
from hydra_lab.bench.contests import Arena, Contest, Contestant
from hydra_lab.bench.environment import describe_environment
from hydra_lab.bench.result import BenchResult, Goal
from hydra_lab.bench.timing import Progress, Timing, ratio, take_turns
from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.nn.ssm import SSMPath
from hydra_lab.ops.backend import BACKENDS, MEASURED, PACKAGES

FORWARD, TRAINING = "forward", "forward and backward"


@dataclass(frozen=True, kw_only=True)
class KernelsPlan:
    """What to measure.

    Attributes:
        preset: whose sizes.
        length: tokens of each operation.
        attention_lengths: further lengths of sparse attention.
        path_lengths: tokens of the contest between our ssm path and transformers' Mamba2 mixer.
        rounds: turns of each contestant; the references, which are slow, have one.
        least_seconds: length of a turn.
    """

    preset: str
    length: int
    attention_lengths: tuple[int, ...]
    path_lengths: tuple[int, ...]
    rounds: int
    least_seconds: float
    device: torch.device
    dtype: torch.dtype
    seed: int = 0


def measure_kernels(plan: KernelsPlan, progress: Progress) -> BenchResult:
    """Run every contest of the plan.

    Raises:
        ValueError: there is no such preset.
    """
    config = HydraConfig.from_preset(plan.preset)
    progress("measuring what a matmul and a copy reach")
    ceilings = {
        "flops_per_second": matmul_rate(plan.device, plan.dtype),
        "bytes_per_second": copy_bandwidth(plan.device),
    }
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    timings: dict[tuple[str, int, str, str], Timing] = {}

    def run(contest: Contest) -> None:
        label = f"{contest.operation} at {contest.length:,}"
        skipped.update({f"{name} of {label}": reason for name, reason in contest.skipped.items()})
        for direction in (FORWARD, TRAINING):
            found = _time(
                contest, direction, plan, partial(_tell, progress, f"{label}, {direction}, "), skipped
            )
            for name, timing in found.items():
                timings[contest.operation, contest.length, direction, name] = timing
                rows.append(_row(contest, direction, name, found, ceilings))

    arena = Arena(config, plan.length, plan.device, plan.dtype, plan.seed)
    for contest in arena.all():
        run(contest)
    progress("comparing every backend with its reference")
    agreement = list(measure_agreement(config, device=plan.device, dtype=plan.dtype, seed=plan.seed))
    for length in plan.attention_lengths:
        run(Arena(config, length, plan.device, plan.dtype, plan.seed).sparse_attention())
    for length in plan.path_lengths:
        run(ssm_path_contest(config, length, plan.device, plan.dtype, plan.seed))
    return BenchResult(
        bench="kernels",
        environment=describe_environment(plan.device),
        settings={
            "preset": plan.preset,
            "length": plan.length,
            "batch": 1,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "seed": plan.seed,
            "rounds": plan.rounds,
            **ceilings,
        },
        rows=rows,
        findings={"agreement": [asdict(each) for each in agreement], "agreement_length": LENGTH},
        goals=_goals(plan, timings, rows),
        skipped=skipped,
    )


def ssm_path_contest(
    config: HydraConfig, length: int, device: torch.device, dtype: torch.dtype, seed: int
) -> Contest:
    """Our whole ssm path against transformers' Mamba2 mixer of equal sizes and equal weights."""
    torch.manual_seed(seed)
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=config.hidden_size,
            num_heads=config.ssm_num_heads,
            head_dim=config.ssm_head_dim,
            state_size=config.ssm_state_size,
            n_groups=config.ssm_num_groups,
            conv_kernel=config.ssm_conv_kernel,
            expand=config.ssm_expand,
            chunk_size=256,
        ),
        layer_idx=0,
    ).to(device, dtype)
    ours = SSMPath(config).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(1, length, config.hidden_size, device=device, dtype=dtype).requires_grad_()
    span = Span(length)

    def contestant(module: nn.Module, run: Callable[[], Any]) -> Contestant:
        return Contestant(run, (hidden, *(p for p in module.parameters() if p.requires_grad)))

    flops = 2 * length * (theirs.in_proj.weight.numel() + theirs.out_proj.weight.numel())
    made = Contest("ssm path", length, flops, 2 * hidden.numel() * hidden.element_size())
    made.contestants["torch"] = contestant(ours, lambda: ours(hidden, span, None)[0])
    made.contestants["transformers Mamba2"] = contestant(theirs, lambda: theirs(hidden))
    return made


def _time(
    contest: Contest, direction: str, plan: KernelsPlan, progress: Progress, skipped: dict[str, str]
) -> dict[str, Timing]:
    """Time one direction; references take one turn by themselves."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, contestant in contest.contestants.items():
        if direction == TRAINING and not contestant.leaves:
            continue
        call = _forward(contestant) if direction == FORWARD else _training(contestant)
        try:
            call()
        except (RuntimeError, NotImplementedError) as error:
            if name in BACKENDS:
                raise
            skipped[f"{name} of {contest.operation} at {contest.length:,}, {direction}"] = (
                f"{type(error).__name__}: {str(error).splitlines()[0]}"
            )
            continue
        calls[name] = call
    slow = {name: call for name, call in calls.items() if name == "reference"}
    fast = {name: call for name, call in calls.items() if name != "reference"}
    found = take_turns(
        fast,
        device=plan.device,
        rounds=plan.rounds,
        least_seconds=plan.least_seconds,
        warm=True,
        progress=progress,
    )
    return found | take_turns(slow, device=plan.device, rounds=1, warm=True, progress=progress)


def _forward(contestant: Contestant) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            contestant.run()

    return call


def _training(contestant: Contestant) -> Callable[[], Any]:
    def call() -> None:
        out = contestant.run()
        torch.autograd.grad(out, contestant.leaves, torch.ones_like(out), allow_unused=True)

    return call


def _row(
    contest: Contest, direction: str, name: str, found: dict[str, Timing], ceilings: dict[str, float]
) -> dict[str, Any]:
    """A row; three passes' worth of FLOPs for forward and backward, recomputation not counted."""
    timing, torch_timing = found[name], found.get("torch")
    passes = 1 if direction == FORWARD else 3
    flops = passes * contest.flops / timing.median
    num_bytes = contest.num_bytes / timing.median
    same_rounds = torch_timing is not None and len(torch_timing.seconds) == len(timing.seconds)
    against = None
    if torch_timing is not None:
        against = (
            ratio(timing, torch_timing).to_dict()
            if same_rounds
            else {"value": timing.median / torch_timing.median}
        )
    return {
        "operation": contest.operation,
        "length": contest.length,
        "direction": direction,
        "contestant": name,
        **timing.to_dict(),
        "over_torch": against,
        "flops_per_second": flops,
        "of_matmul": flops / ceilings["flops_per_second"],
        "bytes_per_second": num_bytes if direction == FORWARD else None,
        "of_copy": num_bytes / ceilings["bytes_per_second"] if direction == FORWARD else None,
    }


def _goals(
    plan: KernelsPlan, timings: dict[tuple[str, int, str, str], Timing], rows: list[dict[str, Any]]
) -> list[Goal]:
    goals: list[Goal] = []

    def faster(operation: str, length: int, direction: str, ours: str, theirs: str, least: float) -> None:
        """Ours is at least `least` times as fast as theirs."""
        pair = [timings.get((operation, length, direction, name)) for name in (theirs, ours)]
        if pair[0] is not None and pair[1] is not None:
            r = ratio(pair[0], pair[1])
            measure = f"{operation} at {length:,}, {direction}, {ours} against {theirs}"
            goals.append(Goal(measure, f"at least {least:g}x", r.value, r.low, r.high, r.value >= least))

    if plan.device.type == "cpu":
        for length in plan.path_lengths:
            faster("ssm path", length, FORWARD, "torch", "transformers Mamba2", 1.7)
            faster("ssm path", length, TRAINING, "torch", "transformers Mamba2", 2.0)
        return goals
    for direction in (FORWARD, TRAINING):
        faster("ssd", plan.length, direction, "triton", "mamba_ssm", 1.0)
        faster("chunk_moe", plan.length, direction, "triton", "dense GEMM", 0.7)
        faster("chunk_moe", plan.length, direction, "triton", "grouped_mm", 1.0)
    for length, least in ((16384, 2.0), (65536, 6.0)):
        faster("sparse_attention", length, TRAINING, "triton", "dense SDPA", least)
    for row in rows:
        if (row["operation"], row["direction"], row["contestant"]) == ("memory_read", FORWARD, "triton"):
            share = row["of_copy"]
            goals.append(
                Goal(
                    "product_key gather, share of copy bandwidth",
                    "at least 80%",
                    share,
                    share,
                    share,
                    share >= 0.8,
                )
            )
    return goals


def record_measured(result: BenchResult) -> None:
    """Note the milliseconds of each backend in `hydra_lab/ops/measured.json`, which `auto` chooses by.

    Raises:
        ValueError: `result` is not of `bench kernels`.
    """
    if result.bench != "kernels":
        raise ValueError(f"only a result of bench kernels can be recorded, not one of bench {result.bench}")
    milliseconds: dict[str, dict[str, float]] = {}
    for row in result.rows:
        longest = TRAINING if row["operation"] != "select_blocks" else FORWARD
        if row["operation"] in PACKAGES and row["contestant"] in BACKENDS and row["direction"] == longest:
            milliseconds.setdefault(row["operation"], {}).setdefault(row["contestant"], row["ms"])
    every = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    every[result.environment["device"]] = {
        "milliseconds": milliseconds,
        "settings": result.settings,
        "hardware": result.environment["hardware"],
        "versions": result.environment["versions"],
        "commit": result.environment["commit"],
    }
    MEASURED.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


def _tell(progress: Progress, prefix: str, what: str) -> None:
    progress(prefix + what)
