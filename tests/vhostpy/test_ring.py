"""Virtqueues, one end against the other. What a hostile guest does is in tests/hostile."""

import os
import select
import threading
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rings import (
    AVAIL,
    BORDER,
    DESC,
    GPA,
    LAYOUTS,
    TABLES,
    USED,
    UVA,
    UVA_ABOVE,
    Rings,
    base_of,
    events,
    guest_memory,
)
from vhostpy._ring import ChainFault, DriverVirtqueue, Virtqueue, sizes_of
from vhostpy.memory import GuestMemory

USED_BEFORE = [0, 1, 63, 64, 127, 32767, 65530, 65535]  # descriptors, before a test starts

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_way = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
each_order = pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
each_start = pytest.mark.parametrize("used", USED_BEFORE)
each_table = pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])

shapes = st.tuples(
    st.lists(st.binary(min_size=1, max_size=300), max_size=4),
    st.lists(st.integers(1, 300), max_size=4),
    st.booleans(),
).filter(lambda shape: shape[0] or shape[1])
steps = st.one_of(
    st.tuples(st.just("add"), st.lists(shapes, min_size=1, max_size=6)),
    st.tuples(st.just("take"), st.integers(1, 9)),
    st.tuples(st.just("put_back"), st.integers(1, 5)),
    st.tuples(st.just("give"), st.lists(st.integers(0, 20), min_size=1, max_size=6)),
    st.tuples(st.just("release"), st.integers(1, 6)),
    st.tuples(st.just("restart"), st.none()),
)


class Model:
    """What must be where, beside the real rings: offered, taken, given back."""

    def __init__(self, rings, in_order):
        self.rings = rings
        self.in_order = in_order
        self.waiting = deque()  # offers that the device can see
        self.out = []  # (sequence, taken, offer)
        self.sequence = 0
        self.rounds = 0

    def add(self, chains):
        for readable, writable, table in chains:
            table = table and bool(self.rings.features & 1 << 28)
            try:
                self.waiting.append(self.rings.add(readable, writable, table=table))
            except BufferError:
                break
        self.rings.driver.kick()

    def take(self, limit):
        taken = self.rings.device.take(limit)
        assert len(taken) <= min(limit, len(self.waiting))
        assert taken or not self.waiting
        for chain in taken:
            offer = self.waiting.popleft()
            assert chain.fault == ChainFault.CHAIN_OK
            assert self.rings.device.read(chain) == offer.data
            assert sum(length for _, length in chain.writable) == offer.room
            self.out.append((self.sequence, chain, offer))
            self.sequence += 1

    def put_back(self, limit):
        """Only the youngest can go back, and only those that are still out."""
        chains = []
        while len(chains) < limit and self.out and self.out[-1][0] == self.sequence - 1:
            self.sequence -= 1
            _, taken, offer = self.out.pop()
            self.waiting.appendleft(offer)
            chains.insert(0, taken)
        self.rings.device.put_back(chains)

    def give(self, picks):
        given = []
        for pick in picks:
            if self.out:
                _, taken, offer = self.out.pop(0 if self.in_order else pick % len(self.out))
                self.rounds += 1
                data = bytes([self.rounds % 256]) * offer.room
                assert self.rings.device.write(taken, data) == offer.room
                given.append((taken, offer, data))
        self.rings.device.give([(taken, len(data)) for taken, _, data in given])
        assert self.rings.driver.used() == [(offer.id, len(data)) for _, offer, data in given]
        for _, offer, data in given:
            assert self.rings.received(offer, len(data)) == data

    def release(self, count):
        """The oldest come back at once, unused: with IN_ORDER one used entry says so."""
        released, self.out = self.out[:count], self.out[count:]
        self.rings.device.release([taken for _, taken, _ in released])
        offers = [offer for _, _, offer in released]
        # "Skipped buffers are assumed to have been used completely."
        skipped = [self.in_order * offer.room for offer in offers[:-1]]
        assert self.rings.driver.used() == [
            (offer.id, length) for offer, length in zip(offers, [*skipped, 0], strict=False)
        ]
        for offer in offers:
            self.rings.reclaim(offer)

    def restart(self, _):
        """Stop wants nothing out; the next life goes on where this one ended."""
        self.give(range(len(self.out)))
        old = self.rings.device
        old.set_live(False)
        new = self.rings.start(old.base)
        assert new.used_index == old.used_index


