"""Both ends of one virtqueue, joined in one guest's memory: what ring tests stand on.

Guest, front-end and host addresses differ, the two ends map the memory apart, and it
is in two regions that touch for the guest only. `guest` writes what no driver would.
"""

import os
import struct
from collections.abc import Sequence
from typing import Any, Self

from vhostpy._ring import DriverVirtqueue, Virtqueue, sizes_of
from vhostpy.memory.guest import DirtyLog, GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping
from vhostpy.ring.inflight import InflightQueue

LAYOUTS = ["split", "packed"]
INDIRECT_DESC, EVENT_IDX, VERSION_1 = 1 << 28, 1 << 29, 1 << 32
RING_PACKED, IN_ORDER = 1 << 34, 1 << 35
NEXT, WRITE, INDIRECT, AVAILABLE, IS_USED = 1, 2, 4, 1 << 7, 1 << 15

GPA = 0x1_0000_0000
BORDER = GPA + (2 << 20)  # the regions touch here
END = GPA + (4 << 20)
UVA = 0x7F00_0000_0000
UVA_ABOVE = 0x7E00_0000_0000  # of the region above the border
CHUNK = 3000  # buffers lie at odd addresses, one of them across the border
CHUNKS = 500

DESC, AVAIL, USED, TABLES = GPA, GPA + (512 << 10), GPA + (640 << 10), END - (1 << 20)


def guest_memory(fd: int) -> GuestMemory:
    """What lies above the border comes first in the file: no host range crosses it."""
    return GuestMemory(
        [
            RegionInfo(GPA, 2 << 20, UVA, Mapping(fd, 2 << 20, 2 << 20)),
            RegionInfo(BORDER, 2 << 20, UVA_ABOVE, Mapping(fd, 0, 2 << 20)),
        ]
    )


