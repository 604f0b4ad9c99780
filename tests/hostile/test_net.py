"""Net ports of hostile guests: what they do harms neither us nor their neighbours.

Chains and rings that are wrong by themselves are in test_rings.py; here is what they do
to frames, to the switch and to an innocent pair of guests on the same one.
"""

import random
import struct
import threading
import time

import pytest

from tests.backends.netguest import (
    BROADCAST,
    INDIRECT,
    MODERN,
    PAGE,
    VERSION_1,
    Guest,
    frame,
    mac,
)
from tests.vswitch.net import LATER, net
from vhostpy.backends.net.device import NetDevice
from vhostpy.runtime.pool import Workers
from vhostpy.vswitch.switch import Switch

NEXT, WRITE, INDIRECT_FLAG = 1, 2, 4
NOWHERE = 1 << 40


class Neighbours:
    """A hostile guest, and two innocent ones that exchange checked frames."""

    def __init__(self, *, features: int = MODERN, full_wait_us: int = 0, **more) -> None:
        self.switch = Switch(Workers(1), full_wait_us=full_wait_us, **more)
        self.hostile = Guest(NetDevice("hostile", self.switch), features=features)
        self.innocent = [
            Guest(NetDevice(f"vu{i}", self.switch), memory_bytes=1 << 30) for i in (1, 2)
        ]
        for i in (0, 1, 2):
            self.switch.fdb.seen(mac(i), i)
        self.tag = 0

    def turns(self, guest: Guest, count: int = 1) -> None:
        for _ in range(count):
            self.switch.forwarder(guest.device.port).turn()

    def exchange(self, count: int = 4) -> None:
        """Innocent frames still arrive, whole and in order."""
        first, second = self.innocent
        for sender, receiver, to, source in ((first, second, 2, 1), (second, first, 1, 2)):
            receiver.used()
            while receiver.drivers[0].free:
                receiver.post(2048)
            frames = [frame(mac(to), mac(source), 60 + i, self.tag + i) for i in range(count)]
            self.tag += count
            for data in frames:
                sender.send(data)
            sender.kick()
            self.turns(sender, 2)
            assert receiver.received() == frames
            sender.sent()


class Raw:
    """Writes what it likes into one of a guest's rings."""

    def __init__(self, guest: Guest, index: int) -> None:
        self.memory = guest.memory
        self.desc, self.avail, self.used = guest.places[index]
        self.size = guest.queues[index].size
        self.next = 0

    def descriptor(self, at: int, gpa: int, length: int, flags: int = 0, next: int = 0) -> None:
        self.memory.write(self.desc + 16 * at, struct.pack("<QIHH", gpa, length, flags, next))

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.memory.write(
                self.avail + 4 + 2 * (self.next % self.size), head.to_bytes(2, "little")
            )
            self.next = (self.next + 1) & 0xFFFF
        self.memory.write(self.avail + 2, self.next.to_bytes(2, "little"))

    @property
    def used_index(self) -> int:
        return int.from_bytes(self.memory.read(self.used + 2, 2), "little")

    def used_entry(self, at: int) -> tuple[int, int]:
        where = self.used + 4 + 8 * (at % self.size)
        return struct.unpack("<II", self.memory.read(where, 8))  # type: ignore[return-value]


# What it sends ---------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [range(1, 72), range(1, 13), [1], [11], [12], [13], [1, 2, 3, 71]])
def test_a_header_over_any_number_of_descriptors(cuts):
    # CVE-2022-2132
    n = Neighbours()
    n.hostile.send(frame(mac(1), mac(0)), cuts=cuts)
    n.hostile.kick()
    n.innocent[0].post(2048)
    n.turns(n.hostile)
    assert n.innocent[0].received() == [frame(mac(1), mac(0))]


@pytest.mark.parametrize("length", range(1, 26))
def test_a_chain_shorter_than_its_headers(length):
    # CVE-2022-2132
    n = Neighbours()
    for cuts in ((), range(1, length)):
        n.hostile.send(b"", header=bytes(length), cuts=cuts)
    n.hostile.kick()
    n.turns(n.hostile, 2)
    assert n.hostile.drops() == {"too_short": 2}
    n.exchange()