@each_layout
@each_table
@each_way
@each_order
@settings(max_examples=40)
@given(
    small=st.booleans(),
    used=st.sampled_from([*USED_BEFORE, 6, 7, 13, 15, 31]),
    script=st.lists(steps, max_size=30),
)
def test_chains_cross_unchanged_and_in_order(
    layout, indirect, event_idx, in_order, small, used, script
):
    size = {"split": 4, "packed": 7}[layout] if small else 16
    with Rings(
        layout, indirect=indirect, event_idx=event_idx, in_order=in_order, size=size, used=used
    ) as rings:
        model = Model(rings, in_order)
        for verb, argument in script:
            getattr(model, verb)(argument)
        while model.waiting:
            model.take(64)
        model.give(range(len(model.out)))
        assert rings.device.inflight == 0
        assert rings.driver.free == size
        assert not rings.device.broken
        assert rings.device.base == rings.driver.base


SIZES = [
    *[(layout, size) for layout in LAYOUTS for size in (1, 2, 256, 32768)],
    *[("packed", size) for size in (3, 5, 255, 32767)],
]


@each_order
@pytest.mark.parametrize(("layout", "size"), SIZES)
def test_every_size_wraps(layout, size, in_order):
    with Rings(layout, size=size, used=65500, in_order=in_order) as rings:
        for i in range(min(3 * size, 600)):
            offer = rings.add([i.to_bytes(4, "big")], [])
            rings.driver.kick()
            (taken,) = rings.device.take()
            assert rings.device.read(taken) == i.to_bytes(4, "big")
            rings.device.give([(taken, 0)])
            assert rings.driver.used() == [(offer.id, 0)]
            rings.reclaim(offer)


@each_layout
@each_order
def test_a_full_ring_is_taken_in_bursts(layout, in_order):
    with Rings(layout, size=256, in_order=in_order) as rings:
        for _ in range(5):
            ids = [rings.driver.add([(BORDER, 60)], []) for _ in range(256)]
            with pytest.raises(BufferError):
                rings.driver.add([(BORDER, 60)], [])
            rings.driver.kick()
            bursts = [rings.device.take() for _ in range(5)]
            assert [len(burst) for burst in bursts] == [64, 64, 64, 64, 0]
            assert [taken.id for burst in bursts for taken in burst] == ids
            for burst in bursts:
                rings.device.release(burst, publish=False)
            assert rings.driver.used() == []
            rings.device.publish_pushed()
            came = rings.driver.used()
            assert [id for id, _ in came] == ids


@each_layout
@each_order
def test_a_burst_is_seen_as_a_whole(layout, in_order):
    """Until it is published the other end sees none of it, whatever was written already."""
    with Rings(layout, size=8, in_order=in_order, used=5) as rings:
        offers = [rings.add([bytes([i])], []) for i in range(6)]
        assert rings.device.take() == []
        rings.driver.kick()
        chains = rings.device.take()
        assert len(chains) == 6
        for taken in chains:
            rings.device.give([(taken, 0)], publish=False)
            assert rings.driver.used() == []
        rings.device.publish_pushed()
        assert [id for id, _ in rings.driver.used()] == [offer.id for offer in offers]


@each_layout
def test_with_in_order_one_used_entry_tells_of_a_whole_release(layout):
    with Rings(layout, in_order=True) as rings:
        offers = [rings.add([b"x"], [7 + i]) for i in range(5)]
        rings.driver.kick()
        before = rings.memory.read(DESC if layout == "packed" else USED, 4096)
        rings.device.release(rings.device.take())
        after = rings.memory.read(DESC if layout == "packed" else USED, 4096)
        entry = 16 if layout == "packed" else 8 + 4
        assert before[entry:] == after[entry:]
        assert before[:entry] != after[:entry]
        lengths = [7, 8, 9, 10, 0]
        assert rings.driver.used() == list(zip([o.id for o in offers], lengths, strict=True))


