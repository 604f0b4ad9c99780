"""The victim and the innocent, once for all tests over a socket."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.hostile.attacker import Attacker
from tests.hostile.canary import Canary
from tests.hostile.innocent import LATE_S, Innocent
from tests.hostile.victim import Victim, eventually, victim

# Two busy cores: a process may not get one for a while. Whoever hangs for long is noticed; what
# an attacker may cost is judged in turns, by the soaks.
BOUND_S = 1.0


@dataclass
class Place:
    """Where attacks happen."""

    victim: Victim
    innocent: Innocent
    canary: Canary

    @contextlib.contextmanager
    def unnoticed(self, *, may_lose: bool = False, bound_s: float = BOUND_S) -> Iterator[None]:
        """The innocent lose nothing meanwhile and wait for nothing longer than the bound, not
        a byte of the canary changes; when the attackers have gone, the victim holds what it
        held before."""
        if may_lose:
            bound_s += LATE_S  # until a frame counts as lost
        before = self.victim.footprint()
        start = self.innocent.report()
        yield
        end = self.innocent.goes_on()
        assert may_lose or end["lost"] == start["lost"]
        assert end["slowest_s"] < bound_s
        assert self.victim.process.poll() is None
        assert self.canary.changed() == 0
        eventually(
            lambda: all(n <= before[kind] for kind, n in self.victim.footprint().items()),
            f"{before}, as before the attack; {self.victim.footprint()} now",
            5,
        )

    @contextlib.contextmanager
    def one_error(self, *words: str) -> Iterator[None]:
        """One session ends with an error that has these words."""
        before = len(self.victim.ends())
        yield
        eventually(lambda: len(self.victim.ends()) > before, f"an error about {words}")
        assert len(self.victim.ends()) == before + 1
        for word in words:
            assert word in self.victim.ends()[-1]

    def path(self, name: str) -> str:
        return self.victim.path(name)

    def report(self) -> dict[str, Any]:
        return self.innocent.report()


@contextlib.contextmanager
def place_of(directory: Any, ports: int = 3) -> Iterator[Place]:
    with victim(directory, ports) as target:
        with Attacker(target.path("badfile")) as first:
            assert first.request() == 0  # a file's threads are there from then on
        innocent = Innocent(directory)
        try:
            with Canary(target.path("canary")) as canary:
                yield Place(target, innocent, canary)
                innocent.goes_on()
                assert canary.changed() == 0
        finally:
            innocent.close()


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place_of(tmp_path_factory.mktemp("attack")) as made:
        yield made