def test_a_frame_whose_end_is_not_mapped():
    # CVE-2018-1059
    n = Neighbours()
    end = 64 << 20
    n.hostile.drivers[1].add([(end - 100, 200)], [])
    n.hostile.drivers[1].add([(end - 100, 100), (end, 100)], [])
    n.hostile.kick()
    n.turns(n.hostile, 2)
    assert n.hostile.drops() == {"bad_chain": 2}
    assert n.hostile.counters()["unmapped"] == 2
    n.exchange()


def test_virtio_headers_that_ask_for_offloads_change_nothing():
    # CVE-2024-11614: csum_start and csum_offset past the end; gso_type of everything.
    n = Neighbours()
    n.innocent[0].post(2048, count=8)
    for _ in range(8):
        n.hostile.send(frame(mac(1), mac(0)), header=b"\xff" * 12)
    n.hostile.kick()
    n.turns(n.hostile)
    assert n.innocent[0].received() == [frame(mac(1), mac(0))] * 8


def test_what_was_decided_upon_is_what_arrives():
    # The destination changes all the time while frames are looked up and copied.
    workers = Workers(1)
    switch = Switch(workers, full_wait_us=1000)
    hostile = Guest(NetDevice("hostile", switch), memory_bytes=1 << 30)
    innocent = [Guest(NetDevice(f"vu{i}", switch), memory_bytes=1 << 30) for i in (1, 2)]
    for i in (0, 1, 2):
        switch.fdb.seen(mac(i), i)
    shared = hostile.allocate(4096, PAGE)
    whole = [bytes(12) + frame(mac(i), mac(0), 1500) for i in (1, 2)]
    hostile.memory.write(shared, whole[0])
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for i in (0, 1):
                hostile.memory.write(shared + 12, whole[i][12:18])

    flipper = threading.Thread(target=flip)
    workers.start()
    flipper.start()
    arrived = [0, 0]
    try:
        end = time.monotonic() + 30
        while min(arrived) < 500:
            assert time.monotonic() < end, arrived
            hostile.sent()
            while hostile.drivers[1].free:
                hostile.drivers[1].add([(shared, len(whole[0]))], [])
            hostile.kick()
            for i, guest in enumerate(innocent):
                for data in guest.received():
                    assert data[:6] == mac(i + 1)
                    assert data[6:] == whole[i][18:]
                    arrived[i] += 1
                while guest.drivers[0].free:
                    guest.post(2048)
    finally:
        stop.set()
        flipper.join()
        workers.stop()


def test_made_up_sources_push_no_neighbour_out_of_the_table():
    n = Neighbours(fdb_limit=256)
    for start in range(0, 2000, 100):
        for number in range(start, start + 100):
            n.hostile.send(frame(BROADCAST, mac(1000 + number)))
        n.hostile.kick()
        n.turns(n.hostile, 3)
        n.hostile.sent()
    assert n.switch.fdb.count == 256
    assert n.switch.fdb.refused > 0
    assert [n.switch.fdb.port_behind(mac(i)) for i in (1, 2)] == [1, 2]
    n.switch.fdb.flush(1)
    n.exchange()
    assert n.switch.fdb.port_behind(mac(1)) == 1


def test_a_storm_of_the_longest_frames_takes_bounded_turns():
    switch = Switch(Workers(1), full_wait_us=0)
    hostile = Guest(NetDevice("hostile", switch))
    others = [Guest(NetDevice(f"vu{i}", switch), memory_bytes=16 << 20) for i in range(20)]
    for guest in others:
        guest.post(66000, count=64)
    storm = [frame(BROADCAST, mac(0), 65000, i) for i in range(64)]
    for data in storm:
        hostile.send(data)
    hostile.kick()
    forwarder = switch.forwarder(hostile.device.port)
    arrived = 0
    while forwarder.turn():
        total = sum(g.counters()["to_guest_bytes"] for g in others)
        assert total - arrived <= 2 * (512 << 10) + 65000
        arrived = total
    for guest in others:
        assert guest.received() == storm


# How it receives ----------------------------------------------------------------------------