@each_layout
@each_order
@pytest.mark.parametrize("fifo", [False, True], ids=["lifo", "fifo"])
def test_free_ids_are_used_again_last_in_first_out_or_in_turn(layout, in_order, fifo):
    with Rings(layout, size=8, in_order=in_order, fifo=fifo) as rings:

        def crosses(count):
            ids = [rings.driver.add([(BORDER, 60)], []) for _ in range(count)]
            rings.driver.kick()
            rings.device.give([(taken, 0) for taken in rings.device.take()])
            assert [id for id, _ in rings.driver.used()] == ids
            return ids

        assert crosses(5) == [0, 1, 2, 3, 4]
        if fifo or in_order:
            assert crosses(5) == [5, 6, 7, 0, 1]
            assert crosses(8) == [2, 3, 4, 5, 6, 7, 0, 1]
        else:
            assert crosses(5) == [4, 3, 2, 1, 0]
            assert crosses(8) == [0, 1, 2, 3, 4, 5, 6, 7]


@each_layout
@each_order
@pytest.mark.parametrize("writable", [False, True])
def test_the_driver_adds_bursts(layout, in_order, writable):
    with Rings(layout, size=16, in_order=in_order, used=9) as rings:
        pieces = [(BORDER + 100 * i, 40 + i) for i in range(20)]
        ids = rings.driver.add_many(pieces, writable)
        assert len(ids) == 16
        assert rings.driver.free == 0
        rings.driver.kick()
        chains = rings.device.take()
        assert [taken.id for taken in chains] == ids
        assert [taken.writable if writable else taken.readable for taken in chains] == [
            [piece] for piece in pieces[:16]
        ]
        rings.device.release(chains)
        assert [id for id, _ in rings.driver.used()] == ids
        assert rings.driver.add_many(pieces[:3], writable) != []


@each_layout
def test_a_buffer_across_regions_comes_in_pieces(layout):
    with Rings(layout) as rings:
        rings.driver.add([(BORDER - 10, 30)], [])
        rings.driver.kick()
        (taken,) = rings.device.take()
        assert taken.readable == [(BORDER - 10, 10), (BORDER, 20)]


def test_direct_descriptors_may_end_in_an_indirect_one():
    """virtio 1.3, "Indirect Descriptors": the device MUST handle it, and ignore WRITE."""
    with Rings("split") as rings:
        guest = rings.guest
        guest.descriptor(0, BORDER, 10, 1, 5)
        guest.descriptor(5, TABLES, 32, 4 | 2)
        guest.descriptor(0, BORDER + 100, 20, 1, 1, table=TABLES)
        guest.descriptor(1, BORDER + 200, 30, 2, table=TABLES)
        guest.offer(0)
        (taken,) = rings.device.take()
        assert taken.readable == [(BORDER, 10), (BORDER + 100, 20)]
        assert taken.writable == [(BORDER + 200, 30)]


@each_layout
def test_an_indirect_table_may_be_longer_than_a_small_ring(layout):
    """Linux does so where its request has more pieces than the ring has descriptors."""
    with Rings(layout, size=4) as rings:
        pieces = [(BORDER + 10 * i, 5) for i in range(1024)]
        rings.driver.add(pieces, [], TABLES)
        rings.driver.kick()
        (taken,) = rings.device.take()
        assert taken.readable == pieces


@each_layout
@pytest.mark.parametrize("offset", range(1, 16))
def test_an_indirect_table_is_read_across_regions_and_at_any_alignment(layout, offset):
    with Rings(layout) as rings:
        pieces = [(BORDER + 4096 + 10 * i, 5 + i) for i in range(4)]
        rings.driver.add(pieces[:2], pieces[2:], BORDER - 32 - offset)
        rings.driver.kick()
        (taken,) = rings.device.take()
        assert (taken.readable, taken.writable) == (pieces[:2], pieces[2:])


# Calls: the device notifies the driver.


