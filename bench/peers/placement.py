"""Where a machine had put both processors while they ran.

Virtual processors move between threads, cores and caches, and stay for seconds. How long a
read takes of a line that the other has just written, which names the next to be read, says
where they are. That was checked with additions that need all of a core, on both at once: each
had exactly half of its speed where a line took 13 to 16 ticks, and what it had alone elsewhere.
"""

from typing import Any

ONE_CORE_TICKS = 45  # and below: 13..40 have been seen
ONE_CACHE_TICKS = 130  # 65..85; and beyond, 150..340

# By the names that results give them.
WORDS = {
    "apart": "caches apart",
    "near": "one last-level cache",
    "one": "two threads of one core",
}
TWO_CORES = ("apart", "near")


def placement(run: dict[str, Any]) -> str:
    """One of `WORDS`."""
    ticks = run.get("line_ticks_dependent", float("inf"))
    return "one" if ticks < ONE_CORE_TICKS else "near" if ticks < ONE_CACHE_TICKS else "apart"


def best_known(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of that placement that has most of them, and of each the most runs."""
    placed = [[row for row in rows if row["cores"] == name] for name in WORDS]
    return max(placed, key=lambda some: (len(some), min((row["runs"] for row in some), default=0)))
