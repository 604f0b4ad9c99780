"""Hostile guests that are quick, loud or greedy, over sockets beside the innocent.

What they change between two looks, notifications, floods, and an end in the middle.
"""

import contextlib
import itertools
import os
import random
import struct
import time
from collections.abc import Callable
from typing import Any

from tests.backends.netguest import BROADCAST, frame, mac
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
    eventfd,
    meanwhile,
    proves_itself,
)
from tests.hostile.conftest import place_of
from tests.hostile.victim import eventually
from tests.rings import AVAIL, BORDER, DESC, END, TABLES
from vhostpy._spec import Feature
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import encode
from vhostpy.protocol.payloads import U64, VringFile, VringState

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
                used, broken = back_or_broken(attacker, 32 if layout == "split" else 16)
                assert {head for head, _ in used} <= {0, SIZE - 1}
                total += len(used)
                if broken:  # by a request that could not be answered
                    assert kind == "blk"
                    attacker.start_empty(attacker.end.stop_queue(index))
        assert total > (100 if kind == "net" else 10)
        proves_itself(attacker, kind)


def back_or_broken(attacker: Attacker, count: int) -> tuple[list[tuple[int, int]], bool]:
    """What came back: of `count` chains all, unless the ring broke."""
    used: list[tuple[int, int]] = []
    broken = False

    def enough() -> bool:
        nonlocal broken
        broken |= attacker.queue.wait_err(0)
        used.extend(attacker.ring.collect())
        return broken or len(used) >= count

    eventually(enough, "a used entry")
    return used, broken


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
        # What comes back: a frame in no memory, a request of nothing.
        attacker.offer_chain(*([(0, 8)] if kind == "net" else [(STATUS, 1, WRITE)]))
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
                last = WRITE if attacker is blk else 0  # its status
                attacker.ring.descriptor(
                    i, BORDER - 1, 64, NEXT if i < 1023 else last, i + 1, table=TABLES
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
    from vhostpy.protocol.payloads import SingleRegion

    return SingleRegion(attacker.end.shared.regions[1])
