"""Random attacks on one process for a while: rings, chains, messages, memory, at once.

What it looks for is what nobody thought of: the process dies, a ring hangs, the innocent
notice, or something is left behind. The seed is fixed; timing is not.
"""

import contextlib
import os
import random
import threading
import time

import pytest

from tests.hostile.attacker import BORDER, FEATURES, GOOD, Attacker
from tests.hostile.conftest import Place, place_of
from tests.hostile.test_messages import conversation, memory_file
from tests.rings import AVAIL, AVAILABLE, DESC, END, GPA, IS_USED, LAYOUTS, TABLES, USED
from vhostpy._spec import Feature
from vhostpy.errors import VhostpyError
from vhostpy.fds import OwnedFd
from vhostpy.frontend import FrontEnd

ADDRESSES = [GOOD, GOOD, GOOD + 5, BORDER - 8, BORDER - 100, END - 8, TABLES, TABLES + 32]
ADDRESSES += [DESC, AVAIL, USED, USED + 2, 0, GPA - 8, 2**64 - 16, 2**63]
LENGTHS = [1, 8, 12, 16, 16, 20, 32, 48, 64, 512, 1024, 2048, 4096, 0, 65535, 1 << 20, 2**32 - 1]
TARGETS = [("bad0", 0), ("bad1", 1), ("bad2", 1), ("badram", 0), ("badfile", 0)]
SIZE = 64


