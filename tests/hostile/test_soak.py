"""Random attacks for a while: rings, chains, messages, memory, with a thread that flips.

What it looks for is what nobody thought of: the process dies, a ring hangs, the innocent
notice, a byte of a guest that only shares its memory changes, or something is left behind.
The long ones are in pieces of some minutes, each with seeds of its own: `-k 'chains and 7'`
runs one of them again.
"""

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.chaos import TARGETS, Chaos
from tests.hostile.conftest import Place, place_of
from tests.hostile.victim import victim
from tests.rings import LAYOUTS

CHAINS, MESSAGES = 10_000_000, 1_000_000
CHAIN_PIECES, MESSAGE_PIECES = 10, 4
TURN_S = 1.0
TURNS = 30  # at least
PIECE_S = 540.0
# Of an innocent pair beside the attacker, by the same with the attacker at another process.
RATE = 0.9
LONGER_S = 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_attacks_for_a_few_seconds(place, layout):
    with place.unnoticed(may_lose=True, bound_s=10), Chaos() as chaos:
        done = chaos.attack(place.victim.directory, seed=LAYOUTS.index(layout), seconds=4,
                            layout=layout)  # fmt: skip
    assert done["sessions"] >= len(TARGETS)
    assert done["chains"] > 1000
    assert done["messages"] > 100


class Turns:
    """The innocent of one process, while an attacker is there, or at another one."""

    def __init__(self, place: Place, other: Path, chaos: Chaos, kind: str) -> None:
        self.place, self.other, self.chaos, self.kind = place, other, chaos, kind
        self.rates: list[tuple[float, float]] = []
        self.longest_s = [0.0, 0.0]

    def pair(self, seed: int) -> dict[str, int]:
        """The same attack in each place; what was done to the one of the innocent."""
        here = self._turn(0, self.place.victim.directory, seed)
        there = self._turn(1, self.other, seed)
        self.rates.append((here.pop("rate"), there["rate"]))
        return here

    def _turn(self, which: int, directory: Path, seed: int) -> dict[str, Any]:
        before, since_s = self.place.report(), time.monotonic()
        done: dict[str, Any] = self.chaos.attack(
            directory, seed=seed, seconds=TURN_S, kind=self.kind
        )
        after, spent_s = self.place.report(), time.monotonic() - since_s
        self.longest_s[which] = max(self.longest_s[which], after["slowest_s"])
        assert after["blocks"] > before["blocks"]
        return done | {"rate": (after["frames"] - before["frames"]) / spent_s}

    def judge(self) -> None:
        """Neighbouring turns are compared: what else a machine does is in both."""
        ratio = statistics.median(here / there for here, there in self.rates)
        here, there = (statistics.median(rates) for rates in zip(*self.rates, strict=True))
        print(
            f"{len(self.rates)} turns: {here:.0f} frames/s beside the attacker, {there:.0f} apart, "
            f"ratio {ratio:.3f}; longest waits {self.longest_s} s"
        )
        assert ratio >= RATE
        assert self.longest_s[0] <= self.longest_s[1] + LONGER_S


def soak(directory: Path, kind: str, seed: int, wanted: int) -> None:
    """One piece: so many chains or messages for one process, as many for another one."""
    with ExitStack() as stack:
        (here := directory / "here").mkdir()
        (there := directory / "there").mkdir()
        place = stack.enter_context(place_of(here))
        stack.enter_context(victim(there))
        chaos = stack.enter_context(Chaos())
        stack.enter_context(place.unnoticed(may_lose=True, bound_s=10))
        turns = Turns(place, there, chaos, kind)
        end = time.monotonic() + PIECE_S
        count = 0
        while count < wanted or len(turns.rates) < TURNS:
            count += turns.pair(seed)[kind]
            assert place.canary.changed() == 0
            assert time.monotonic() < end, f"{count} of {wanted} {kind}: the machine is too slow"
            seed += 1
        turns.judge()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("piece", range(CHAIN_PIECES))
def test_ten_million_corrupt_chains(tmp_path, piece):
    soak(tmp_path, "chains", 1000 * piece, CHAINS // CHAIN_PIECES)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("piece", range(MESSAGE_PIECES))
def test_a_million_mutated_messages(tmp_path, piece):
    soak(tmp_path, "messages", 1000 * piece, MESSAGES // MESSAGE_PIECES)
