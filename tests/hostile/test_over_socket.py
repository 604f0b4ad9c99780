"""Rings, chains and notifications of hostile guests, over sockets beside the innocent.

Each line of attacks has its test at the module's level elsewhere: rings in test_rings.py,
devices in test_net.py and test_blk.py. Here they meet a process that serves others too:
two guests that exchange frames and one that uses a disk, who must not notice.
"""

import contextlib
import itertools
import os
import random
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.backends.netguest import BROADCAST, frame, mac
from tests.hostile.attacker import (
    FEATURES,
    GOOD,
    INDIRECT,
    NEXT,
    SIZE,
    STATUS,
    WRITE,
    Attacker,
    eventfd,
    meanwhile,
)
from tests.hostile.conftest import place_of
from tests.hostile.victim import eventually
from tests.rings import AVAIL, BORDER, DESC, END, GPA, LAYOUTS, TABLES, USED
from vhostpy._spec import Feature
from vhostpy.frontend import FrontEnd
from vhostpy.payloads import U64, VringFile, VringState
from vhostpy.protocol import FrontEndRequest as R
from vhostpy.protocol import encode

EVENT_IDX = 1 << Feature.EVENT_IDX
QUEUES = {"net": ("bad0", 1), "blk": ("badram", 0)}
each_device = pytest.mark.parametrize("kind", ["net", "blk"])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def proves_itself(attacker: Attacker, kind: str) -> None:
    """What is good still works on the attacker's own ring."""
    if kind == "net":
        attacker.send()
    else:
        assert attacker.request() == 0


# Chains ------------------------------------------------------------------------------------


Offer = Callable[[Any, int], None]  # (ring, more flags of each buffer)
Piece = tuple[int, int] | tuple[int, int, int]


def chain(*pieces: Piece, table: Sequence[Piece] = (), at: int = TABLES) -> Offer:
    """(Address, length, flags) of each descriptor, and those of an indirect table."""

    def offer(ring: Any, more: int) -> None:
        if table:
            ring.write_table(at, *((*piece, more) for piece in table))
        ring.offer_chain(*((*p, 0 if INDIRECT in p[2:] else more) for p in pieces))

    return offer


def split(*descriptors: tuple[int, int, int, int], table: Sequence = ()) -> Offer:
    """As they stand in a split ring: (address, length, flags, next)."""

    def offer(ring: Any, more: int) -> None:
        for place, entries in ((DESC, descriptors), (TABLES, table)):
            for i, (gpa, length, flags, next) in enumerate(entries):
                flags |= 0 if flags & INDIRECT else more
                ring.descriptor(i, gpa, length, flags, next, table=place)
        ring.offer(0)

    return offer


BAD_CHAINS = {
    "CVE-2018-1059: begins in memory, ends outside": ("unmapped", chain((END - 8, 16))),
    "outside memory": ("unmapped", chain((0, 8))),
    "wraps at 2**64": ("unmapped", chain((2**64 - 8, 16))),
    "4 GiB long": ("unmapped", chain((GPA, 0xFFFFFFFF))),
    "CVE-2020-10725: zero length": ("zero_length", chain((GOOD, 0))),
    "CVE-2020-10725: zero length behind a good one": ("zero_length", chain((GOOD, 64), (GOOD, 0))),
    "readable behind writable": ("bad_order", chain((GOOD, 64, WRITE), (GOOD, 8))),
    "indirect: of 0 entries": ("bad_indirect", chain((TABLES, 0, INDIRECT))),
    "indirect: 17 bytes": ("bad_indirect", chain((TABLES, 17, INDIRECT))),
    "indirect: with NEXT": ("bad_indirect", chain((TABLES, 16, INDIRECT), (GOOD, 8))),
    "indirect: outside memory": ("unmapped", chain((0, 32, INDIRECT))),
    "indirect: ends outside memory": (
        "unmapped",
        chain((END - 16, 32, INDIRECT), table=[(GOOD, 8, NEXT)], at=END - 16),
    ),
    "indirect: table across two regions, its second half bad": (
        "unmapped",
        chain((BORDER - 24, 32, INDIRECT), table=[(GOOD, 8), (0, 8)], at=BORDER - 24),
    ),
    "indirect: 2**28 - 1 entries": ("too_long", chain((TABLES, 0xFFFFFFF0, INDIRECT))),
    # Beyond what a chain may have.
    "64 KiB of tiny descriptors": (
        "too_long",
        chain((TABLES, 16 * 4096, INDIRECT), table=[(GOOD, 16)] * 4096),
    ),
}
# A packed ring's chains are those that come one after the other, and in a table of its
# only WRITE means anything.
BAD_SPLIT_CHAINS = {
    "loop of one": ("too_long", split((GOOD, 8, NEXT, 0))),
    "loop of all": (
        "too_long",
        split(*((GOOD, 8, NEXT, (i + 1) % (SIZE - 3)) for i in range(SIZE - 3))),
    ),
    "next beyond the ring": ("bad_index", split((GOOD, 8, NEXT, SIZE))),
    "next of 65535": ("bad_index", split((GOOD, 8, NEXT, 65535))),
    "indirect in indirect": (
        "bad_indirect",
        split((TABLES, 16, INDIRECT, 0), table=[(TABLES, 16, INDIRECT, 0)]),
    ),
    "indirect: loop": (
        "too_long",
        split((TABLES, 32, INDIRECT, 0), table=[(GOOD, 8, NEXT, 1), (GOOD, 8, NEXT, 0)]),
    ),
    "indirect: next beyond its table": (
        "bad_index",
        split((TABLES, 32, INDIRECT, 0), table=[(GOOD, 8, NEXT, 2), (GOOD, 8, 0, 0)]),
    ),
}
each_bad_chain = pytest.mark.parametrize(
    ("layout", "fault", "offer"),
    [
        pytest.param(layout, *bad, id=f"{layout}: {name}")
        for layout, chains in (
            ("split", BAD_CHAINS | BAD_SPLIT_CHAINS),
            ("packed", BAD_CHAINS),
        )
        for name, bad in chains.items()
    ],
)


