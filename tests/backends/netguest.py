"""A guest's end of a net port, for tests: memory, rings, frames in and out."""

import os
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest

from vhostpy._ring import DriverVirtqueue, Virtqueue
from vhostpy._spec import Feature
from vhostpy.backends.net.device import NetDevice
from vhostpy.memory.guest import GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping
from vhostpy.runtime.pool import Workers
from vhostpy.vswitch.switch import Switch

UVA = 0x7F00_0000_0000
PAGE = 4096

VERSION_1 = 1 << Feature.VERSION_1
MRG_RXBUF = 1 << Feature.NET_MRG_RXBUF
EVENT_IDX = 1 << Feature.EVENT_IDX
INDIRECT = 1 << Feature.INDIRECT_DESC
MODERN = VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT
LEGACY = INDIRECT | EVENT_IDX
PACKED = MODERN | 1 << Feature.RING_PACKED
IN_ORDER = 1 << Feature.IN_ORDER

LONGEST = 65535 + 14 + 8  # an IPv4 packet behind two VLAN tags

each_form = pytest.mark.parametrize(
    "features",
    [
        *(MODERN, VERSION_1 | INDIRECT, LEGACY, LEGACY | MRG_RXBUF),
        *(PACKED, MODERN | IN_ORDER, PACKED | IN_ORDER),
    ],
    ids=[
        *("modern", "not_mergeable", "legacy", "legacy_mergeable"),
        *("packed", "split_in_order", "packed_in_order"),
    ],
)


def mac(number: int) -> bytes:
    """The address of station `number`."""
    return b"\x02\x00\x00\x00" + number.to_bytes(2, "big")


BROADCAST = b"\xff" * 6


