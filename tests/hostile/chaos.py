"""Random attacks on processes of ours: rings, chains, messages, memory, all at once.

`python -m tests.hostile.chaos` is an attacker of its own; it does what each line on its
stdin asks for, and answers with what it has done. The same seed makes the same choices;
what meets them at which moment is up to the machine. `Chaos` is it from outside.
"""

import contextlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tests.flipper import Flipper
from tests.hostile.attacker import BORDER, EVERYTHING, FEATURES, GOOD, Attacker, eventfd
from tests.hostile.test_messages import conversation, memory_file
from tests.rings import (
    AVAIL,
    AVAILABLE,
    DESC,
    END,
    GPA,
    IS_USED,
    LAYOUTS,
    NEXT,
    RING_PACKED,
    TABLES,
    USED,
)
from vhostpy._spec import Feature
from vhostpy.errors import VhostpyError
from vhostpy.frontend.frontend import FrontEnd, Queue
from vhostpy.ring.parts import first_base
from vhostpy.system.fds import OwnedFd

TARGETS = [("bad0", 0), ("bad1", 1), ("bad2", 1), ("badram", 0), ("badfile", 0)]
BUFFERS = [GOOD, GOOD, GOOD + 5, GOOD + 16, BORDER - 8, BORDER - 100]
NOWHERE = [END - 8, 0, GPA - 8, 2**64 - 16, 2**63]
RINGS = [TABLES, TABLES + 32, DESC, AVAIL, USED, USED + 2]
LENGTHS = [1, 8, 12, 16, 16, 20, 32, 48, 64, 512, 1024, 2048, 4096, 0, 65535, 1 << 20, 2**32 - 1]
FLAGS = [0, 0, 0, 0, 1, 2, 2, 3, 4, 5, 7]
SIZE = 64
BURSTS = 200  # of one session
REGION = 4 << 20
EDGE_KICKS = 500
PATIENCE_S = 0.003  # for what the device may never answer
TALKS = 20  # after a session, where both are wanted
# Any six bytes of it are a station's address: what happens to be a frame is for a port of
# the attackers, and floods nobody. What a ring holds may be for everybody, and is seldom sent.
OWN = b"\x02" * 8192


@dataclass
class Done:
    """What was done to a process. Chains are those that came back, or broke their ring."""

    chains: int = 0
    messages: int = 0
    sessions: int = 0
    bursts: int = 0
    breaks: int = 0
    hung: int = 0