@each_device
@each_bad_chain
def test_bad_chain_comes_back_and_is_counted_by_name(place, kind, layout, fault, offer):
    name, index = QUEUES[kind]
    with place.unnoticed(), Attacker(place.path(name), index, kind=layout) as attacker:
        before = place.victim.counters(name)
        for _ in range(4):
            for _ in range(10):
                offer(attacker.ring, 0)
            attacker.kick()
            assert attacker.comes_back(10) == [(0, 0)] * 10
        proves_itself(attacker, kind)
        after = place.victim.counters(name)
        assert after[f"chain_faults.{fault}"] == before[f"chain_faults.{fault}"] + 40
        if kind == "net":
            assert after["drops.bad_chain"] == before["drops.bad_chain"] + 40


@each_bad_chain
def test_bad_receive_buffer_comes_back_and_is_counted_by_name(place, layout, fault, offer):
    with (
        place.unnoticed(),
        Attacker(place.path("bad0"), 0, kind=layout) as receiver,
        Attacker(place.path("bad1"), 1, kind=layout) as sender,
    ):
        before = place.victim.counters("bad0")
        for _ in range(2):
            offer(receiver.ring, 0 if fault == "bad_order" else WRITE)
        receiver.kick()
        # Nobody knows that address: the frame is flooded to all, the innocent too.
        sender.send(to=mac(0xFFFF))
        assert receiver.comes_back(2) == [(0, 0)] * 2
        after = place.victim.counters("bad0")
        assert after[f"buffer_faults.{fault}"] == before[f"buffer_faults.{fault}"] + 2


@each_layout
def test_header_over_many_descriptors_and_frames_shorter_than_it(place, layout):
    """CVE-2022-2132: a chain shorter than the header, or the header over many pieces."""
    with place.unnoticed(), Attacker(place.path("bad0"), 1, kind=layout) as attacker:
        before = place.victim.counters("bad0")
        for length in (1, 11, 12, 13, 25):
            attacker.offer_chain((GOOD, length))
        attacker.offer_chain(*[(GOOD + i, 1) for i in range(26)], id=1)
        attacker.comes_back(6)
        after = place.victim.counters("bad0")
        assert after["drops.too_short"] == before["drops.too_short"] + 5
        assert after["from_guest_bytes"] == before["from_guest_bytes"] + 14
        attacker.offer_chain((GPA, 70000))
        attacker.comes_back()
        assert place.victim.counters("bad0")["drops.too_long"] == before["drops.too_long"] + 1


