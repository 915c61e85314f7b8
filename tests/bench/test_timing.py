"""Turns, ratios and intervals on times whose answer is known, and memory that was really taken."""

import math
import time
from typing import Any

import numpy as np
import pytest
import torch

from hydra_lab.bench.throughput import _crossing
from hydra_lab.bench.timing import Timing, peak_memory, ratio, take_turns

CPU = torch.device("cpu")


def test_everyone_has_a_turn_in_every_round_and_nobody_is_always_first() -> None:
    order: list[str] = []
    calls: dict[str, Any] = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = take_turns(calls, device=CPU, rounds=3)
    assert order == list("abc") + list("abc") + list("bca") + list("cab")
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_what_begins_a_turn_untimed_is_not_counted() -> None:
    """The first call of each turn is slow, as one that finds its data gone from the caches."""
    calls = 0

    def call() -> None:
        nonlocal calls
        time.sleep(0.02 * (calls % 2 == 0))
        calls += 1

    timing = take_turns({"call": call}, device=CPU, rounds=3, warm=True, untimed=1)["call"]
    assert calls == 6 and max(timing.seconds) < 0.01


def test_a_short_call_is_repeated() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    take_turns({"short": call}, device=CPU, rounds=2, least_seconds=0.01)
    assert calls > 100


def test_a_ratio_is_taken_within_a_round() -> None:
    """A machine that slows down for everyone changes no ratio."""
    slow = np.array([1.0, 5.0, 2.0, 9.0])
    found = ratio(Timing(tuple(3 * slow)), Timing(tuple(slow)))
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))
    spread = ratio(Timing((2.0, 3.0, 4.0)), Timing((1.0, 1.0, 1.0)))
    assert spread.value == 3.0
    assert 2.0 <= spread.low < spread.value < spread.high <= 4.0
    with pytest.raises(ValueError, match="3 rounds cannot be paired with 2"):
        ratio(Timing((1.0, 1.0, 1.0)), Timing((1.0, 1.0)))


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([2.0, 3.0, 4.0], 1000.0),  # always faster: the first context measured
        (
            [0.5, 2.0, 4.0],
            2000.0,
        ),  # half as fast at 1000, twice as fast at 4000: equal in the middle of the logs
        ([2.0, 0.5, 2.0], 8000.0),  # the last crossing counts
        ([0.5, 0.5, 0.9], math.inf),
    ],
)
def test_the_crossover_is_interpolated_between_logarithms(ratios: list[float], expected: float) -> None:
    contexts = np.log([1000.0, 4000.0, 16000.0])
    assert _crossing(contexts, np.log(ratios)) == pytest.approx(expected)


def test_peak_memory_sees_what_a_call_holds_for_a_moment() -> None:
    size = 1 << 28

    def call() -> None:
        torch.ones(size // 4).sum()

    found = peak_memory(call, CPU)
    if found is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 0.95 * size <= found <= 1.3 * size
    nothing = peak_memory(lambda: None, CPU)
    assert nothing is not None and nothing < 0.05 * size