def base_of(layout: str, size: int, count: int) -> int:
    """The base of a ring on which `count` descriptors were used."""
    if layout == "split":
        return count % 65536
    position = count % size | (0 if count // size & 1 else 1 << 15)
    return position << 16 | position


class Guest:
    """The guest's own view, with its hands free: raw descriptors, flags and indexes."""

    def __init__(self, memory: GuestMemory, size: int, base: int = 0) -> None:
        self.memory = memory
        self.size = size
        self.restart(base)

    def restart(self, base: int) -> None:
        """Goes on at `base`, whatever was before."""
        raise NotImplementedError

    def offer_chain(self, *pieces: tuple[int, int] | tuple[int, int, int], id: int = 0) -> None:
        """Offers (GPA, length, flags) pieces as a chain; NEXT is set on all but the last."""
        raise NotImplementedError

    def write_table(self, gpa: int, *pieces: tuple[int, int] | tuple[int, int, int]) -> int:
        """Writes an indirect table of the pieces; its size."""
        raise NotImplementedError

    def want_call_after(self, used_index: int, count: int) -> None:
        """Wants to be called when the device uses the descriptor `count` behind that."""
        raise NotImplementedError

    def collect(self) -> list[tuple[int, int]]:
        """(id, length) of what came back since the last time, without any check."""
        raise NotImplementedError

    def descriptor(
        self, index: int, gpa: int, length: int, flags: int = 0, next: int = 0, table: int = DESC
    ) -> None:
        packed = struct.pack("<QIHH", gpa, length, flags, next)
        self.memory.write(table + 16 * index, packed)

    def u16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def put_u16(self, gpa: int, value: int) -> None:
        self.memory.write(gpa, value.to_bytes(2, "little"))


class SplitGuest(Guest):
    """Descriptors anywhere in the table, avail entries that name them."""

    def restart(self, base: int) -> None:
        self.seen = self.used_idx

    def offer_chain(self, *pieces: tuple[int, int] | tuple[int, int, int], id: int = 0) -> None:
        for i, (gpa, length, *flags) in enumerate(pieces):
            more = NEXT if i + 1 < len(pieces) else 0
            index, next = (id + i) % self.size, (id + i + 1) % self.size
            self.descriptor(index, gpa, length, sum(flags) | more, next)
        self.offer(id)

    def write_table(self, gpa: int, *pieces: tuple[int, int] | tuple[int, int, int]) -> int:
        for i, (piece, length, *flags) in enumerate(pieces):
            more = NEXT if i + 1 < len(pieces) else 0
            self.descriptor(i, piece, length, sum(flags) | more, i + 1, table=gpa)
        return 16 * len(pieces)

    def want_call_after(self, used_index: int, count: int) -> None:
        self.put_u16(AVAIL + 4 + 2 * self.size, (used_index + count) % 65536)

    def collect(self) -> list[tuple[int, int]]:
        entries = []
        while self.seen != self.used_idx:
            entries.append(self.used(self.seen))
            self.seen = (self.seen + 1) % 65536
        return entries

    def offer(self, *heads: int, jump: int = 0) -> None:
        """Makes avail entries of `heads`; avail.idx goes `jump` further than that."""
        index = self.u16(AVAIL + 2)
        for head in heads:
            self.put_u16(AVAIL + 4 + 2 * (index % self.size), head)
            index = (index + 1) % 65536
        self.put_u16(AVAIL + 2, (index + jump) % 65536)

    def used(self, index: int) -> tuple[int, int]:
        entry = self.memory.read(USED + 4 + 8 * (index % self.size), 8)
        return struct.unpack("<II", entry)  # type: ignore[return-value]

    @property
    def used_idx(self) -> int:
        return self.u16(USED + 2)


class PackedGuest(Guest):
    """Descriptors one after the other in the ring; a count of rounds gives their flags."""

    def restart(self, base: int) -> None:
        self.next, self.seen = (
            (position & 0x7FFF) + (0 if position >> 15 else self.size)
            for position in (base & 0xFFFF, base >> 16)
        )
        self.slots: dict[int, list[int]] = {}

    def available(self) -> int:
        """The flags of the next descriptor that the guest makes available."""
        return IS_USED if self.next // self.size & 1 else AVAILABLE

    def offer_chain(self, *pieces: tuple[int, int] | tuple[int, int, int], id: int = 0) -> None:
        self.slots.setdefault(id, []).append(len(pieces))
        written = []
        for i, (gpa, length, *flags) in enumerate(pieces):
            more = NEXT if i + 1 < len(pieces) else 0
            word = sum(flags) & ~(AVAILABLE | IS_USED) | more | self.available()
            written.append((self.next % self.size, gpa, length, id, word))
            self.next += 1
        for descriptor in reversed(written):
            self.descriptor(*descriptor)

    def write_table(self, gpa: int, *pieces: tuple[int, int] | tuple[int, int, int]) -> int:
        for i, (piece, length, *flags) in enumerate(pieces):
            self.descriptor(i, piece, length, 0, sum(flags), table=gpa)
        return 16 * len(pieces)

    def want_call_after(self, used_index: int, count: int) -> None:
        index = (used_index & 0x7FFF) + count
        wrap = used_index >> 15 ^ index // self.size & 1
        self.memory.write(AVAIL, struct.pack("<HH", wrap << 15 | index % self.size, 2))

    def collect(self) -> list[tuple[int, int]]:
        entries = []
        while self.seen < self.next:
            where = DESC + 16 * (self.seen % self.size)
            _, length, id, flags = struct.unpack("<QIHH", self.memory.read(where, 16))
            both = 0 if self.seen // self.size & 1 else AVAILABLE | IS_USED
            if flags & (AVAILABLE | IS_USED) != both:
                break
            entries.append((id, length if flags & WRITE else 0))
            self.seen += self.slots[id].pop(0)
        return entries


GUESTS = {"split": SplitGuest, "packed": PackedGuest}


class Rings:
    """`driver` and `device` of one virtqueue, and the `guest` whose memory it is in."""

    def __init__(
        self,
        layout: str = "split",
        *,
        indirect: bool = True,
        event_idx: bool = False,
        in_order: bool = False,
        size: int = 64,
        used: int = 0,
        fifo: bool = False,
    ) -> None:
        """`used`: so many descriptors went round before."""
        self.layout = layout
        self.size = size
        self.features = VERSION_1 | indirect * INDIRECT_DESC | event_idx * EVENT_IDX
        self.features |= in_order * IN_ORDER | (layout == "packed") * RING_PACKED
        self.base = base = base_of(layout, size, used)
        self.fd = os.memfd_create("guest")
        os.truncate(self.fd, 4 << 20)
        self.kick_fd, self.call_fd = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        memory = guest_memory(self.fd)
        self.free = [BORDER - 1000 - 100 * CHUNK + CHUNK * i for i in range(CHUNKS // 2)]
        self.driver = DriverVirtqueue(
            memory,
            size,
            self.features,
            desc_gpa=DESC,
            avail_gpa=AVAIL,
            used_gpa=USED,
            base=base,
            kick_fd=self.kick_fd,
            fifo=fifo,
        )
        self.guest = GUESTS[layout](memory, size, base)
        self.memory = guest_memory(self.fd)
        self.device = self.start(base)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        for fd in (self.fd, self.kick_fd, self.call_fd):
            os.close(fd)

    def start(self, base: int | None = None, **changes: Any) -> Virtqueue:
        """Another life of the device, from a base on; None: a ring that was never used."""
        arguments = {
            "desc_uva": DESC - GPA + UVA,
            "avail_uva": AVAIL - GPA + UVA,
            "used_uva": USED - GPA + UVA,
            "base": base,
            "call_fd": self.call_fd,
        } | changes
        self.device = Virtqueue(self.memory, self.size, self.features, **arguments)
        self.device.set_live(True)
        return self.device

    def remember(self, region: InflightQueue) -> None:
        """The device's chains, from now on, for whoever comes after a kill."""
        self.device.set_live(False)
        self.device.track(region)
        self.device.set_live(True)

    def start_after_a_kill(self, region: InflightQueue) -> Virtqueue:
        """Another life: told what the used ring says, or of a packed ring nothing new."""
        self.start(self.guest.used_idx if self.layout == "split" else self.base)
        self.remember(region)
        return self.device

    def log(self) -> DirtyLog:
        """A dirty log of all guest memory, which the device marks from now on."""
        fd = os.memfd_create("log")
        size = END // 4096 // 8
        os.truncate(fd, size)
        log = DirtyLog(fd, 0, size)
        os.close(fd)
        self.device.set_live(False)
        self.device.set_log(log, USED)
        self.device.set_live(True)
        return log

    def add(
        self, readable: Sequence[bytes], writable: Sequence[int], *, table: bool = False
    ) -> "Offer":
        """The driver offers a chain with these bytes and this room."""
        pieces = len(readable) + len(writable)
        if len(self.free) < pieces + 1:
            raise BufferError("no buffers")
        places = [self.free.pop() for _ in range(pieces)]
        for gpa, data in zip(places, readable, strict=False):
            self.guest.memory.write(gpa, data)
        offer = Offer(
            list(zip(places, map(len, readable), strict=False)),
            list(zip(places[len(readable) :], writable, strict=True)),
            b"".join(readable),
            self.free.pop() if table else None,
        )
        try:
            offer.id = self.driver.add(offer.readable, offer.writable, offer.table)
        except BufferError:
            self.reclaim(offer)
            raise
        return offer

    def reclaim(self, offer: "Offer") -> None:
        self.free += [gpa for gpa, _ in [*offer.readable, *offer.writable]]
        self.free += [offer.table] if offer.table is not None else []

    def received(self, offer: "Offer", length: int) -> bytes:
        """What the device has written into a chain, and the chain's buffers are free again."""
        data = b"".join([self.guest.memory.read(gpa, size) for gpa, size in offer.writable])
        self.reclaim(offer)
        return data[:length]

    def calls(self) -> int:
        return events(self.call_fd)

    def kicks(self) -> int:
        return events(self.kick_fd)

    def proves_itself(self) -> None:
        """A good chain still crosses, there and back."""
        offer = self.add([b"still", b"alive"], [7], table=bool(self.features & INDIRECT_DESC))
        self.driver.kick()
        (taken,) = self.device.take()
        assert self.device.read(taken) == b"stillalive"
        assert self.device.write(taken, b"and how") == 7
        self.device.give([(taken, 7)])
        assert self.driver.used() == [(offer.id, 7)]
        assert self.received(offer, 7) == b"and how"
        assert self.device.inflight == 0


class Offer:
    """A chain that the driver has made available."""

    def __init__(
        self,
        readable: list[tuple[int, int]],
        writable: list[tuple[int, int]],
        data: bytes,
        table: int | None,
    ) -> None:
        self.id = -1
        self.readable = readable
        self.writable = writable
        self.data = data
        self.table = table

    @property
    def room(self) -> int:
        return sum(length for _, length in self.writable)


def events(fd: int) -> int:
    """What an eventfd has counted since it was last read."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


__all__ = [
    "Guest",
    "Offer",
    "PackedGuest",
    "Rings",
    "SplitGuest",
    "base_of",
    "events",
    "guest_memory",
    "sizes_of",
]


def exchange(rings, count=1):
    """`count` chains go there and back, with one publish; how often the driver was called."""
    offers = [rings.add([b"x"], []) for _ in range(count)]
    rings.driver.kick()
    rings.device.give([(taken, 0) for taken in rings.device.take()])
    assert len(rings.driver.used()) == count
    for offer in offers:
        rings.reclaim(offer)
    return rings.calls()