def exchange(rings, count=1):
    """`count` chains go there and back, with one publish; how often the driver was called."""
    offers = [rings.add([b"x"], []) for _ in range(count)]
    rings.driver.kick()
    rings.device.give([(taken, 0) for taken in rings.device.take()])
    assert len(rings.driver.used()) == count
    for offer in offers:
        rings.reclaim(offer)
    return rings.calls()


@each_layout
def test_calls_come_at_each_publish_unless_the_flag_says_no(layout):
    with Rings(layout) as rings:
        assert [exchange(rings, 3) for _ in range(3)] == [1, 1, 1]
        rings.driver.disarm()
        assert [exchange(rings, 3) for _ in range(3)] == [0, 0, 0]
        rings.driver.arm()
        assert exchange(rings) == 1


@each_layout
@each_start
def test_with_event_idx_a_call_comes_only_when_used_event_is_passed(layout, used):
    with Rings(layout, event_idx=True, used=used) as rings:
        assert exchange(rings) == 1  # the first after a start, whatever used_event says
        assert [exchange(rings, 5) for _ in range(3)] == [0, 0, 0]
        assert rings.driver.arm() is False
        assert [exchange(rings, 5) for _ in range(3)] == [1, 0, 0]
        rings.guest.want_call_after(rings.device.used_index, 7)
        assert [exchange(rings, 5) for _ in range(3)] == [0, 1, 0]
        rings.guest.want_call_after(rings.device.used_index, 5)
        assert [exchange(rings, n) for n in (5, 1, 1)] == [0, 1, 0]  # the sixth, not before


@each_layout
def test_with_event_idx_the_first_publish_of_each_life_calls(layout):
    with Rings(layout, event_idx=True) as rings:
        exchange(rings)
        assert exchange(rings) == 0
        rings.start(rings.device.base)
        assert exchange(rings) == 1
        assert exchange(rings) == 0
        rings.device.set_live(False)
        rings.device.base = rings.device.base
        assert exchange(rings) == 1


@each_layout
@each_way
def test_a_new_call_fd_is_signalled_once(layout, event_idx):
    with Rings(layout, event_idx=event_idx) as rings:
        other = os.eventfd(0, os.EFD_NONBLOCK)
        with pytest.raises(RuntimeError):
            rings.device.set_call(other)
        rings.device.set_live(False)
        rings.device.set_call(other)
        rings.device.set_live(True)
        assert events(other) == 1
        rings.driver.arm()
        assert exchange(rings) == 0
        assert events(other) == 1
        rings.device.notify()
        assert events(other) == 1
        os.close(other)


@each_layout
def test_without_a_call_fd_nobody_is_called(layout):
    with Rings(layout) as rings:
        rings.start(call_fd=-1)
        assert exchange(rings) == 0
        assert rings.device.calls == 0


@each_layout
@each_way
def test_arm_tells_the_driver_of_chains_that_came_before(layout, event_idx):
    with Rings(layout, event_idx=event_idx) as rings:
        rings.add([b"x"], [])
        rings.driver.kick()
        rings.device.give([(rings.device.take()[0], 0)])
        assert rings.driver.arm() is True
        rings.driver.used()
        assert rings.driver.arm() is False


# Kicks: the driver notifies the device.


@each_layout
def test_kicks_come_at_each_publish_until_chains_are_taken(layout):
    with Rings(layout) as rings:
        assert rings.device.want_kicks() is False
        for _ in range(3):
            rings.add([b"x"], [])
            assert rings.driver.kick() is True
            assert rings.kicks() == 1
        rings.device.take(1)  # who polls needs no kick
        rings.add([b"x"], [])
        assert rings.driver.kick() is False
        assert rings.kicks() == 0
        assert rings.device.want_kicks() is True  # there are some
        assert len(rings.device.take()) + len(rings.device.take()) == 3
        assert rings.device.want_kicks() is False
        rings.device.refuse_kicks()
        rings.add([b"x"], [])
        assert rings.driver.kick() is False