class Chaos:
    """One attacker after the other on one socket."""

    def __init__(self, place: Place, name: str, index: int, seed: int) -> None:
        self.place, self.name, self.index = place, name, index
        self.dice = random.Random(seed)
        self.chains = self.messages = self.sessions = self.hung = 0
        self.failure: BaseException | None = None

    def run(self, until: float) -> None:
        try:
            while time.monotonic() < until:
                self.session(until)
                if self.dice.random() < 0.3:
                    self.talk()
        except BaseException as error:
            self.failure = error

    def talk(self) -> None:
        """A conversation with mutations."""
        with (
            contextlib.suppress(OSError),
            FrontEnd(self.place.path(self.name), timeout_s=20) as end,
            memory_file() as memory,
        ):
            for wire, count in conversation(self.dice):
                eventfds = [OwnedFd(os.eventfd(0)) for _ in range(count)]
                end.send_raw(wire, [memory] * count if wire[0] in (5, 6, 37) else eventfds)
                self.messages += 1
                for fd in eventfds:
                    fd.close()

    def session(self, until: float) -> None:
        features = FEATURES | self.dice.randrange(2) << Feature.EVENT_IDX
        layout = self.dice.choice(LAYOUTS)
        self.sessions += 1
        with (
            contextlib.suppress(OSError, VhostpyError),
            Attacker(
                self.place.path(self.name), self.index, features=features, size=SIZE, kind=layout
            ) as attacker,
        ):
            for _ in range(self.dice.randrange(200)):
                self.step(attacker)
                if time.monotonic() > until:
                    break

    def step(self, attacker: Attacker) -> None:
        if attacker.queue.wait_err(0):
            self.start_again(attacker)  # what breaks a ring leaves nothing to attack
        for _ in range(self.dice.randrange(1, 10)):
            self.scribble(attacker)
        self.change(attacker)
        count = self.dice.randrange(1, 32)
        self.chains += count
        if attacker.packed:
            self.offer_packed(attacker, count)
        else:
            self.offer_split(attacker, count)

    def scribble(self, attacker: Attacker) -> None:
        dice = self.dice
        words = [  # next or id, and flags
            dice.choice([dice.randrange(SIZE), dice.randrange(8), 64, 65535]),
            dice.choice([0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 7]),
        ]
        if attacker.packed:
            words[1] |= dice.choice([0, AVAILABLE, IS_USED, AVAILABLE | IS_USED])
        else:
            words.reverse()
        table = dice.choice([DESC, DESC, DESC, TABLES])
        address, length = dice.choice(ADDRESSES), dice.choice(LENGTHS)
        attacker.ring.descriptor(dice.randrange(16), address, length, *words, table=table)

    def change(self, attacker: Attacker) -> None:
        dice, ring = self.dice, attacker.ring
        roll = dice.random()
        if roll < 0.02 and not attacker.packed:
            attacker.offer(jump=dice.choice([1, 64, 65, 32768, 65535]))
        elif roll < 0.02:
            attacker.break_ring()
        elif roll < 0.03 and not attacker.packed:
            attacker.offer(dice.choice([64, 65535]))
        elif roll < 0.04:
            os.ftruncate(attacker.end.shared.fd.fileno(), dice.choice([0, 1 << 20, 2 << 20]))
        elif roll < 0.06:
            ring.put_u16(USED + 2, dice.randrange(65536))
            ring.put_u16(AVAIL, dice.randrange(2))
        elif roll < 0.10:
            self.start_again(attacker)
        elif roll < 0.12:
            region = dice.choice(attacker.end.shared.regions)
            attacker.end.rem_mem_reg(region)
            attacker.end.add_mem_reg(region)
        elif roll < 0.14:
            attacker.end.enable(self.index, bool(dice.randrange(2)))

    def start_again(self, attacker: Attacker) -> None:
        base = attacker.end.stop_queue(self.index)
        for at in () if attacker.packed else (AVAIL + 2, USED + 2):
            attacker.ring.put_u16(at, base)
        attacker.ring.restart(base)
        attacker.start(base)

    def offer_split(self, attacker: Attacker, count: int) -> None:
        before = attacker.ring.used_idx
        attacker.offer(*[self.dice.randrange(16) for _ in range(count)])
        # They scribble over their own rings: some wait for nothing.
        end = time.monotonic() + 0.02
        while (attacker.ring.used_idx - before) % 65536 < count and time.monotonic() < end:
            time.sleep(0)
        self.hung += time.monotonic() >= end

    def offer_packed(self, attacker: Attacker, count: int) -> None:
        dice, ring = self.dice, attacker.ring
        for _ in range(count):
            pieces = [
                (dice.choice(ADDRESSES), dice.choice(LENGTHS), dice.choice([0, 0, 2, 2, 4, 6]))
                for _ in range(dice.choice([1, 1, 2, 3]))
            ]
            ring.offer_chain(*pieces, id=dice.choice([dice.randrange(SIZE), 64, 65535]))
        attacker.kick()
        end = time.monotonic() + 0.002 * count
        before = ring.seen
        while ring.seen - before < count and time.monotonic() < end:
            # What it has overwritten itself can't be told any more.
            with contextlib.suppress(KeyError, IndexError):
                ring.collect()
            time.sleep(0)


def soak(place: Place, seconds: float, seed: int) -> dict[str, int]:
    """All targets at once; what was done to them."""
    with place.unnoticed(may_lose=True, bound_s=10):
        start = place.report()
        chaos = [Chaos(place, *target, seed=seed + i) for i, target in enumerate(TARGETS)]
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=each.run, args=(until,)) for each in chaos]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in chaos:
            if each.failure is not None:
                raise each.failure
        end = place.report()
        # Content is checked where it arrives. Loss: the attackers flood each other.
        assert end["frames"] > start["frames"] + 10 * seconds
        assert end["blocks"] > start["blocks"] + 10 * seconds
    done = {
        name: sum(getattr(each, name) for each in chaos)
        for name in ("chains", "messages", "sessions", "hung")
    }
    assert done["sessions"] > len(TARGETS)
    assert done["chains"] > 1000
    assert done["hung"] < done["chains"] / 20
    return done


def test_random_attacks_for_a_few_seconds(place):
    print(soak(place, 8, 1))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_million_corrupt_chains(tmp_path):
    total = {"chains": 0, "messages": 0}
    with place_of(tmp_path) as place:
        seed = 100
        while total["chains"] < 10_000_000:
            done = soak(place, 60, seed)
            total = {name: total[name] + done[name] for name in total}
            seed += 10
            print(total)
