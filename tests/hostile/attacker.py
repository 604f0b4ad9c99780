"""A front-end with its hands free: raw rings in its own memory, on a real socket."""

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import pytest

from tests.backends.netguest import BROADCAST, frame, mac
from tests.hostile.victim import eventually
from tests.rings import AVAIL, BORDER, DESC, GPA, GUESTS, LAYOUTS, RING_PACKED, USED
from vhostpy._spec import Feature
from vhostpy.frontend.frontend import FrontEnd, Queue
from vhostpy.ring.parts import first_base
from vhostpy.system.fds import OwnedFd

EVERYTHING = (1 << 24) - 1
FEATURES = 1 << Feature.VERSION_1 | 1 << Feature.NET_MRG_RXBUF | 1 << Feature.INDIRECT_DESC
LAYOUT = ((GPA, 2 << 20), (BORDER, 2 << 20))
SIZE = 64
GOOD = BORDER + 4096  # a buffer of a page
STATUS = BORDER + 8192
NEXT, WRITE, INDIRECT = 1, 2, 4
each_device = pytest.mark.parametrize("kind", ["net", "blk"])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
QUEUES = {"net": ("bad0", 1), "blk": ("badram", 0)}  # by device: socket, ring


def eventfd(value: int = 0, flags: int = os.EFD_NONBLOCK) -> OwnedFd:
    return OwnedFd(os.eventfd(value, flags | os.EFD_CLOEXEC))


class Attacker:
    """A session up to memory, and one ring whose descriptors it writes itself.

    `ring` has the tools of tests.rings; it lies at DESC, AVAIL and USED. `index` is the
    ring's number: 1 is what a net device polls, 0 what a disk does. `kind` is the ring's
    layout, split or packed.
    """

    def __init__(
        self,
        path: str,
        index: int = 0,
        *,
        size: int = SIZE,
        features: int = FEATURES,
        layout: tuple[tuple[int, int], ...] = LAYOUT,
        start: bool = True,
        kind: str = "split",
        base: int | None = None,
    ) -> None:
        self.packed = kind == "packed"
        features |= RING_PACKED if self.packed else 0
        base = first_base(features) if base is None else base
        self.end = FrontEnd(path, timeout_s=20, layout=layout)
        self.end.negotiate(features, EVERYTHING)
        self.end.set_mem_table()
        self.end.allocate(1 << 20)  # the raw ring's place
        self.memory = self.end.memory
        self.ring: Any = GUESTS[kind](self.memory, size, base)
        self.back: list[tuple[int, int]] = []  # what came back and nobody asked for
        self.index = index
        self.queue: Queue = self.describe(index)
        if start:
            if not self.packed:
                self.ring.put_u16(AVAIL + 2, base)
                self.ring.put_u16(USED + 2, base)
                self.ring.restart(base)
            self.start(base)

    def describe(self, index: int) -> Queue:
        """Ring `index` at the raw ring's place."""
        none: list[OwnedFd] = [eventfd() for _ in range(3)]
        where = (DESC, AVAIL, USED)
        features = self.end.features
        queue = Queue(index, self.ring.size, features, *where, None, *none)  # type: ignore[arg-type]
        self.end.queues[index] = queue
        return queue

    def start(self, base: int | None = None) -> None:
        """Starts the ring, or starts it again; None: where a new one starts."""
        base = first_base(self.end.features) if base is None else base
        self.end.announce(self.queue, base=base)

    def start_empty(self, base: int) -> None:
        """Starts the ring again, without the chains that were in it."""
        if self.packed:
            self.memory.write(DESC, bytes(16 * self.ring.size))
            self.ring.restart(base)
        else:
            self.ring.put_u16(AVAIL + 2, base)
        self.start(base)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end.close()

    def kick(self) -> None:
        assert self.queue.kick is not None
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.queue.kick.fileno(), 1)

    def offer(self, *heads: int, jump: int = 0) -> None:
        """Of a split ring: chains that stand in its table already."""
        self.ring.offer(*heads, jump=jump)
        self.kick()

    def offer_chain(self, *pieces: tuple[int, int] | tuple[int, int, int], id: int = 0) -> None:
        """Offers (GPA, length, flags) pieces."""
        self.ring.offer_chain(*pieces, id=id)
        self.kick()

    def break_ring(self) -> None:
        """What makes no sense of the ring itself: an index that jumps, a chain without end."""
        if self.packed:
            # Last the one that the device looks at, or it takes a chain that ends.
            for i in reversed(range(self.ring.size)):
                slot = (self.ring.next + i) % self.ring.size
                self.ring.descriptor(slot, GOOD, 8, 0, NEXT | self.ring.available())
            self.kick()
        else:
            self.offer(jump=self.ring.size + 1)

    def comes_back(self, count: int = 1, deadline_s: float = 20) -> list[tuple[int, int]]:
        """Offers are answered: the used entries of the next `count` chains."""

        def enough() -> bool:
            self.back += self.ring.collect()
            return len(self.back) >= count

        eventually(enough, "a used entry", deadline_s)
        entries, self.back = self.back[:count], self.back[count:]
        return entries

    # Good behaviour, to see that all is well -------------------------------------------

    def request(self, kind: int = 1, sector: int = 0, data: bytes | int = bytes(512)) -> int:
        """A good disk request at the table's end; its status.

        The buffer is at GOOD and gets `data` before; where that is a length, nothing.
        """
        size = data if isinstance(data, int) else len(data)
        self.memory.write(STATUS, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(STATUS + 16, b"\xee")
        if isinstance(data, bytes):
            self.memory.write(GOOD, data)
        pieces = [(STATUS, 16), (GOOD, size, 0 if kind else WRITE), (STATUS + 16, 1, WRITE)]
        last = self.ring.size - 3
        self.offer_chain(*pieces, id=last)
        assert self.comes_back()[0][0] == last
        return self.memory.read(STATUS + 16, 1)[0]

    def send(self, source: int = 0xBAD, to: bytes = BROADCAST, size: int = 60) -> None:
        """A good frame from the table's end; taken when this returns."""
        last = self.ring.size - 1
        data = bytes(12) + frame(to, mac(source), size)
        self.memory.write(GOOD, data)
        self.offer_chain((GOOD, len(data)), id=last)
        assert self.comes_back() == [(last, 0)]


@contextlib.contextmanager
def meanwhile(*works: Callable[[], None]) -> Iterator[None]:
    """Does each of `works` again and again, on threads, while the block runs."""
    stop = threading.Event()

    def repeat(work: Callable[[], None]) -> None:
        while not stop.is_set():
            work()

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def proves_itself(attacker: Attacker, kind: str) -> None:
    """What is good still works on the attacker's own ring."""
    if kind == "net":
        attacker.send()
    else:
        assert attacker.request() == 0