@each_layout
def test_headers_of_offloads_that_nobody_negotiated(place, layout):
    """CVE-2024-11614, GSO: what the header says means nothing, and arrives nowhere."""
    with (
        place.unnoticed(),
        Attacker(place.path("bad0"), 0, kind=layout) as receiver,
        Attacker(place.path("bad1"), 1, kind=layout) as sender,
    ):
        headers = [
            struct.pack("<BBHHHHH", flags, gso, 65535, size, 65535, 65535, 65535)
            for flags in (0, 1, 255)
            for gso in (0, 1, 3, 4, 0x81, 255)
            for size in (0, 1, 65535)
        ]
        for i in range(len(headers)):
            receiver.offer_chain((GOOD + 4096 * (i + 1), 2048, WRITE), id=i)
        for header in headers:
            data = header + frame(mac(0xFFFF), mac(0xBAD), 200)
            sender.memory.write(GOOD, data)
            sender.offer_chain((GOOD, len(data)))
            sender.comes_back()
        for id, length in receiver.comes_back(len(headers)):
            assert length == 12 + 200
            header = receiver.memory.read(GOOD + 4096 * (id + 1), 12)
            assert header == bytes(10) + b"\1\0"


# Requests ----------------------------------------------------------------------------------

TOP = 2**64 // 512
CAPACITY = (4 << 20) // 512
BAD_REQUESTS = {
    # kind, sector, bytes of data, whether they are writable: the status
    "read past the end": (0, CAPACITY, 512, 1, 1),
    "write past the end": (1, CAPACITY - 1, 1024, 0, 1),
    "wraps in sectors": (1, 2**64 - 1, 1024, 0, 1),
    "wraps in bytes": (1, TOP, 512, 0, 1),
    "wraps in bytes to the start": (0, TOP + 1, 512, 1, 1),
    "no multiple of 512": (1, 0, 511, 0, 1),
    "unknown type": (99, 0, 512, 0, 2),
    "type of 2**32 - 1": (2**32 - 1, 0, 512, 1, 2),
    "discard of no range": (11, 0, 8, 0, 1),
    "discard of too many ranges": (11, 0, 16 * 33, 0, 1),
    "write-zeroes with unknown flags": (13, 0, 16, 0, 2),
    "read into nothing but a status": (0, 0, 0, 1, 0),
}