@each_layout
@each_start
def test_with_event_idx_one_kick_comes_for_each_arm(layout, used):
    with Rings(layout, event_idx=True, used=used) as rings:
        assert rings.device.want_kicks() is False
        kicks = []
        for _ in range(4):
            rings.add([b"x"], [])
            kicks.append(rings.driver.kick())
        assert kicks == [True, False, False, False]
        assert rings.device.want_kicks() is True
        assert len(rings.device.take()) == 4
        assert rings.device.want_kicks() is False
        rings.add([b"x"], [])
        assert rings.driver.kick() is True
        if layout == "split":
            assert rings.guest.u16(USED) == 0  # virtio 1.3: MUST be 0 with EVENT_IDX


@each_layout
@each_way
def test_a_kick_can_be_forced(layout, event_idx):
    with Rings(layout, event_idx=event_idx) as rings:
        rings.device.refuse_kicks()
        assert rings.driver.kick(force=True) is True
        assert rings.kicks() == 1


@each_layout
@each_way
def test_put_back_chains_are_seen_by_arm(layout, event_idx):
    with Rings(layout, event_idx=event_idx) as rings:
        rings.add([b"x"], [])
        rings.driver.kick()
        chains = rings.device.take()
        assert rings.device.want_kicks() is False
        rings.device.put_back(chains)
        assert rings.device.want_kicks() is True


@each_layout
@each_way
def test_two_sleepers_never_miss_each_other(layout, event_idx):
    """Each end sleeps as soon as it is idle: a lost notification would hang both."""
    rounds = 1000
    with Rings(layout, event_idx=event_idx, size=8) as rings:
        failed = []

        def serve():
            served = 0
            while served < rounds:
                chains = rings.device.take(3)
                if chains:
                    rings.device.give([(taken, 0) for taken in chains])
                    served += len(chains)
                elif not rings.device.want_kicks():
                    if not select.select([rings.kick_fd], [], [], 20)[0]:
                        failed.append("no kick")
                        return
                    rings.kicks()
                    rings.device.refuse_kicks()

        thread = threading.Thread(target=serve)
        thread.start()
        added = back = 0
        while back < rounds and not failed:
            while added < rounds and rings.driver.free:
                rings.driver.add([(BORDER, 60)], [])
                added += 1
            rings.driver.kick()
            came = len(rings.driver.used())
            back += came
            if not came and not rings.driver.arm():
                if not select.select([rings.call_fd], [], [], 20)[0]:
                    failed.append("no call")
                rings.calls()
                rings.driver.disarm()
        thread.join()
        assert failed == []
        assert back == rounds


# Stop, resume, move.


@each_layout
@each_start
def test_what_was_put_back_before_a_stop_comes_again_after_it(layout, used):
    with Rings(layout, used=used) as rings:
        offers = [rings.add([bytes([i])], []) for i in range(5)]
        rings.driver.kick()
        taken = rings.device.take(4)
        rings.device.give([(taken[0], 0)])
        rings.device.put_back(taken[1:])
        rings.device.set_live(False)
        assert rings.device.inflight == 0
        assert rings.device.base == base_of(layout, 64, used + 1)
        rings.start(rings.device.base)
        again = rings.device.take()
        assert [rings.device.read(chain) for chain in again] == [b"\1", b"\2", b"\3", b"\4"]
        rings.device.give([(chain, 0) for chain in again])
        assert [id for id, _ in rings.driver.used()] == [offer.id for offer in offers]


def test_the_used_index_comes_from_the_ring_itself():
    """SET_VRING_BASE says only where the avail index stands."""
    with Rings("split") as rings:
        rings.guest.put_u16(USED + 2, 65000)
        rings.start(65002)
        assert rings.device.used_index == 65000
        rings.guest.put_u16(USED + 2, 12)
        rings.guest.put_u16(AVAIL + 2, 65003)
        assert len(rings.device.take()) == 1
        rings.device.set_live(False)
        rings.device.base = 12
        assert (rings.device.base, rings.device.used_index) == (12, 12)
        assert rings.device.inflight == 0