class Target:
    """One attacker after the other on one socket."""

    def __init__(self, path: str, index: int, seed: str, layout: str, flips: bool) -> None:
        self.path, self.index, self.flips = path, index, flips
        self.layouts = [layout] if layout else LAYOUTS
        self.dice = random.Random(seed)
        often = 60 if index % 2 else 1  # a transmit queue
        self.addresses = [*BUFFERS * often, *NOWHERE * often, *RINGS]
        self.done = Done()
        self.failure = ""
        self.until = 0.0

    def run(self, kind: str, until: float) -> None:
        self.until = until
        try:
            while time.monotonic() < until:
                if kind != "messages":
                    edge = not self.done.sessions or self.dice.random() < 0.3
                    edge &= self.flips and "packed" in self.layouts
                    self.edge() if edge else self.session()
                for _ in range(TALKS if kind != "chains" else 0):
                    self.talk()
        except BaseException:
            self.failure = traceback.format_exc()

    def talk(self) -> None:
        """A conversation with mutations."""
        with (
            contextlib.suppress(OSError),
            FrontEnd(self.path, timeout_s=20) as end,
            memory_file() as memory,
        ):
            for wire, count in conversation(self.dice):
                eventfds = [OwnedFd(os.eventfd(0)) for _ in range(count)]
                end.send_raw(wire, [memory] * count if wire[0] in (5, 6, 37) else eventfds)
                self.done.messages += 1
                for fd in eventfds:
                    fd.close()

    def session(self) -> None:
        features = FEATURES | self.dice.randrange(2) << Feature.EVENT_IDX
        layout = self.dice.choice(self.layouts)
        features |= (self.dice.random() < 0.2) << Feature.IN_ORDER
        self.done.sessions += 1
        with (
            contextlib.suppress(OSError, VhostpyError),
            Attacker(self.path, self.index, features=features, size=SIZE, kind=layout) as attacker,
        ):
            attacker.memory.write(BORDER - 4096, OWN + OWN)
            words = self.flipped(attacker) if self.flips else []
            with Flipper(*words) if words else contextlib.nullcontext():
                for _ in range(BURSTS):
                    self.burst(attacker)
                    if time.monotonic() > self.until:
                        break

    def edge(self) -> None:
        """A ring at the end of all memory, of one chain whose head is flipped: a step out of
        the ring would be one into somebody else's memory."""
        size, self.done.sessions = 1024, self.done.sessions + 1
        desc, buffer = GPA + REGION - 16 * size, GPA + 8192
        features = FEATURES | RING_PACKED | self.dice.randrange(2) << Feature.IN_ORDER
        chain = struct.pack("<QIHH", buffer, 8, 1, NEXT) * (size - 1)
        chain += struct.pack("<QIHH", buffer, 8, 1, 0)
        heads = [8 | 1 << 32 | (NEXT | owner) << 48 for owner in (AVAILABLE, IS_USED)]
        with (
            contextlib.suppress(OSError, VhostpyError),
            FrontEnd(self.path, timeout_s=20, layout=((GPA, REGION),)) as end,
        ):
            end.negotiate(features, EVERYTHING)
            end.set_mem_table()
            fds = [eventfd() for _ in range(3)]
            queue = Queue(self.index, size, end.features, desc, GPA, GPA + 4096, None, *fds)
            end.queues[self.index] = queue
            end.memory.write(buffer, OWN[:4096])
            end.memory.write(GPA, struct.pack("<HH", 0, 1))  # no calls wanted
            with Flipper((end.memory, desc + 8, *heads)):
                for kick in range(EDGE_KICKS):
                    if kick % 10 == 0:
                        if kick:
                            self.done.breaks += queue.wait_err(0)
                            end.stop_queue(self.index)
                        end.memory.write(desc, chain)
                        end.announce(queue, base=first_base(end.features))
                    os.eventfd_write(fds[0].fileno(), 1)
                    time.sleep(0.002)
                    if time.monotonic() > self.until:
                        break

    def flipped(self, attacker: Attacker) -> list[tuple[Any, int, int, int]]:
        """What a second vCPU writes all the while."""
        if not attacker.packed:
            heads = (1 | 2 << 16 | 3 << 32, 4 | 65535 << 16)
            return [(attacker.memory, AVAIL + 8, *heads), (attacker.memory, DESC + 24, 8, 1 << 32)]
        slots = self.dice.sample(range(SIZE), 2)
        both = [8 | (NEXT | owner) << 48 for owner in (AVAILABLE, IS_USED)]
        return [(attacker.memory, DESC + 16 * slot + 8, *both) for slot in slots]

    def burst(self, attacker: Attacker) -> None:
        self.done.bursts += 1
        self.change(attacker)
        if self.dice.random() < 0.3:
            attacker.memory.write(TABLES, self.table(False, 0))
        came = self.offer_packed(attacker) if attacker.packed else self.offer_split(attacker)
        self.done.chains += came
        if came < SIZE // 4:
            self.restart(attacker)

    def table(self, packed: bool, round_: int) -> bytes:
        """Descriptors of any kind."""
        dice = self.dice
        owner = IS_USED if round_ else AVAILABLE
        parts = []
        for i in range(SIZE):
            flags, link = dice.choice(FLAGS), dice.choice([i + 1, i + 1, dice.randrange(SIZE), 64])
            words = (i, flags | owner) if packed else (flags, link)
            parts.append(
                struct.pack("<QIHH", dice.choice(self.addresses), dice.choice(LENGTHS), *words)
            )
        return b"".join(parts)

    def change(self, attacker: Attacker) -> None:
        dice, ring = self.dice, attacker.ring
        roll = dice.random()
        if roll < 0.02 and not attacker.packed:
            attacker.offer(jump=dice.choice([1, 64, 65, 32768, 65535]))
        elif roll < 0.02:
            attacker.break_ring()
        elif roll < 0.03:
            os.ftruncate(attacker.end.shared.fd.fileno(), dice.choice([0, 1 << 20, 2 << 20]))
        elif roll < 0.05:
            ring.put_u16(USED + 2, dice.randrange(65536))
            ring.put_u16(AVAIL, dice.randrange(2))
        elif roll < 0.07:
            self.restart(attacker)
        elif roll < 0.09:
            region = dice.choice(attacker.end.shared.regions)
            attacker.end.rem_mem_reg(region)
            attacker.end.add_mem_reg(region)
        elif roll < 0.11:
            attacker.end.enable(self.index, bool(dice.randrange(2)))

    def offer_split(self, attacker: Attacker) -> int:
        """A ring of chains; how many came back."""
        memory, ring = attacker.memory, attacker.ring
        memory.write(DESC, self.table(False, 0))
        heads = [self.dice.randrange(SIZE + (self.dice.random() < 0.001)) for _ in range(SIZE)]
        memory.write(AVAIL + 4, struct.pack(f"<{SIZE}H", *heads))
        before = ring.used_idx
        ring.put_u16(AVAIL + 2, (before + SIZE) % 65536)
        attacker.kick()
        return self.wait(lambda: min((ring.used_idx - before) % 65536, SIZE))

    def offer_packed(self, attacker: Attacker) -> int:
        """The same; of those that came back by one used descriptor, as one."""
        memory, ring = attacker.memory, attacker.ring
        position = ring.next % SIZE
        round_ = ring.next // SIZE & 1
        table = self.table(True, round_)
        memory.write(DESC + 16 * position, table[16 * position :])
        if position:
            later = self.table(True, round_ ^ 1)
            memory.write(DESC, later[: 16 * position])
        ring.next += SIZE
        attacker.kick()

        def used() -> int:
            """Such descriptors have both flags alike."""
            flags = struct.unpack("<" + "14xH" * SIZE, memory.read(DESC, 16 * SIZE))
            return sum((each >> 7 ^ each >> 15) & 1 == 0 for each in flags)

        return self.wait(used)

    def wait(self, came: Any) -> int:
        """Until all have come back, or no more do."""
        before, end = -1, time.monotonic() + PATIENCE_S
        while (count := came()) < SIZE and time.monotonic() < end:
            if count != before:
                before, end = count, time.monotonic() + PATIENCE_S
            time.sleep(0)
        self.done.hung += count < SIZE
        return int(count)

    def restart(self, attacker: Attacker) -> None:
        """A ring that was broken, as most are by now, starts anew."""
        self.done.breaks += attacker.queue.wait_err(0)
        base = attacker.end.stop_queue(self.index)
        if not attacker.packed:
            for at in (AVAIL + 2, USED + 2):
                attacker.ring.put_u16(at, base)
        attacker.ring.restart(base)
        attacker.start(base)


