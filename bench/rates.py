"""Rates under pytest-benchmark: its clock advances by the time of a packet or a request.

So 'median' is nanoseconds a packet, 'OPS' packets a second, and both compare between commits.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest

from bench.cores import line_cost

ROUNDS = 3
SECONDS = 2

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="device and generator need a core each"
)


class Clock:
    """A timer that stands still until it is told how long one of the items took."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def measured(self, per_second: float) -> None:
        """So many items a second."""
        self.now_s += 1 / per_second


clock = Clock()
rated = pytest.mark.benchmark(timer=clock, warmup=False, disable_gc=True)


def measure(benchmark: Any, run: Callable[[], dict[str, Any]], per_value: float) -> None:
    """Rounds of `run`; what else it returns goes, by its median, into extra_info."""
    outcomes: list[dict[str, Any]] = []

    def once() -> None:
        outcome = run()
        # On a virtual machine both processors may be anywhere; figures compare only with
        # those of runs in which a line cost as much.
        outcome |= line_cost(0, 1)
        outcomes.append(outcome)
        clock.measured(outcome["value"] * per_value)

    benchmark.pedantic(once, rounds=ROUNDS)
    for name in outcomes[0]:
        values = sorted(outcome[name] for outcome in outcomes if outcome.get(name) is not None)
        if values:
            benchmark.extra_info[name] = round(values[len(values) // 2], 4)