@pytest.mark.parametrize("wrap", [0, 1])
@pytest.mark.parametrize("index", [0, 1, 63])
def test_a_packed_base_has_the_used_position_above_the_avail_position(wrap, index):
    with Rings("packed") as rings:
        avail = wrap << 15 | index
        rings.start(0x8001 << 16 | avail)
        assert rings.device.base == 0x8001 << 16 | avail
        assert rings.device.used_index == 0x8001
        # DPDK's virtio-user names the avail position only: nothing is out.
        rings.start(avail)
        assert rings.device.base == avail << 16 | avail


def test_a_packed_ring_starts_with_both_wrap_counters_at_1():
    with Rings("packed") as rings:
        assert rings.device.base == rings.driver.base == 0x8000_8000


@each_layout
def test_a_live_ring_refuses_to_be_changed(layout):
    with Rings(layout) as rings:
        place = {"desc_uva": UVA, "avail_uva": UVA + 65536, "used_uva": UVA + 131072}
        for change in (
            lambda: rings.device.remap(rings.memory),
            lambda: rings.device.set_addresses(**place),
            lambda: rings.device.set_log(None, None),
            lambda: setattr(rings.device, "base", 1),
        ):
            with pytest.raises(RuntimeError):
                change()


@each_layout
def test_a_ring_goes_on_in_a_new_generation_of_memory(layout):
    with Rings(layout) as rings:
        offers = [rings.add([bytes([i])], []) for i in range(3)]
        rings.driver.kick()
        first = rings.device.take(1)
        rings.device.set_live(False)
        new = guest_memory(rings.fd)
        rings.device.remap(new)
        rings.device.set_live(True)
        assert rings.device.memory is new
        rest = rings.device.take()
        assert [rings.device.read(taken) for taken in rest] == [b"\1", b"\2"]
        rings.device.give([(taken, 0) for taken in first + rest])
        assert [id for id, _ in rings.driver.used()] == [offer.id for offer in offers]


@each_layout
def test_memory_that_a_new_generation_lacks_is_memory_no_more(layout):
    with Rings(layout) as rings:
        rings.driver.add([(BORDER + 4096, 60)], [])
        rings.driver.kick()
        (taken,) = rings.device.take()
        assert taken.fault == ChainFault.CHAIN_OK
        rings.device.put_back([taken])
        rings.device.set_live(False)
        rings.device.remap(GuestMemory(rings.memory.regions[:1]))
        assert rings.device.take()[0].fault == ChainFault.CHAIN_UNMAPPED


@each_layout
def test_a_ring_goes_on_at_new_addresses(layout):
    with Rings(layout, size=8) as rings:
        assert exchange(rings, 5) == 1
        offer = rings.add([b"here"], [])
        rings.driver.kick()
        sizes = sizes_of(8, rings.features)
        for gpa, size in zip((DESC, AVAIL, USED), sizes, strict=True):
            rings.memory.write(gpa - GPA + BORDER, rings.memory.read(gpa, size))
            rings.memory.write(gpa, bytes(size))
        rings.device.set_live(False)
        rings.device.set_addresses(
            desc_uva=DESC - GPA + UVA_ABOVE,
            avail_uva=AVAIL - GPA + UVA_ABOVE,
            used_uva=USED - GPA + UVA_ABOVE,
        )
        rings.device.set_live(True)
        (taken,) = rings.device.take()
        assert rings.device.read(taken) == b"here"
        rings.device.give([(taken, 0)])
        for gpa, size in zip((DESC, AVAIL, USED), sizes, strict=True):
            assert rings.memory.read(gpa, size) == bytes(size)
            rings.memory.write(gpa, rings.memory.read(gpa - GPA + BORDER, size))
        assert rings.driver.used() == [(offer.id, 0)]


@each_layout
@each_way
def test_the_exact_sizes_are_enough(layout, event_idx):
    """libblkio maps rings that end with their last byte."""
    with Rings(layout, event_idx=event_idx) as rings:
        sizes = sizes_of(16, rings.features)
        ends = [UVA_ABOVE + (2 << 20) - size for size in sizes]
        for part, unit in ((0, 16), (1, 4), (2, 4)):
            places = [UVA, UVA + 65536, UVA + 131072]
            places[part] = ends[part] // unit * unit
            names = ("desc_uva", "avail_uva", "used_uva")
            Virtqueue(rings.memory, 16, rings.features, **dict(zip(names, places, strict=True)))
        # Enough for any features.
        room = DriverVirtqueue.ring_bytes(16)
        assert room == (256, 38, 134)
        assert all(most >= size for most, size in zip(room, sizes, strict=True))


