"""Chains, requests and indexes of hostile guests, over sockets beside the innocent.

Each line of attacks has its test at the module's level elsewhere: rings in test_rings.py,
devices in test_net.py and test_blk.py. Here they meet a process that serves others too:
two guests that exchange frames and one that uses a disk, who must not notice.
"""

import os
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.backends.netguest import frame, mac
from tests.hostile.attacker import (
    FEATURES,
    GOOD,
    INDIRECT,
    NEXT,
    QUEUES,
    SIZE,
    STATUS,
    WRITE,
    Attacker,
    each_device,
    each_layout,
    proves_itself,
)
from tests.rings import AVAIL, BORDER, DESC, END, GPA, TABLES, USED

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


@each_bad_chain
def test_bad_frame_comes_back_and_is_counted_by_name(place, layout, fault, offer):
    name, index = QUEUES["net"]
    with place.unnoticed(), Attacker(place.path(name), index, kind=layout) as attacker:
        before = place.victim.counters(name)
        for _ in range(4):
            for _ in range(10):
                offer(attacker.ring, 0)
            attacker.kick()
            assert attacker.comes_back(10) == [(0, 0)] * 10
        proves_itself(attacker, "net")
        after = place.victim.counters(name)
        assert after[f"chain_faults.{fault}"] == before[f"chain_faults.{fault}"] + 40
        assert after["drops.bad_chain"] == before["drops.bad_chain"] + 40


@each_bad_chain
def test_bad_request_is_an_error_or_breaks_its_ring_and_is_counted_by_name(
    place, layout, fault, offer
):
    name, index = QUEUES["blk"]
    with place.unnoticed(), Attacker(place.path(name), index, kind=layout) as attacker:
        before = place.victim.counters(name)
        for _ in range(4):
            for _ in range(10):
                offer(attacker.ring, 0)
            attacker.kick()
            if fault == "bad_order":  # the only one with a place for its status
                assert attacker.comes_back(10) == [(0, 1)] * 10
            else:
                assert attacker.queue.wait_err()
                attacker.start_empty(attacker.end.stop_queue(index))
        proves_itself(attacker, "blk")
        after = place.victim.counters(name)
        count = 40 if fault == "bad_order" else 4
        assert after[f"chain_faults.{fault}"] == before[f"chain_faults.{fault}"] + count


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
def test_requests_without_a_header_come_back_and_one_without_a_status_breaks_its_ring(
    place, layout
):
    with place.unnoticed(), Attacker(place.path("badram"), kind=layout) as attacker:
        before = place.victim.counters("badram")
        attacker.offer_chain((GOOD, 15), (STATUS, 1, WRITE), id=1)  # a header too short
        attacker.offer_chain((STATUS, 1, WRITE), id=3)  # none at all
        attacker.offer_chain((GOOD, 16), id=0)  # no status
        assert attacker.comes_back(2) == [(1, 1), (3, 1)]
        assert attacker.queue.wait_err()
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
        attacker.start_empty(attacker.end.stop_queue(index))
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
        attacker.start_empty(attacker.end.stop_queue(index))
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