def test_a_guest_that_never_returns_buffers_costs_its_neighbours_one_wait():
    n = Neighbours(full_wait_us=100)
    first = n.innocent[0]
    forwarder = n.switch.forwarder(first.device.port)
    now = 1000
    for number in range(50):
        first.send(frame(mac(0), mac(1), 60, number))
        first.send(frame(mac(2), mac(1), 60, number))
        first.kick()
        if number == 0:
            forwarder.turn(now=now)
            now += n.switch.full_wait_ticks
        forwarder.turn(now=now)
        now += 1
        n.innocent[1].post(2048)
    assert n.hostile.drops() == {"receiver_full": 50}
    assert forwarder.turn(now=LATER) == 0
    assert len(first.sent()) == 100


@pytest.mark.parametrize("features", [MODERN, VERSION_1 | INDIRECT])
def test_buffers_whose_end_is_not_mapped_are_not_written_to(features):
    # CVE-2018-1059
    n = Neighbours(features=features)
    end = 64 << 20
    before = n.hostile.memory.read(end - 100, 100)
    n.hostile.post_bad([(end - 100, 2000)])
    n.hostile.post_bad([(end - 50, 50), (end, 2000)])
    n.hostile.post(2048)
    n.innocent[0].send(frame(mac(0), mac(1)))
    n.innocent[0].kick()
    n.turns(n.innocent[0])
    assert n.hostile.received() == [frame(mac(0), mac(1))]
    assert n.hostile.memory.read(end - 100, 100) == before
    assert n.hostile.device.status()["queues"][0]["buffer_faults"]["unmapped"] == 2


def test_a_frame_is_not_written_in_part_into_buffers_of_which_one_is_bad():
    n = Neighbours()
    n.hostile.post(500)
    (first,) = n.hostile.posted[0, 0]
    n.hostile.post_bad()
    n.innocent[0].send(frame(mac(0), mac(1), 1000))
    n.innocent[0].kick()
    n.turns(n.innocent[0])
    assert n.hostile.memory.read(*first) == bytes(500)
    assert [length for _, length in n.hostile.used()] == [0, 0]
    assert n.hostile.drops() == {"receiver_full": 1}


def test_buffers_in_memory_that_is_not_shared_are_passed_over():
    """As of a guest with a dimm whose backend lacks share=on: it loses no frame by it."""
    n = Neighbours()
    sent = [frame(mac(0), mac(1), 60 + i, i) for i in range(64)]
    for _ in range(20):
        for _ in range(64):
            n.hostile.post(2048)
            n.hostile.post_bad()
        for data in sent:
            n.innocent[0].send(data)
        n.innocent[0].kick()
        n.turns(n.innocent[0])
        assert n.hostile.received() == sent
        n.innocent[0].sent()
    assert n.hostile.drops() == {}
    assert n.hostile.counters()["unmapped"] > 20 * 60
    assert not n.hostile.queues[0].broken


def test_receive_chains_that_cost_much_cost_a_broadcast_one_of_them_and_then_their_ring():
    size = 8192
    n = Neighbours()
    n.hostile.stop()
    hostile = Guest(n.hostile.device, features=VERSION_1, size=size)
    raw = Raw(hostile, 0)
    loop = [struct.pack("<QIHH", PAGE, 1, WRITE | NEXT, (i + 1) % size) for i in range(size)]
    hostile.memory.write(raw.desc, b"".join(loop))
    raw.offer(*range(size - 1))
    first, second = n.innocent

    def cost() -> int:
        before = hostile.counters().get("too_many_segments", 0)
        first.send(frame(BROADCAST, mac(1)))
        first.kick()
        second.post(2048)
        n.turns(first)
        assert second.received() == [frame(BROADCAST, mac(1))]
        return hostile.counters()["too_many_segments"] - before

    costs = [cost() for _ in range(50)]
    assert max(costs) == 1
    assert sum(costs) == 16
    assert hostile.queues[0].condemned
    assert hostile.drops() == {"buffer_fault": 16, "receiver_down": 34}
    n.exchange()


def test_what_receivers_chains_cost_ends_a_turn():
    n = net(4, buffers=0)
    for g in (n[1], n[2], n[3]):
        g.post(*[40] * 50, count=4)
    n.send(0, frame(BROADCAST, mac(0)), frame(BROADCAST, mac(0), 61))
    arrived = []
    for _ in range(3):
        n.turn(0, steps=100)
        arrived.append([len(g.received()) for g in n.guests[1:]])
    assert arrived == [[2, 0, 0], [0, 2, 0], [0, 0, 2]]
    assert n.turn(0) == 0
    assert n.drops() == [{}] * 4


