"""Where a machine had put both processors while they ran.

Virtual processors move between threads, cores and caches. How long a read takes of a line
that the other has just written, which names the next to be read, says where they are. That was
checked with additions that need all of a core, on both at once: where a line took 13 to 16
ticks each had exactly half of its speed, elsewhere what it had alone.
"""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from bench.cores import line_cost
from bench.peers.case import Case

ONE_CORE_TICKS = 20  # below: 8..16 have been seen
ONE_CACHE_TICKS = 130  # below: 25..100; beyond it 150..350

# By the names that results give them.
WORDS = {
    "apart": "caches apart",
    "near": "one last-level cache",
    "anywhere": "sleeps: woken anywhere",
    "moved": "moved meanwhile",
    "one": "two threads of one core",
}
JUDGED = ("apart", "near", "anywhere")

PERIOD_S = 0.5
STEADY = 0.8  # of the times it was looked at, to have stayed at one place


Seen = list[tuple[float, dict[str, float]]]  # when, and what lines cost then


@contextmanager
def witness(*cpus: int) -> Iterator[Seen]:
    """Looks at what lines cost between two processors, while something else runs there."""
    seen: Seen = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(PERIOD_S):
            seen.append((time.monotonic(), line_cost(*cpus)))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield seen
        finally:
            stop.set()
    looking.result()


def costs_of(seen: Seen, seconds: float) -> dict[str, Any]:
    """Of lines in the last look and so many seconds before: medians, and all `distances`."""
    recent = [costs for at, costs in seen if at >= seen[-1][0] - seconds]
    if not recent:
        return {}
    middle = {name: statistics.median(costs[name] for costs in recent) for name in recent[0]}
    return middle | {"distances": [costs["line_ticks_dependent"] for costs in recent]}


def placement(case: Case, run: dict[str, Any]) -> str:
    """One of `WORDS`. Runs before there was a witness know only where they were just after."""
    if case.sleeps:
        return "anywhere"
    after = run.get("line_ticks_dependent")
    seen = run.get("distances") or ([] if after is None else [after])
    if not seen:
        return "moved"
    (name, times), *_ = Counter(map(_place, seen)).most_common(1)
    return name if times >= STEADY * len(seen) else "moved"


def _place(ticks: float) -> str:
    return "one" if ticks < ONE_CORE_TICKS else "near" if ticks < ONE_CACHE_TICKS else "apart"


def best_known(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows of one or several cases, those to be shown alone: of a placement that is judged
    if there are any, with most rows, and with most runs of whichever device has fewest."""

    def known(cores: str) -> tuple[bool, int, int]:
        some = placed[cores]
        fewest = min((row["runs"] for row in some), default=0)
        return cores in JUDGED and bool(some), len(some), fewest

    placed = {cores: [row for row in rows if row["cores"] == cores] for cores in WORDS}
    return placed[max(placed, key=known)]
