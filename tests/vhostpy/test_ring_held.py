"""Virtqueues that control holds: stopped, resumed, moved, logged."""

import pytest

from tests.rings import (
    AVAIL,
    BORDER,
    DESC,
    GPA,
    LAYOUTS,
    USED,
    UVA,
    UVA_ABOVE,
    Rings,
    base_of,
    exchange,
    guest_memory,
)
from vhostpy._ring import ChainFault, DriverVirtqueue, Virtqueue
from vhostpy.memory.guest import GuestMemory
from vhostpy.ring.parts import sizes_of

USED_BEFORE = [0, 1, 63, 64, 127, 32767, 65530, 65535]  # descriptors, before a test starts

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_way = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
each_order = pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
each_start = pytest.mark.parametrize("used", USED_BEFORE)
each_table = pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])


# Stop, resume, move ---------------------------------------------------------------------


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


# Dirty log ------------------------------------------------------------------------------


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
