"""Timing that survives a noisy machine: contestants take turns, and ratios are taken within a turn."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]
Progress = Callable[[str], None]

RESAMPLES = 2000
"""Bootstrap samples behind an interval."""

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, one entry per round; rounds of all contestants lie side by side.

    Attributes:
        seconds: [rounds] seconds per call.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, seconds."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Median and quartiles in milliseconds, and the number of rounds."""
        low, high = self.quartiles
        return {
            "ms": self.median * 1e3,
            "ms_q25": low * 1e3,
            "ms_q75": high * 1e3,
            "rounds": len(self.seconds),
        }


@dataclass(frozen=True)
class Ratio:
    """How many times as long one contestant takes as another.

    Attributes:
        value: median over the rounds of the ratio within a round.
        low, high: 95% bootstrap interval of that median, over rounds.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def ratio(slower: Timing, faster: Timing, seed: int = 0) -> Ratio:
    """`slower / faster`, round by round.

    Raises:
        ValueError: the two were not timed in the same rounds.
    """
    if len(slower.seconds) != len(faster.seconds):
        raise ValueError(f"{len(slower.seconds)} rounds cannot be paired with {len(faster.seconds)}")
    ratios = np.asarray(slower.seconds) / np.asarray(faster.seconds)
    low, high = np.percentile(resampled_medians(ratios, seed), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def resampled_medians(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """[RESAMPLES] medians of `values` [rounds] drawn with replacement."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
    return np.median(values[drawn], axis=1)


def take_turns(
    calls: Mapping[str, Call],
    *,
    device: torch.device,
    rounds: int,
    least_seconds: float = 0.0,
    warm: bool = False,
    untimed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time several calls in one process, in rounds in which each has its turn; the order is turned each round.

    Args:
        calls: contestants by name.
        device: where they compute; a GPU is waited for before the clock is read.
        rounds: turns of each.
        least_seconds: a turn repeats a call until it takes about this long.
        warm: the calls have run before; otherwise each runs once before the clock does.
        untimed: calls at the beginning of each turn that are not timed: they bring back into the processor's caches
            what the other contestants drove out.
        progress: told the name of each turn.
    """
    names = list(calls)
    repeats = {}
    for name in names:
        if not warm:
            if progress is not None:
                progress(f"{name}: warming up")
            calls[name]()
        once = _seconds(calls[name], 1, device) if least_seconds > 0 else 0.0
        repeats[name] = max(1, round(least_seconds / max(once, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            if progress is not None:
                progress(f"{name}: round {turn + 1} of {rounds}")
            for _ in range(untimed):
                calls[name]()
            seconds[name].append(_seconds(calls[name], repeats[name], device))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds per call."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def synchronize(device: torch.device) -> None:
    """Wait for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Most bytes held during `call` above those held before: of the GPU, or of this process where that can be read
    (Linux); else None."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not (CLEAR_REFS.is_file() and STATUS.is_file()):
        return None
    CLEAR_REFS.write_text("5")  # the high-water mark falls to what is held now
    before = _kilobytes("VmRSS")
    call()
    return max(0, _kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")