def attack(
    directory: str, seed: int, seconds: float, kind: str = "both", layout: str = "",
    flips: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """All targets at once for a while; what was done to them."""
    flipping = seed % len(TARGETS)  # one: there are not so many processors
    targets = [
        Target(str(Path(directory, name)), index, f"{seed} {name}", layout,
               flips and number == flipping)
        for number, (name, index) in enumerate(TARGETS)
    ]  # fmt: skip
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=each.run, args=(kind, until)) for each in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total: dict[str, Any] = dict.fromkeys(asdict(Done()), 0)
    for each in targets:
        total = {name: total[name] + count for name, count in asdict(each.done).items()}
    return total | {"failure": "".join(each.failure for each in targets)}


class Chaos:
    """That process, from outside."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.chaos"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def attack(self, directory: Path, **options: Any) -> dict[str, int]:
        """See `attack`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"directory": str(directory), **options}) + "\n")
        self.process.stdin.flush()
        done: dict[str, Any] = json.loads(self.process.stdout.readline())
        failure = done.pop("failure")
        assert not failure, failure
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


if __name__ == "__main__":
    # A guest has processors of its own: what it takes of ours is not the question.
    os.nice(10)
    for line in sys.stdin:
        print(json.dumps(attack(**json.loads(line))), flush=True)