def frame(to: bytes, source: bytes, size: int = 60, tag: int = 0) -> bytes:
    """An Ethernet frame of `size` bytes whose payload depends on `tag`."""
    payload = tag.to_bytes(4, "big") + bytes((tag * 7 + i) & 0xFF for i in range(251))
    body = payload * (size // len(payload) + 1)
    return (to + source + b"\x88\xb5" + body)[:size]


def data(size: int, tag: int = 0) -> bytes:
    """A frame from station 0 to station 1."""
    return frame(mac(1), mac(0), size, tag)


def memory_of(size: int, regions: int = 1) -> GuestMemory:
    """Sparse shared memory at GPA 0, in `regions` adjacent regions."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        part = size // regions
        return GuestMemory(
            RegionInfo(part * i, part, UVA + part * i, Mapping(fd, part * i, part))
            for i in range(regions)
        )
    finally:
        os.close(fd)


def device(pairs: int = 1, workers: int = 1, **more) -> NetDevice:
    """One on a switch of its own."""
    return NetDevice("vu0", Switch(Workers(workers)), pairs=pairs, **more)


class Guest:
    """The driver of one NetDevice, its rings in memory of its own."""

    def __init__(
        self,
        device: NetDevice,
        *,
        features: int = MODERN,
        pairs: int = 1,
        size: int = 256,
        memory_bytes: int = 64 << 20,
        regions: int = 1,
        kick_fds: Sequence[int] = (),
        start: bool = True,
    ) -> None:
        self.device = device
        self.features = features
        self.pairs = pairs
        self.memory = memory_of(memory_bytes, regions)
        self.header_size = 12 if features & (VERSION_1 | MRG_RXBUF) else 10
        self._free = PAGE
        self.drivers: list[DriverVirtqueue] = []
        self.queues: list[Virtqueue] = []
        self.uvas: list[dict[str, int]] = []
        self.places: list[list[int]] = []  # of each ring's descriptors, avail, used
        self.posted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for index in range(2 * pairs):
            kick_fd = kick_fds[index // 2] if index & 1 and kick_fds else -1
            places = [self.allocate(n, PAGE) for n in DriverVirtqueue.ring_bytes(size)]
            self.places.append(places)
            names = ("desc", "avail", "used")
            gpas = {f"{name}_gpa": gpa for name, gpa in zip(names, places, strict=True)}
            uvas = {f"{name}_uva": UVA + gpa for name, gpa in zip(names, places, strict=True)}
            self.drivers.append(
                DriverVirtqueue(self.memory, size, features, kick_fd=kick_fd, **gpas)
            )
            self.uvas.append(uvas)
            self.queues.append(Virtqueue(self.memory, size, features, **uvas))
        if start:
            self.start(kick_fds)

    def start(self, kick_fds: Sequence[int] = ()) -> None:
        """Hands all rings to the device, enabled."""
        self.device.opened()
        self.device.negotiated(self.features)
        for index, queue in enumerate(self.queues):
            self.device.ring_started(index, queue, kick_fds[index // 2] if kick_fds else -1)
            self.device.ring_enabled(index, True)
            queue.set_live(True)
        self.device.workers.nudge()

    def stop(self) -> None:
        """Takes all rings back and goes."""
        for index, queue in enumerate(self.queues):
            queue.set_live(False)
            self.device.workers.wait()
            self.device.ring_stopped(index)
        self.device.closed()

    def hold(self, index: int) -> Virtqueue:
        """Takes a ring back for a change; let it go with set_live(True)."""
        self.queues[index].set_live(False)
        self.device.workers.wait()
        return self.queues[index]

    def restart(self, index: int) -> None:
        """Stops a ring and lets it go on where it stopped, as GET_VRING_BASE tells."""
        old = self.hold(index)
        self.device.ring_stopped(index)
        queue = Virtqueue(
            self.memory, old.size, self.features, base=old.base, **self.uvas[index]
        )
        self.queues[index] = queue
        self.device.ring_started(index, queue, -1)
        self.device.ring_enabled(index, True)
        queue.set_live(True)
        self.device.workers.nudge()

    def allocate(self, length: int, alignment: int = 16) -> int:
        """A free place in guest memory."""
        start = -(-self._free // alignment) * alignment
        self._free = start + length
        return start

    # Sending ------------------------------------------------------------------------

    def send(
        self,
        data: bytes,
        *,
        queue: int = 0,
        header: bytes | None = None,
        cuts: Iterable[int] = (),
        writable: Sequence[int] = (),
        indirect: bool = False,
    ) -> int:
        """Adds a frame behind its header, cut at these places of both; a chain's id."""
        data = (bytes(self.header_size) if header is None else header) + data
        edges = sorted({0, len(data), *(cut for cut in cuts if 0 < cut < len(data))})
        readable = []
        for start, end in pairwise(edges):
            gpa = self.allocate(end - start)
            self.memory.write(gpa, data[start:end])
            readable.append((gpa, end - start))
        parts = [(self.allocate(n), n) for n in writable]
        table = self.allocate(16 * (len(readable) + len(parts))) if indirect else None
        return self.drivers[2 * queue + 1].add(readable, parts, table)

    def kick(self, queue: int = 0) -> None:
        """Shows the device what was sent."""
        self.drivers[2 * queue + 1].kick()

    def sent(self, queue: int = 0) -> list[tuple[int, int]]:
        """Chains that came back from the transmit queue."""
        return self.drivers[2 * queue + 1].used()

    # Receiving ----------------------------------------------------------------------

    def post(
        self, *pieces: int, count: int = 1, queue: int = 0, readable: Sequence[int] = ()
    ) -> None:
        """Adds `count` receive buffers, each made of pieces of these lengths."""
        driver = self.drivers[2 * queue]
        for _ in range(count):
            where = [(self.allocate(n), n) for n in pieces]
            ident = driver.add([(self.allocate(n), n) for n in readable], where)
            self.posted[queue, ident] = where
        driver.kick()

    def post_bad(
        self,
        writable: Sequence[tuple[int, int]] = ((1 << 40, 2000),),
        *,
        readable: Sequence[tuple[int, int]] = (),
        queue: int = 0,
    ) -> None:
        """Adds a receive buffer that can't be written to: no memory is there, unless told."""
        ident = self.drivers[2 * queue].add(list(readable), list(writable))
        self.posted[queue, ident] = []
        self.drivers[2 * queue].kick()

    def used(self, queue: int = 0) -> list[tuple[bytes, int]]:
        """(content, used length) of receive buffers that came back."""
        result = []
        for ident, length in self.drivers[2 * queue].used():
            content = b"".join(self.memory.read(*p) for p in self.posted.pop((queue, ident)))
            assert length <= len(content)
            result.append((content[:length], length))
        return result

    def received(self, queue: int = 0) -> list[bytes]:
        """Frames that arrived; headers are checked."""
        frames = []
        buffers = [content for content, length in self.used(queue) if length]
        while buffers:
            first = buffers.pop(0)
            header, data = first[: self.header_size], first[self.header_size :]
            assert header[:10] == bytes(10)
            if self.header_size == 12:
                following = int.from_bytes(header[10:], "little") - 1
                assert 0 <= following <= len(buffers)
                assert following == 0 or self.features & MRG_RXBUF
                for _ in range(following):
                    data += buffers.pop(0)
            frames.append(data)
        return frames

    def counters(self, queue: int = 0) -> dict[str, int]:
        """The pair's counters, flat; without drops and faults that never happened."""
        flat = {}
        for name, value in self.device.status()["queues"][queue].items():
            if isinstance(value, dict):
                flat.update({k: v for k, v in value.items() if v})
            elif name != "index":
                flat[name] = value
        return flat

    def drops(self, queue: int = 0) -> dict[str, int]:
        """Reasons that happened."""
        drops = self.device.status()["queues"][queue]["drops"]
        return {name: count for name, count in drops.items() if count}


def guest(pairs: int = 1, **more) -> Guest:
    """One with a device on a switch of its own."""
    return Guest(device(pairs, workers=more.pop("workers", 1)), pairs=pairs, **more)
