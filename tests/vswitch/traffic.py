"""Guests that send and receive at random, and the ledger of what is on its way.

They are front-ends on real sockets, each with a ring layout and features of its own.
Nothing here is told how a frame is to be lost: what does not arrive must be counted.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.backends.netguest import (
    BROADCAST,
    EVENT_IDX,
    IN_ORDER,
    INDIRECT,
    MRG_RXBUF,
    VERSION_1,
    mac,
)
from tests.rings import base_of
from vhostpy._ring import DriverVirtqueue
from vhostpy._spec import Feature
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.protocol.codec import FrontEndRequest
from vhostpy.protocol.payloads import MemoryRegion, MemoryTable

RING_PACKED = 1 << Feature.RING_PACKED
EVERYTHING = (1 << 24) - 1
LAYOUT = ((1 << 20, 4 << 20), (5 << 20, 4 << 20))  # (GPA, size); they touch
RINGS_BYTES = 1 << 20  # the start of the memory; then come slots, some across the border
SLOT = 68 << 10  # holds the longest frame with gaps between its pieces, and a table
SMALL_SLOT = 4 << 10
LONGEST = 65535 + 14
PATTERN = random.Random(1).randbytes(1 << 17)
STRANGER = mac(0xFFFF)
PIECES = 40  # of a chain, at most
CUTS = (0, 0, 0, 0, 1, 1, 2, 3, 3, PIECES - 4)
ROOMS = (12, 100, 400, 1500, 2048, 4000)


def content(sequence: int, size: int) -> bytes:
    """What stands behind a frame's addresses: its number where the type is, then a pattern
    that depends on it. So the shortest frame, 14 bytes, has a number as well."""
    start = sequence % 9973
    return (sequence & 0xFFFF).to_bytes(2, "big") + PATTERN[start : start + size - 14]


@dataclass
class Ledger:
    """Copies of frames on their way; a flow is (destination and source, receiving port)."""

    outstanding: dict[tuple[bytes, int], dict[int, tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    last: dict[tuple[bytes, int, int], int] = field(default_factory=dict)
    sequences: Counter = field(default_factory=Counter)  # by addresses
    lost: Counter = field(default_factory=Counter)  # by port
    arrived: Counter = field(default_factory=Counter)
    arrived_bytes: Counter = field(default_factory=Counter)

    def send(self, addresses: bytes, size: int, ports: Sequence[int]) -> bytes:
        """The next frame of these addresses, which each of `ports` has to get."""
        self.sequences[addresses] += 1
        sequence = self.sequences[addresses]
        for port in ports:
            flow = self.outstanding[addresses, port]
            if flow.pop(sequence & 0xFFFF, None):
                self.lost[port] += 1  # 65,536 frames ago: it will not come any more
            flow[sequence & 0xFFFF] = sequence, size
        return addresses + content(sequence, size)

    def arrive(self, port: int, queue: int, frame: bytes) -> None:
        """Once, intact, and none may overtake another of its flow in its receive queue."""
        addresses, number = frame[:12], int.from_bytes(frame[12:14], "big")
        known = self.outstanding[addresses, port].pop(number, None)
        assert known, f"port {port}: {frame[:16].hex()} was not sent to it, or came before"
        sequence, size = known
        assert len(frame) == size
        assert frame[12:] == content(sequence, size)
        way = addresses, port, queue
        assert self.last.get(way, 0) < sequence, f"port {port}: out of order"
        self.last[way] = sequence
        self.arrived[port] += 1
        self.arrived_bytes[port] += size

    def settle(self) -> None:
        """Nothing comes any more: what is outstanding is lost."""
        for (_, port), flow in self.outstanding.items():
            self.lost[port] += len(flow)
            flow.clear()


def mac_of(port: int, queue: int) -> bytes:
    """The address that a queue pair sends from."""
    return mac(port << 8 | queue)


class Station:
    """A guest of random kind on port `port`, with `pairs` queue pairs of that layout."""

    def __init__(
        self, path: str, port: int, ledger: Ledger, dice: random.Random, pairs: int, layout: str
    ) -> None:
        self.port, self.ledger, self.dice, self.pairs = port, ledger, dice, pairs
        optional = (VERSION_1, MRG_RXBUF, EVENT_IDX, INDIRECT, IN_ORDER)
        features = sum(bit for bit in optional if dice.random() < 0.6)
        packed = layout == "packed"
        if packed:
            features |= RING_PACKED | VERSION_1
        self.header_size = 12 if features & (VERSION_1 | MRG_RXBUF) else 10
        self.mergeable = bool(features & MRG_RXBUF)
        self.indirect = bool(features & INDIRECT)
        self.end = FrontEnd(path, timeout_s=60, layout=LAYOUT)
        assert self.end.negotiate(features, EVERYTHING) & features == features
        self.end.set_mem_table()
        self.chains = 0  # that came back
        self.sent = [0] * pairs
        self.expected: Counter = Counter()  # drops that are this sender's fault
        self.stopped: dict[int, int] = {}  # ring -> base at which it goes on
        self.disabled: set[int] = set()
        self.lazy = False  # posts no buffers
        self.slots: list[list[int]] = []  # of each ring, free ones
        self.places: list[dict[int, tuple[int, list[tuple[int, int]]]]] = []  # by chain
        self.size = dice.choice([50, 255, 256] if packed else [64, 256])
        at = LAYOUT[0][0] + RINGS_BYTES
        for index in range(2 * pairs):
            # Indexes and wrap counters are soon crossed.
            used = dice.choice([0, self.size - 3, 2 * self.size - 3, 65530])
            base = base_of(layout, self.size, used)
            self.end.start_queue(index, self.size, base=base)
            few = index & 1 or not self.mergeable
            count, slot = (24, SLOT) if few else (220, SMALL_SLOT)
            self.slots.append([at + slot * i for i in range(count)])
            self.places.append({})
            at += slot * count
        assert at <= LAYOUT[1][0] + LAYOUT[1][1]

    def ring(self, index: int) -> DriverVirtqueue:
        return self.end.queues[index].ring

    # Sending ------------------------------------------------------------------------

    def send(self, queue: int, ports: int, *, floods: bool) -> bool:
        """Sends something on that queue pair; False where the ring or memory is full."""
        index, dice = 2 * queue + 1, self.dice
        if not self.slots[index] or self.ring(index).free < PIECES:
            return False
        source = mac_of(self.port, queue)
        kind = dice.random()
        if kind < 0.005:
            self.expected["bad_chain"] += 1
            self._add(index, [(1 << 40, dice.randint(1, 3000))], ())
        elif kind < 0.01:
            self.expected["too_short"] += 1
            self._send(index, bytes(dice.randint(1, self.header_size + 13)))
        elif kind < 0.015:
            self.expected["bad_source"] += 1
            self._send(index, bytes(self.header_size) + mac_of(0, 0) + BROADCAST + bytes(50))
        else:
            size = self._size()
            to = dice.randrange(ports)
            if floods and kind < 0.2:
                others = [port for port in range(ports) if port != self.port]
                frame = self.ledger.send(dice.choice((BROADCAST, STRANGER)) + source, size, others)
            elif to == self.port:
                self.expected["reflected"] += 1
                frame = mac_of(to, queue) + source + content(0, size)
            else:
                frame = self.ledger.send(mac_of(to, dice.randrange(2)) + source, size, [to])
            self._send(index, dice.randbytes(self.header_size) + frame)
        self.sent[queue] += 1
        return True

    def _size(self) -> int:
        kind = self.dice.random()
        if kind < 0.5:
            return self.dice.randint(14, 128)
        if kind < 0.98:
            return self.dice.randint(14, 1600)
        return self.dice.choice((9014, 20_000, LONGEST, self.dice.randint(14, LONGEST)))

    def _send(self, index: int, data: bytes) -> None:
        """A chain of the data, cut anywhere; its pieces do not touch."""
        dice, length = self.dice, len(data)
        slot = at = self.slots[index].pop()
        cuts = dice.choice(CUTS)
        edges = [*sorted({dice.randint(1, length) for _ in range(cuts)} - {length}), length]
        pieces, start = [], 0
        for edge in edges:
            self.end.memory.write(at, data[start:edge])
            pieces.append((at, edge - start))
            at += edge - start + dice.randrange(9)
            start = edge
        writable = [(at, 100)] if cuts == 3 else []  # is not touched
        table = slot + SLOT - 1024 if self.indirect and dice.random() < 0.5 else None
        self._add(index, pieces, writable, table, slot)

    def _add(
        self,
        index: int,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]],
        table: int | None = None,
        slot: int | None = None,
    ) -> None:
        slot = self.slots[index].pop() if slot is None else slot
        ident = self.ring(index).add(readable, writable, table)
        self.places[index][ident] = slot, list(writable)

    def collect_sent(self) -> None:
        """Takes back the slots of chains that the device is done with."""
        for index in range(1, 2 * self.pairs, 2):
            for ident, length in self.ring(index).used():
                slot, writable = self.places[index].pop(ident)
                # With IN_ORDER a driver is not told of each chain what was written.
                assert length == 0 or writable
                self.slots[index].append(slot)
                self.chains += 1

    # Receiving ----------------------------------------------------------------------

    def post(self, count: int) -> None:
        """So many receive buffers for each queue, in pieces; some can't be written to."""
        dice = self.dice
        for index in range(0, 2 * self.pairs, 2):
            for _ in range(count):
                if not self.slots[index] or self.ring(index).free < 4:
                    break
                at = self.slots[index][-1]
                if dice.random() < 0.002:
                    self._add(index, (), [(1 << 40, 2000)])
                    continue
                room = dice.choice(ROOMS) if self.mergeable else dice.choice((2000, 66_000))
                parts = dice.choice((1, 1, 2, 3))
                pieces = [(at + (room // parts + 8) * i, room // parts) for i in range(parts)]
                self._add(index, (), pieces)
            self.ring(index).kick()

    def receive(self) -> None:
        """Takes what has arrived to the ledger; headers are checked."""
        read = self.end.memory.read
        for index in range(0, 2 * self.pairs, 2):
            buffers = []
            for ident, length in self.ring(index).used():
                slot, pieces = self.places[index].pop(ident)
                self.slots[index].append(slot)
                self.chains += 1
                if length:
                    buffers.append(b"".join([read(*piece) for piece in pieces])[:length])
                    assert len(buffers[-1]) == length
            buffers.reverse()
            while buffers:
                data = buffers.pop()
                header, data = data[: self.header_size], data[self.header_size :]
                assert header[:10] == bytes(10)
                following = int.from_bytes(header[10:], "little") - 1 if header[10:] else 0
                assert 0 <= following <= (len(buffers) if self.mergeable else 0)
                for _ in range(following):
                    data += buffers.pop()
                self.ledger.arrive(self.port, index // 2, data)

    # What a driver and its front-end do to the rings ----------------------------------

    def stop(self, index: int) -> None:
        """GET_VRING_BASE."""
        if index not in self.stopped:
            self.stopped[index] = self.end.stop_queue(index)

    def resume(self, index: int) -> None:
        """Goes on where it stopped."""
        if index in self.stopped:
            self.end.announce(self.end.queues[index], base=self.stopped.pop(index), enable=False)
            self.end.enable(index, index not in self.disabled)

    def enable(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE."""
        (self.disabled.discard if enabled else self.disabled.add)(index)
        if index not in self.stopped:
            self.end.enable(index, enabled)

    def new_memory_table(self) -> None:
        """The same memory in other regions, while rings run."""
        regions = []
        for region in self.end.shared.regions:
            # Not where a ring or a table lies, as those must be in one region.
            cut = self.dice.choice((0, 0, RINGS_BYTES, region.size - SLOT))
            for start, end in ((0, cut), (cut, region.size)):
                if start < end:
                    uva, offset = region.uva + start, region.offset + start
                    regions.append(MemoryRegion(region.gpa + start, end - start, uva, offset))
        fds = [self.end.shared.fd] * len(regions)
        self.end.request(FrontEndRequest.SET_MEM_TABLE, MemoryTable(tuple(regions)), fds)

    def settle(self) -> None:
        """All rings run, and what is in them is asked for."""
        for index in range(2 * self.pairs):
            self.enable(index, True)
            self.resume(index)
            self.ring(index).kick()