# Dirty log.


def page(gpa):
    return gpa // 4096


def pages_of_used(layout, size, first, count):
    """Where `count` used entries are written from index `first` on, and what says so."""
    places = {(first + i) % size for i in range(count)}
    if layout == "packed":
        return {page(DESC + 16 * index) for index in places}
    ends = [end for index in places for end in (4 + 8 * index, 4 + 8 * index + 7)]
    return {page(USED), *(page(USED + end) for end in ends)}


@each_layout
@each_way
def test_the_log_has_the_pages_that_were_written_and_no_others(layout, event_idx):
    with Rings(layout, event_idx=event_idx) as rings:
        rings.device.refuse_kicks()
        log = rings.log()
        assert log.pages() == []
        rings.driver.add([(BORDER + 8192, 100)], [(BORDER + 20480 - 10, 50), (GPA + (1 << 20), 99)])
        rings.driver.kick()
        (taken,) = rings.device.take()
        written = rings.device.write(taken, bytes(30))
        rings.device.give([(taken, written)], publish=False)
        assert page(BORDER + 20480) not in log.pages()
        rings.device.publish_pushed()
        data = {page(BORDER + 16384), page(BORDER + 20480)}
        assert log.pages() == sorted(data | pages_of_used(layout, 64, 0, 1))


@each_layout
@each_way
def test_asking_for_kicks_is_logged(layout, event_idx):
    with Rings(layout, event_idx=event_idx, size=1024) as rings:
        log = rings.log()
        rings.device.want_kicks()
        event = USED + 4 + 8 * 1024 if event_idx and layout == "split" else USED
        assert log.pages() == [page(event)]
        log = rings.log()
        rings.device.refuse_kicks()
        # A split ring's avail_event stays: it is passed.
        assert log.pages() == ([] if event_idx and layout == "split" else [page(USED)])


@each_layout
@each_order
def test_used_entries_are_logged_across_the_rings_end(layout, in_order):
    with Rings(layout, size=2048, used=2040, in_order=in_order) as rings:
        rings.device.refuse_kicks()
        log = rings.log()
        for _ in range(600):
            rings.driver.add([(BORDER, 60)], [])
        rings.driver.kick()
        while chains := rings.device.take():
            rings.device.release(chains, publish=False)
        rings.device.publish_pushed()
        assert log.pages() == sorted(pages_of_used(layout, 2048, 2040, 600))


@each_layout
def test_more_writes_than_the_log_collects_are_all_logged(layout):
    with Rings(layout, size=512) as rings:
        rings.device.refuse_kicks()
        log = rings.log()
        places = [GPA + (1 << 20) + 8192 * i for i in range(200)]
        for gpa in places:
            rings.driver.add([], [(gpa, 64)])
        rings.driver.kick()
        while chains := rings.device.take():
            for taken in chains:
                rings.device.write(taken, b"x")
            rings.device.give([(taken, 1) for taken in chains], publish=False)
        rings.device.publish_pushed()
        assert log.pages() == sorted({*map(page, places), *pages_of_used(layout, 512, 0, 200)})


@each_layout
def test_a_log_that_was_taken_away_is_left_alone(layout):
    with Rings(layout) as rings:
        rings.device.refuse_kicks()
        log = rings.log()
        rings.driver.add([], [(BORDER + 4096, 60)])
        rings.driver.kick()
        (taken,) = rings.device.take()
        rings.device.write(taken, b"before")
        rings.device.set_live(False)
        rings.device.set_log(None, None)
        rings.device.set_live(True)
        before = [page(BORDER + 4096)]
        assert log.pages() == before
        rings.device.give([(taken, 6)])
        assert len(rings.driver.used()) == 1
        rings.proves_itself()
        assert log.pages() == before