@pytest.mark.parametrize("length", [1, 2, 11, 12, 13])
def test_tiny_buffers_end_in_a_bounded_time(length):
    n = Neighbours()
    n.hostile.post(length, count=256)
    for number in range(64):
        n.innocent[0].send(frame(mac(0), mac(1), 1500, number))
    n.innocent[0].kick()
    n.turns(n.innocent[0], 2)
    n.hostile.received()
    assert sum(n.hostile.drops().values()) + n.hostile.counters()["to_guest_packets"] == 64
    n.exchange()


def test_buffers_that_lie_upon_each_other_and_upon_the_rings_harm_only_their_owner():
    n = Neighbours()
    raw = Raw(n.hostile, 0)
    for at, gpa in enumerate([raw.desc, raw.avail, raw.used, raw.used, PAGE * 20, PAGE * 20]):
        raw.descriptor(at, gpa, 4096, WRITE)
    raw.offer(*range(6))
    for _ in range(6):
        n.innocent[0].send(frame(mac(0), mac(1), 1500))
    n.innocent[0].kick()
    n.turns(n.innocent[0], 2)
    n.exchange()


# Its rings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_a_ring_whose_index_jumps_is_left_alone(index):
    n = Neighbours()
    raw = Raw(n.hostile, index)
    n.hostile.memory.write(raw.avail + 2, (1000).to_bytes(2, "little"))
    n.innocent[0].send(frame(mac(0), mac(1)))
    n.innocent[0].kick()
    n.turns(n.innocent[0])
    n.turns(n.hostile, 3)
    assert n.hostile.queues[index].broken
    assert raw.used_index == 0
    # A receiver whose ring broke is down; one that posted no buffers is full.
    assert n.hostile.drops() == {"receiver_full" if index else "receiver_down": 1}
    n.exchange()


def test_control_is_told_once_that_a_ring_broke():
    n = Neighbours()
    raw = Raw(n.hostile, 1)
    n.hostile.memory.write(raw.avail + 2, (1000).to_bytes(2, "little"))
    n.turns(n.hostile, 5)
    with open(n.switch.workers.bell_fd, "rb", buffering=0, closefd=False) as fd:
        assert int.from_bytes(fd.read(8), "little") == 1


def random_descriptor(random_: random.Random, size: int) -> tuple[int, int, int, int]:
    gpa = random_.choice(
        [random_.randrange(64 << 20), (64 << 20) - random_.randrange(3000), NOWHERE, 2**64 - 1]
    )
    length = random_.choice([0, 1, 12, 26, 60, 1500, 9000, 70000, 0xFFFFFFFF])
    flags = random_.choice([0, WRITE, NEXT, NEXT | WRITE, INDIRECT_FLAG, INDIRECT_FLAG | NEXT, 7])
    return gpa, length, flags, random_.choice([random_.randrange(size), size, 0xFFFF])


@pytest.mark.parametrize("features", [MODERN, VERSION_1 | INDIRECT])
@pytest.mark.parametrize("seed", range(4))
def test_rings_full_of_nonsense(features, seed):
    n = Neighbours(features=features)
    random_ = random.Random(seed)
    receiving, sending = Raw(n.hostile, 0), Raw(n.hostile, 1)
    for _ in range(100):
        for raw in (receiving, sending):
            for at in range(raw.size):
                raw.descriptor(at, *random_descriptor(random_, raw.size))
        offered = receiving.used_index, sending.next
        outstanding = (receiving.next - offered[0]) & 0xFFFF
        receiving.offer(*(random_.randrange(256) for _ in range(min(60, 256 - outstanding))))
        sending.offer(*(random_.randrange(256) for _ in range(60)))
        n.innocent[0].send(frame(mac(0), mac(1), random_.choice([60, 1500, 9000])))
        n.turns(n.hostile, 3)
        n.switch.forwarder(n.hostile.device.port).turn(now=LATER)
        assert sending.used_index == sending.next, "every chain comes back"
        n.exchange()
        for guest in n.innocent:
            guest.received()
    assert not n.hostile.queues[0].broken and not n.hostile.queues[1].broken
    counters = n.hostile.device.status()["queues"][0]
    assert counters["from_guest_packets"] == 6000
    faults = sum(counters["chain_faults"].values())
    assert faults == counters["drops"]["bad_chain"] > 1000
