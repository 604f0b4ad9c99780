"""Two builds of vhostpy in turns: what a change costs, or gains.

    make bench-builds A=main                      # main beside what is in this tree
    make bench-builds A=main B=HEAD~1 CASE=64B-split

These machines move their processors every few seconds, and one build then makes 35 or 8 Mpps.
So both are started, each with a generator of its own; all of one pair is stopped while the
other has its turn of 0.3 s, and only neighbouring turns are compared. Devices have core 0,
generators core 1; generators are this tree's for both.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.checkout import tree_of
from bench.peers.generators import WARMUP_S
from bench.turns import Pair

TURNS = 40
STARTS = 4  # two processes of one build differ by 2 %, by where their memory lies
RETRIES = 2  # times as many at most, until enough were undisturbed
UNDISTURBED = 0.93  # of their processors; the scheduler's own ticks count for more in short turns


@dataclass(frozen=True)
class Case:
    """A device, and what its generator does."""

    name: str
    verb: str
    plan: dict[str, Any]
    unit: str
    flags: tuple[str, ...] = ()


def _net(name: str, **plan: Any) -> Case:
    return Case(name, "net", plan, "Mpps")


def _null(depth: int) -> Case:
    return Case(f"null-{depth}", "blk", {"depth": depth}, "MIOPS", ("--null", "1T"))


CASES = (
    _net("64B-split", touch="HEADER"),
    _net("64B-packed", touch="HEADER", layout="packed"),
    _net("1500B", touch="FRAME", sizes=(1500,)),
    _null(1),
    _null(16),
)


@dataclass(frozen=True)
class Turn:
    """The last 0.25 s of a turn: millions of packets or requests a second, and how much of
    their processors device and generator had."""

    rate: float
    device_share: float = 1.0
    generator_share: float = 1.0

    @property
    def is_calm(self) -> bool:
        """Both had their processors to themselves."""
        return min(self.device_share, self.generator_share) >= UNDISTURBED


Turns = tuple[Turn, ...]  # of A and B, one after the other


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Row:
    """What a case gave. `ratio` is B's rate by A's; cycles are of all turns together."""

    case: str
    unit: str
    a: Spread
    b: Spread
    ratio: Spread
    a_cycles: float | None
    b_cycles: float | None
    pairs: int  # of turns that count
    undisturbed: bool  # those that were not have been left out, if there were enough others


Work = tuple[int, int]  # ticks of a device's processor, and what it did in them
Works = tuple[Work, ...]  # of A and B


def row_of(case: Case, turns: Sequence[Turns], wanted: int, work: Sequence[Works]) -> Row:
    """`work` is from each start to its end."""
    calm = [pair for pair in turns if all(turn.is_calm for turn in pair)]
    undisturbed = len(calm) >= max(wanted // 2, 1)
    used = calm if undisturbed else [pair for pair in turns if all(turn.rate for turn in pair)]
    if not used:
        raise RuntimeError(f"{case.name}: nothing was done in {len(turns)} turns of each")
    return Row(
        case.name,
        case.unit,
        Spread.of([a.rate for a, _ in used]),
        Spread.of([b.rate for _, b in used]),
        Spread.of([b.rate / a.rate for a, b in used]),
        _cycles([a for a, _ in work]),
        _cycles([b for _, b in work]),
        len(used),
        undisturbed,
    )


def _cycles(work: Sequence[Work]) -> float | None:
    ticks, items = (sum(each) for each in zip(*work, strict=True))
    return ticks / items if items else None


def measure(case: Case, trees: Sequence[Path], wanted: int) -> Row:
    """Both builds in turns, started several times."""
    turns: list[Turns] = []
    work = []
    for start in range(STARTS):
        enough = wanted * (start + 1) // STARTS - wanted * start // STARTS
        if enough:
            # Whoever comes first, at the start and in a turn, changes: it favours nobody.
            in_turn = 1 if start % 2 == 0 else -1
            more, done = _from_start_to_end(case, trees[::in_turn], enough)
            turns += [pair[::in_turn] for pair in more]
            work.append(done[::in_turn])
    return row_of(case, turns, wanted, work)


def _from_start_to_end(case: Case, trees: Sequence[Path], wanted: int) -> tuple[list[Turns], Works]:
    """Until so many pairs of turns were undisturbed, or too many were not."""
    turns: list[Turns] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bb")))
        a, b = [
            stack.enter_context(Pair(folder, name, tree, case.verb, case.flags, case.plan))
            for name, tree in zip("ab", trees, strict=True)
        ]
        calm = 0
        while calm < wanted and len(turns) < RETRIES * wanted:
            order = (a, b) if len(turns) % 2 == 0 else (b, a)
            figures = {pair: Turn(**pair.turn()) for pair in order}
            turns.append((figures[a], figures[b]))
            calm += figures[a].is_calm and figures[b].is_calm
        for pair in (a, b):
            pair.device.resume()
        time.sleep(WARMUP_S)
        return turns, (a.work(), b.work())


def table(rows: Sequence[Row], a: str, b: str) -> str:
    """For people."""
    lines = [f"A: {a}, B: {b}", f"{'':12}{'A':>16}{'B':>16}   {'B / A':22}cycles A, B"]
    for row in rows:
        ratio = f"{row.ratio.median:.3f} ({row.ratio.low:.3f}..{row.ratio.high:.3f})"
        cycles = ", ".join(
            "-" if each is None else f"{each:.1f}" for each in (row.a_cycles, row.b_cycles)
        )
        rates = "".join(
            f"{f'{each.median:.2f} {row.unit}':>16}" for each in (row.a, row.b)
        )  # fmt: skip
        note = "" if row.undisturbed else "   disturbed"
        lines.append(f"{row.case:12}{rates}   {ratio:22}{cycles}{note}")
    return "\n".join(lines)


def main() -> None:
    options = _options()
    named = [(option, option or "this tree") for option in (options.a, options.b)]
    trees = [tree_of(revision) for revision, _ in named]
    rows = []
    for case in CASES:
        if not options.case or case.name in options.case:
            print(f"{case.name} ...", file=sys.stderr)
            rows.append(measure(case, trees, options.turns))
    if options.json:
        print(json.dumps({"a": named[0][1], "b": named[1][1], "rows": list(map(asdict, rows))}))
    else:
        print(table(rows, named[0][1], named[1][1]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.builds", description="Two builds of vhostpy in turns."
    )
    names = [case.name for case in CASES]
    parser.add_argument("--a", default="", metavar="REVISION", help="default: this tree")
    parser.add_argument("--b", default="", metavar="REVISION", help="default: this tree")
    parser.add_argument("--case", nargs="*", metavar="CASE", choices=names, help=", ".join(names))
    parser.add_argument("--turns", type=int, default=TURNS, help="of each (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
