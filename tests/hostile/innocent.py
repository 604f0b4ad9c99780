"""Those who must not notice: two guests that exchange frames, and one that uses a disk.

All content is random and is checked where it arrives; what is lost or late is counted.
`python -m tests.hostile.innocent DIRECTORY` is the process (its own, so that no attacker
slows it down more than the machine does), `Innocent` starts and asks it.
"""

import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.backends.netguest import MODERN, frame, mac
from vhostpy.frontend.frontend import FrontEnd

EVERYTHING = (1 << 24) - 1
LATE_S = 2.0  # what has not come after that is lost
BUFFER = 2048
HEADER = 12


class Station:
    """One guest on a port, with checked frames in and out."""

    def __init__(self, path: str, number: int, *, poll: bool = False) -> None:
        self.mac, self.peer = mac(number), mac(number ^ 1)
        self.guest = FrontEnd(path)
        self.guest.negotiate(MODERN, EVERYTHING)
        self.guest.set_mem_table()
        self.inward = self.guest.start_queue(0, 256, poll=poll)
        self.outward = self.guest.start_queue(1, 256, poll=poll)
        self.places: dict[int, int] = {}
        self.slots = [self.guest.allocate(4096 + HEADER) for _ in range(32)]
        self.foreign = 0
        self._post([self.guest.allocate(BUFFER) for _ in range(255)])

    def _post(self, places: Sequence[int]) -> None:
        for place in places:
            self.places[self.inward.ring.add([], [(place, BUFFER)])] = place
        self.inward.ring.kick()

    def send(self, frames: Sequence[bytes]) -> None:
        """Sends them, and waits until they have been taken."""
        for place, data in zip(self.slots, frames, strict=False):
            self.guest.memory.write(place, bytes(HEADER) + data)
            self.outward.ring.add([(place, HEADER + len(data))], [])
        self.outward.ring.kick()
        self.outward.wait_used(len(frames), timeout_s=20)

    def receive(self) -> list[bytes]:
        """Frames for this station that are here by now."""
        used = self.inward.ring.used()
        frames, free = [], []
        while used:
            data, count = b"", 1
            while count:
                (ident, length), *used = used
                place = self.places.pop(ident)
                free.append(place)
                data += self.guest.memory.read(place, length)
                if data and count == 1 and len(data) == length:
                    count = struct.unpack_from("<H", data, 10)[0]
                count -= 1
            if data[HEADER : HEADER + 12] == self.mac + self.peer:
                frames.append(data[HEADER:])
            else:
                self.foreign += 1
        if free:
            self._post(free)
        return frames

    def wait(self) -> None:
        if not self.inward.ring.arm():
            self.inward.wait(0.01)


class Worker(threading.Thread):
    """Does `step` again and again; keeps count."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self.done = self.lost = 0
        self.slowest_s = 0.0
        self.failure = ""
        self.dice = random.Random(1)
        self.prepare(directory)

    def prepare(self, directory: Path) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            while True:
                start = time.monotonic()
                self.step()
                self.slowest_s = max(self.slowest_s, time.monotonic() - start)
                time.sleep(0.001)
        except BaseException:
            self.failure = traceback.format_exc()


class Pair(Worker):
    """Bursts of frames from one station to the other, and back."""

    def prepare(self, directory: Path) -> None:
        self.stations = [Station(str(directory / f"good{i}"), 0xA0 + i) for i in range(2)]
        self.tag = 0

    def step(self) -> None:
        sender, receiver = self.stations
        self.stations.reverse()
        sizes = [self.dice.choice([60, 200, 1514, 4000]) for _ in range(self.dice.randrange(1, 17))]
        sent = []
        for size in sizes:
            self.tag = (self.tag + 1) % (1 << 32)
            sent.append(frame(receiver.mac, sender.mac, size, self.tag))
        sender.send(sent)
        missing = list(sent)
        deadline = time.monotonic() + LATE_S
        while missing:
            for data in receiver.receive():
                # In order: whatever stands before it in the queue was lost.
                if data not in missing:
                    raise AssertionError(f"{data[:64].hex()} came, {missing[0][:64].hex()} was due")
                self.lost += missing.index(data)
                del missing[: missing.index(data) + 1]
                self.done += 1
            if missing:
                if time.monotonic() > deadline:
                    self.lost += len(missing)
                    break
                receiver.wait()


class DiskUser(Worker):
    """Writes blocks and reads them back."""

    def prepare(self, directory: Path) -> None:
        self.guest = FrontEnd(str(directory / "gooddisk"))
        self.guest.negotiate(MODERN, EVERYTHING)
        self.guest.set_mem_table()
        self.queue = self.guest.start_queue(0, 16)
        self.header, self.buffer, self.status = (self.guest.allocate(4096) for _ in range(3))

    def step(self) -> None:
        sector, block = self.dice.randrange(1000), os.urandom(512)
        self._request(1, sector, block)
        back = self._request(0, sector, bytes(512))
        if back != block:
            raise AssertionError(f"sector {sector}: {back[:32].hex()}, not {block[:32].hex()}")
        self.done += 1

    def _request(self, kind: int, sector: int, block: bytes) -> bytes:
        memory = self.guest.memory
        memory.write(self.header, struct.pack("<IIQ", kind, 0, sector))
        memory.write(self.buffer, block)
        data = [(self.buffer, 512)]
        readable, writable = (data, []) if kind else ([], data)
        self.queue.ring.add([(self.header, 16), *readable], [*writable, (self.status, 1)])
        self.queue.ring.kick()
        self.queue.wait_used(timeout_s=20)
        if memory.read(self.status, 1) != b"\0":
            raise AssertionError("the disk answered with an error")
        return memory.read(self.buffer, 512)


def run(directory: Path) -> None:
    """Answers each line on stdin with a report on stdout."""
    workers = [Pair(directory), DiskUser(directory)]
    for worker in workers:
        worker.start()
    for _ in sys.stdin:
        pair, disk = workers
        report = {
            "frames": pair.done,
            "lost": pair.lost,
            "foreign": sum(station.foreign for station in pair.stations),
            "blocks": disk.done,
            "slowest_s": max(worker.slowest_s for worker in workers),
            "failure": pair.failure or disk.failure,
        }
        for worker in workers:
            worker.slowest_s = 0.0
        print(json.dumps(report), flush=True)


class Innocent:
    """That process, from outside."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.innocent", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.goes_on()

    def report(self) -> dict[str, Any]:
        """What they have moved so far, and how long the slowest burst or block took since."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("report\n")
        self.process.stdin.flush()
        report: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert not report["failure"], report["failure"]
        return report

    def goes_on(self, frames: int = 20, blocks: int = 3, deadline_s: float = 30) -> dict[str, Any]:
        """Waits until they have moved so much more."""
        start = report = self.report()
        slowest_s = 0.0
        end = time.monotonic() + deadline_s
        while (
            report["frames"] < start["frames"] + frames
            or report["blocks"] < start["blocks"] + blocks
        ):
            assert time.monotonic() < end, f"from {start} to {report} in {deadline_s} s"
            time.sleep(0.005)
            report = self.report()
            slowest_s = max(slowest_s, report["slowest_s"])
        return report | {"slowest_s": max(slowest_s, report["slowest_s"])}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