@pytest.mark.parametrize("disk", ["badram", "badfile"])
@pytest.mark.parametrize(
    ("kind", "sector", "size", "writable", "status"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys()
)
@each_layout
def test_bad_request_gets_its_status_and_touches_nothing(
    place, layout, disk, kind, sector, size, writable, status
):
    with place.unnoticed(), Attacker(place.path(disk), kind=layout) as attacker:
        marks = os.urandom(512)
        for where in (0, CAPACITY - 1):
            assert attacker.request(1, where, marks) == 0
        attacker.memory.write(GOOD, b"\xff" * 4096)
        attacker.memory.write(STATUS, struct.pack("<IIQ", kind, 0, sector) + b"\xee" * 2)
        data = [(GOOD, size, writable * WRITE)] if size else []
        attacker.offer_chain((STATUS, 16), *data, (STATUS + 16, 1, WRITE))
        assert attacker.comes_back() == [(0, 1)]
        assert attacker.memory.read(STATUS + 16, 2) == bytes([status, 0xEE])
        assert attacker.memory.read(GOOD, 4096) == b"\xff" * 4096
        for where in (0, CAPACITY - 1):
            assert attacker.request(0, where, bytes(512)) == 0
            assert attacker.memory.read(GOOD, 512) == marks


@each_layout
def test_requests_without_a_status_or_a_header_come_back(place, layout):
    with place.unnoticed(), Attacker(place.path("badram"), kind=layout) as attacker:
        before = place.victim.counters("badram")
        attacker.offer_chain((GOOD, 16), id=0)  # no status
        attacker.offer_chain((GOOD, 15), (STATUS, 1, WRITE), id=1)  # a header too short
        attacker.offer_chain((STATUS, 1, WRITE), id=3)  # none at all
        assert attacker.comes_back(3) == [(0, 0), (1, 1), (3, 1)]
        after = place.victim.counters("badram")
        assert after["bad_chains"] == before["bad_chains"] + 1
        assert after["bad_requests"] == before["bad_requests"] + 2
        assert attacker.memory.read(STATUS, 2) == b"\1\0"


@each_layout
def test_get_id_into_a_short_buffer_writes_no_byte_beyond(place, layout):
    with place.unnoticed(), Attacker(place.path("badram"), kind=layout) as attacker:
        attacker.memory.write(GOOD, b"\xff" * 64)
        attacker.memory.write(STATUS, struct.pack("<IIQ", 8, 0, 0))
        attacker.offer_chain((STATUS, 16), (GOOD, 3, WRITE), (STATUS + 16, 1, WRITE))
        assert attacker.comes_back() == [(0, 4)]
        assert attacker.memory.read(GOOD, 64) == bytes(3) + b"\xff" * 61


# Indexes -----------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("jump", [SIZE + 1, 32768, 65535])
def test_index_that_jumps_breaks_its_ring_and_raises_the_error_event(place, kind, jump):
    name, index = QUEUES[kind]
    with place.unnoticed(), Attacker(place.path(name), index) as attacker:
        proves_itself(attacker, kind)
        attacker.offer(jump=jump)
        assert attacker.queue.wait_err()
        place.innocent.goes_on()
        # It lives again, started anew at the same place.
        base = attacker.end.stop_queue(index)
        attacker.ring.put_u16(AVAIL + 2, base)
        attacker.start(base)
        proves_itself(attacker, kind)


@each_device
def test_chain_without_an_end_breaks_its_packed_ring_and_raises_the_error_event(place, kind):
    name, index = QUEUES[kind]
    with place.unnoticed(), Attacker(place.path(name), index, kind="packed") as attacker:
        proves_itself(attacker, kind)
        attacker.break_ring()
        assert attacker.queue.wait_err()
        place.innocent.goes_on()
        # It lives again, started anew at the same place.
        base = attacker.end.stop_queue(index)
        attacker.memory.write(DESC, bytes(16 * SIZE))
        attacker.ring.restart(base)
        attacker.start(base)
        proves_itself(attacker, kind)


@each_layout
def test_receive_ring_that_makes_no_sense_raises_the_error_event(place, layout):
    with (
        place.unnoticed(),
        Attacker(place.path("bad0"), 0, kind=layout) as receiver,
        Attacker(place.path("bad1"), 1, kind=layout) as sender,
    ):
        receiver.break_ring()
        sender.send(to=mac(0xFFFF))
        assert receiver.queue.wait_err()
        for _ in range(3):
            sender.send(to=mac(0xFFFF))


@each_device
@pytest.mark.parametrize("head", [SIZE, 65535])
def test_head_beyond_the_table_breaks_its_ring(place, kind, head):
    name, index = QUEUES[kind]
    with place.unnoticed(), Attacker(place.path(name), index) as attacker:
        attacker.offer(head)
        assert attacker.queue.wait_err()


@each_device
def test_indexes_that_jump_about_while_the_ring_is_polled(place, kind):
    name, index = QUEUES[kind]
    dice = random.Random(2)
    with place.unnoticed(), Attacker(place.path(name), index, features=FEATURES) as attacker:
        for _ in range(200):
            for _ in range(5):
                attacker.ring.put_u16(AVAIL + 2, dice.choice([0, 1, 63, 64, 65, 32767, 65535]))
                attacker.ring.put_u16(USED + 2, dice.randrange(65536))
                attacker.kick()
            base = attacker.end.stop_queue(index)
            attacker.start((base + dice.choice([0, 1, 32768])) % 65536)


# What changes between two looks ------------------------------------------------------------


@each_layout
@each_device
def test_descriptors_that_change_while_they_are_read(place, kind, layout):
    """Double fetch: length, address, flags and next (in a packed ring, the id) flip all the
    while, in an indirect table too."""
    name, index = QUEUES[kind]
    with place.unnoticed(), Attacker(place.path(name), index, kind=layout) as attacker:
        memory, ring = attacker.memory, attacker.ring
        memory.write(STATUS, struct.pack("<IIQ", 1, 0, 0))
        good = [(STATUS, 16, NEXT, 1), (GOOD, 512, NEXT, 2), (STATUS + 16, 1, WRITE, 0)]
        bad = [(2**64 - 16, 0xFFFFFFFF, NEXT, 1), (END - 8, 4096, NEXT | WRITE, 0)]
        bad.append((0, 1, INDIRECT, 65535))
        # Those of a packed ring are the driver's only until it has shown them.
        flips = itertools.cycle(
            (TABLES if layout == "packed" else place, i, descriptor)
            for place in (DESC, TABLES)
            for descriptors in (good, bad)
            for i, descriptor in enumerate(descriptors)
        )

        def flip() -> None:
            for _ in range(100):
                place, i, (gpa, length, flags, next) = next_flip()
                ring.descriptor(i, gpa, length, flags, next, table=place)

        def next_flip() -> Any:
            return next(flips)

        total = 0
        with meanwhile(flip):
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                for _ in range(16):
                    if layout == "split":
                        ring.offer(0)
                    ring.offer_chain((TABLES, 48, INDIRECT), id=SIZE - 1)
                attacker.kick()
                count = 32 if layout == "split" else 16
                used = attacker.comes_back(count)
                assert {head for head, _ in used} <= {0, SIZE - 1}
                total += count
        assert total > 100
        proves_itself(attacker, kind)


def test_frame_that_changes_between_the_lookup_and_the_copy(place):
    """TOCTOU: a frame goes where its destination says that it shows there.

    The innocent one's buffers are full of them at times.
    """
    with (
        place.unnoticed(may_lose=True),
        Attacker(place.path("bad0"), 0, size=256) as receiver,
        Attacker(place.path("bad1"), 1) as sender,
    ):
        # The other one's address is known: frames for 0xFFFF are flooded, these are not.
        innocent = frame(mac(0xA0), mac(0xBAD), 60)
        mine = frame(mac(0xFFFF), mac(0xBAD), 60)
        sender.ring.descriptor(0, GOOD, 72)
        flips = itertools.cycle([innocent[:6], mine[:6]])
        sender.memory.write(GOOD + 12, innocent)

        def flip() -> None:
            for _ in range(200):
                sender.memory.write(GOOD + 12, next(flips))

        for i in range(256):
            receiver.ring.descriptor(i, GOOD + 2048 * i, 2048, WRITE)
        receiver.offer(*range(256))
        arrived = 0
        with meanwhile(flip):
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                sender.offer(*[0] * 32)
                sender.comes_back(32)
                new = (receiver.ring.used_idx - arrived) % 65536
                for head, length in receiver.comes_back(new):
                    data = receiver.memory.read(GOOD + 2048 * head, length)[12:]
                    assert data[:6] == mac(0xFFFF)
                    receiver.ring.offer(head)
                arrived += new
        assert arrived > 10


# Notifications -----------------------------------------------------------------------------


def full_and_blocking(call) -> None:
    """As far as an eventfd counts, and whoever writes to it waits."""
    with contextlib.suppress(BlockingIOError):
        os.set_blocking(call, False)
        os.eventfd_read(call)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(call, 2**64 - 2)
    os.set_blocking(call, True)


@each_layout
@each_device
def test_call_fd_that_is_full_and_blocks_ends_its_session(place, kind, layout):
    name, index = QUEUES[kind]
    with (
        place.unnoticed(),
        place.one_error("call fd"),
        Attacker(place.path(name), index, kind=layout) as attacker,
    ):
        full_and_blocking(attacker.queue.call.fileno())
        attacker.offer_chain((0, 8))
        place.innocent.goes_on()
        assert attacker.end.hung_up()


def test_call_fd_that_blocks_when_the_ring_stops_holds_up_nobody(place):
    """What the port held back is published by control then, which may wait no longer."""
    with place.unnoticed(), Attacker(place.path("bad0"), 1) as attacker:
        for _ in range(30):
            attacker.ring.descriptor(0, 0, 8)
            full_and_blocking(attacker.queue.call.fileno())
            attacker.offer(0)
            with contextlib.suppress(OSError):
                attacker.end.stop_queue(1)
                attacker.start(1)
            place.report()


@each_device
def test_error_fd_that_is_full_and_blocks_holds_up_nobody(place, kind):
    name, index = QUEUES[kind]
    with place.unnoticed(), Attacker(place.path(name), index) as attacker:
        full_and_blocking(attacker.queue.err.fileno())
        attacker.offer(jump=SIZE + 1)
        place.innocent.goes_on()
        with FrontEnd(place.path("bad2")) as other:
            assert other.get_features()


def test_call_fds_set_as_fast_as_possible_on_a_running_ring(place):
    """And made blocking while they are handed over: setting one signals it once."""
    with place.unnoticed(), Attacker(place.path("bad0"), 1) as attacker:
        fds = [eventfd() for _ in range(8)]

        def block() -> None:
            for fd in fds:
                full_and_blocking(fd.fileno())

        attacker.ring.descriptor(0, 0, 8)
        with meanwhile(block):
            for i in range(1000):
                file = VringFile(1, True)
                with contextlib.suppress(OSError):
                    attacker.end.send_raw(encode(R.SET_VRING_CALL, file), [fds[i % 8]])
                if i % 50 == 0:
                    attacker.offer(0)
            place.innocent.goes_on()
        for fd in fds:
            fd.close()


def test_kicks_as_fast_as_possible(place):
    with (
        place.unnoticed(),
        Attacker(place.path("bad0"), 1) as net,
        Attacker(place.path("badram"), 0) as blk,
    ):
        start = place.report()

        def kick() -> None:
            for attacker in (net, blk):
                for _ in range(100):
                    attacker.kick()

        with meanwhile(kick):
            time.sleep(1)
            place.innocent.goes_on()
        assert place.report()["frames"] > start["frames"] + 50


def test_features_and_rings_toggled_as_fast_as_possible(place):
    with FrontEnd(place.path("bad0")) as first:
        first.request(R.SEND_RARP, U64(0xBAD02))  # a port's means to announce stay
        first.get_features()
    with place.unnoticed(), Attacker(place.path("bad0"), 1) as attacker:
        start = place.report()
        for i in range(1500):
            attacker.end.send_raw(encode(R.SET_VRING_ENABLE, VringState(1, i % 2)))
            features = attacker.end.features ^ (i % 2) << Feature.LOG_ALL
            attacker.end.send_raw(encode(R.SET_FEATURES, U64(features)))
            attacker.end.send_raw(encode(R.SEND_RARP, U64(0xBAD02)))
        attacker.end.get_features()
        assert place.report()["frames"] > start["frames"]
        assert place.report()["blocks"] > start["blocks"]


# What starves others -----------------------------------------------------------------------


def test_receiver_that_returns_no_buffer_costs_its_neighbours_nothing(place):
    with (
        place.unnoticed(),
        Attacker(place.path("bad0"), 0) as receiver,
        Attacker(place.path("bad1"), 1) as sender,
        Attacker(place.path("bad2"), 1) as other,
    ):
        before = place.victim.counters("bad0")
        receiver.end.start_queue(1)
        for i in range(8):
            receiver.ring.descriptor(i, GOOD + 2048 * i, 2048, WRITE)
        receiver.offer(*range(8))
        # It is known, has eight buffers, and all the world sends to it.
        tx = receiver.end.queues[1]
        data = bytes(12) + frame(BROADCAST, mac(0xD0), 60)
        receiver.memory.write(GOOD + (1 << 19), data)
        tx.ring.add([(GOOD + (1 << 19), len(data))], [])
        tx.ring.kick()
        tx.wait_used()
        for attacker in (sender, other):
            data = bytes(12) + frame(mac(0xD0), mac(0xBAD + attacker.index), 1500)
            attacker.memory.write(GOOD, data)
            attacker.ring.descriptor(0, GOOD, len(data))
        for _ in range(20):
            for attacker in (sender, other):
                attacker.offer(*[0] * SIZE)
            for attacker in (sender, other):
                attacker.comes_back(SIZE)
        after = place.victim.counters("bad0")
        assert after["drops.receiver_full"] == before["drops.receiver_full"] + 40 * SIZE - 8


def test_a_hundred_thousand_sources_push_no_innocent_address_out(place):
    with place.unnoticed(may_lose=True), Attacker(place.path("bad0"), 1, size=1024) as attacker:
        before = place.report()
        template = bytes(12) + frame(mac(0xBAE), mac(0), 60)
        for i in range(1024):
            attacker.memory.write(GOOD + 128 * i, template)
            attacker.ring.descriptor(i, GOOD + 128 * i, len(template))
        # Sent to an address that is known, so that the flood is one of sources only.
        sent = 0
        while sent < 100_000:
            for i in range(1024):
                source = b"\x02\xba\xd0" + (sent + i).to_bytes(3, "big")
                attacker.memory.write(GOOD + 128 * i + 18, source)
                if sent == 0 and i == 0:
                    attacker.memory.write(GOOD + 128 * i + 18, mac(0xBAE))
            attacker.offer(*range(1024))
            attacker.comes_back(1024)
            sent += 1024
        fdb = place.victim.client.ask("fdb")
        innocents = {mac(0xA0).hex(":"): "good0", mac(0xA1).hex(":"): "good1"}
        assert {e["mac"]: e["port"] for e in fdb if e["mac"] in innocents} == innocents
        assert len(fdb) <= 8192
        assert sum(e["port"] == "bad0" for e in fdb) < 8192
        # Addresses seen: no frame of the innocent was flooded to the attacker's.
        assert place.report()["lost"] == before["lost"]


def test_chains_of_1024_tiny_descriptors_share_the_time(place):
    """The most that a chain may cost, on a ring and on its neighbour, again and again."""
    with (
        place.unnoticed(),
        Attacker(place.path("bad0"), 1) as net,
        Attacker(place.path("badram"), 0) as blk,
    ):
        start = place.report()
        for attacker in (net, blk):
            for i in range(1024):
                attacker.ring.descriptor(
                    i, BORDER - 1, 64, NEXT if i < 1023 else 0, i + 1, table=TABLES
                )
            attacker.ring.descriptor(0, TABLES, 16 * 1024, INDIRECT)
        for _ in range(30):
            for attacker in (net, blk):
                attacker.offer(*[0] * SIZE)
            for attacker in (net, blk):
                attacker.comes_back(SIZE)
        assert place.report()["blocks"] > start["blocks"]


def test_flood_to_64_ports_leaves_time_for_a_handshake(tmp_path):
    # Rings that name one descriptor 32,768 times, so that nobody needs to refill them:
    # a frame is 3.7 MB of copies, and half a minute's work is there at once.
    most = 32768
    with (
        place_of(tmp_path, ports=64) as place,
        place.unnoticed(may_lose=True),
        contextlib.ExitStack() as stack,
    ):
        for i in range(1, 63):
            guest = stack.enter_context(Attacker(place.path(f"bad{i}"), 0, size=most))
            guest.ring.descriptor(0, BORDER, 1 << 16, WRITE)
            guest.ring.put_u16(AVAIL + 2, most)
        attacker = stack.enter_context(Attacker(place.path("bad0"), 1, size=most))
        data = bytes(12) + frame(BROADCAST, mac(0xBAD), 60000)
        attacker.memory.write(GOOD, data)
        attacker.ring.descriptor(0, GOOD, len(data))
        attacker.ring.put_u16(AVAIL + 2, most)
        attacker.kick()
        times, start_of_all = [], time.monotonic()
        before = place.victim.counters("bad1")["to_guest_packets"]
        for _ in range(5):
            start = time.monotonic()
            with FrontEnd(place.path("bad63")) as other:
                other.negotiate(FEATURES, (1 << 24) - 1)
                other.set_mem_table()
                other.start_queue(0)
                other.start_queue(1)
                other.stop_queue(1)
            times.append(time.monotonic() - start)
        copies = place.victim.counters("bad1")["to_guest_packets"] - before
        print(times, copies, "frames in", time.monotonic() - start_of_all, "s")
        assert copies > 0
        assert min(times) < 0.3, times
        assert attacker.ring.used_idx < most  # there was always more to do


# The end -----------------------------------------------------------------------------------


@each_layout
@each_device
def test_front_end_that_goes_in_the_middle_of_anything(place, kind, layout):
    name, index = QUEUES[kind]
    dice = random.Random(3)
    with place.unnoticed():
        for _ in range(40):
            attacker = Attacker(place.path(name), index, kind=layout)
            steps: list[Callable[[], object]] = [
                lambda a=attacker: offer_some(a, dice.randrange(1, SIZE // 2)),
                lambda a=attacker: a.end.send_raw(
                    encode(R.GET_VRING_BASE, VringState(index, 0))[: dice.randrange(1, 20)]
                ),
                lambda a=attacker: a.end.send_raw(encode(R.SET_VRING_ENABLE, VringState(index, 0))),
                lambda a=attacker: a.end.send_raw(encode(R.REM_MEM_REG, _region(a)), []),
                lambda a=attacker: os.ftruncate(a.end.shared.fd.fileno(), 0),
            ]
            for step in dice.sample(steps, dice.randrange(1, len(steps))):
                with contextlib.suppress(ConnectionError):
                    step()
            attacker.end.close()
        eventually(place.victim.is_quiet)


def offer_some(attacker: Attacker, count: int) -> None:
    for _ in range(count):
        attacker.ring.offer_chain((GOOD, 512), (STATUS, 512, WRITE))
    attacker.kick()


def _region(attacker: Attacker):
    from vhostpy.payloads import SingleRegion

    return SingleRegion(attacker.end.shared.regions[1])
