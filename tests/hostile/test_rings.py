"""Rings that a hostile guest or front-end builds: dropped and counted, and no more.

Each bad chain must come out with its reason and nothing else, go back unused, and leave
a ring on which the next good chain still works; a ring whose indexes lie stays broken
until it is started anew. Reads and writes outside guest memory would crash the process.
"""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rings import (
    AVAIL,
    BORDER,
    DESC,
    END,
    EVENT_IDX,
    GPA,
    INDIRECT,
    LAYOUTS,
    NEXT,
    TABLES,
    USED,
    UVA,
    WRITE,
    Rings,
    events,
)
from vhostpy._ring import ChainFault, Virtqueue
from vhostpy.errors import GuestError, ProtocolError
from vhostpy.memory import DirtyLog, GuestMemory, Mapping, RegionInfo

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
SIZE = 64
GOOD = BORDER + 4096  # a buffer


def refuse(rings, fault, head=0):
    """The chain at `head` is taken as faulty, given back unused; the ring still works."""
    rings.guest.offer(head)
    before = rings.guest.used_idx
    (taken,) = rings.device.take()
    assert (taken.id, taken.fault) == (head, fault)
    assert taken.readable == taken.writable == []
    assert rings.device.inflight == 1
    rings.device.give([(taken, 0)])
    assert rings.guest.used_idx == (before + 1) % 65536
    assert rings.guest.used(before) == (head, 0)
    works(rings)


def works(rings):
    """A good chain of two pieces, next to whatever else stands in the table."""
    guest, last = rings.guest, rings.size - 1
    guest.descriptor(last, GOOD, 5, NEXT, last - 1)
    guest.descriptor(last - 1, GOOD + 100, 7, WRITE)
    guest.memory.write(GOOD, b"alive")
    guest.offer(last)
    (taken,) = rings.device.take()
    assert taken.fault == ChainFault.CHAIN_OK
    assert rings.device.read(taken) == b"alive"
    assert rings.device.write(taken, b"and how") == 7
    rings.device.give([(taken, 7)])
    assert guest.used(guest.used_idx - 1) == (last, 7)
    assert guest.memory.read(GOOD + 100, 7) == b"and how"
    assert rings.device.inflight == 0
    assert not rings.device.broken


# Chains in the ring's own table.


@each_layout
def test_a_descriptor_that_points_to_itself(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 0)
        refuse(rings, ChainFault.CHAIN_TOO_LONG)


@each_layout
def test_a_loop_of_all_descriptors(layout):
    with Rings(layout, size=SIZE) as rings:
        for i in range(SIZE):
            rings.guest.descriptor(i, GOOD, 8, NEXT, (i + 1) % SIZE)
        refuse(rings, ChainFault.CHAIN_TOO_LONG)


@each_layout
def test_a_loop_in_the_largest_ring_is_cut_by_the_scratch(layout):
    with Rings(layout, size=32768) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 1)
        rings.guest.descriptor(1, GOOD, 8, NEXT, 0)
        refuse(rings, ChainFault.CHAIN_TOO_MANY_SEGMENTS)


@each_layout
def test_a_burst_of_loops_is_taken_in_bounded_steps(layout):
    with Rings(layout, size=4096) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 0)
        rings.guest.offer(*[0] * 64)
        bursts = []
        while sum(bursts) < 64:
            chains = rings.device.take()
            assert {taken.fault for taken in chains} == {ChainFault.CHAIN_TOO_LONG}
            bursts.append(len(chains))
        assert max(bursts) <= 2
        rings.device.give([(0, 0)] * 64)
        works(rings)


@each_layout
@pytest.mark.parametrize("next", [SIZE, SIZE + 1, 32768, 65535])
def test_next_beyond_the_table(layout, next):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, next)
        refuse(rings, ChainFault.CHAIN_BAD_INDEX)


@each_layout
@pytest.mark.parametrize("at", range(3))
def test_a_zero_length_anywhere_in_the_chain(layout, at):
    """CVE-2020-10725"""
    with Rings(layout, size=SIZE) as rings:
        for i in range(3):
            more = NEXT if i < 2 else 0
            rings.guest.descriptor(i, GOOD, 0 if i == at else 8, more, i + 1)
        refuse(rings, ChainFault.CHAIN_ZERO_LENGTH)


@each_layout
@pytest.mark.parametrize("flags", [0, WRITE])
def test_a_zero_length_alone(layout, flags):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 0, flags)
        refuse(rings, ChainFault.CHAIN_ZERO_LENGTH)


@each_layout
def test_readable_after_writable(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT | WRITE, 1)
        rings.guest.descriptor(1, GOOD, 8)
        refuse(rings, ChainFault.CHAIN_BAD_ORDER)


@each_layout
@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (0, 8),
        (GPA - 1, 8),
        (GPA - 8, 8),
        (END, 1),
        (END - 7, 8),  # CVE-2018-1059: starts in memory and ends beyond
        (BORDER - 4, (2 << 20) + 5),
        (GPA, 0xFFFFFFFF),
        (2**64 - 1, 1),
        (2**64 - 8, 8),
        (2**64 - 8, 9),
        (2**64 - 1, 0xFFFFFFFF),
        (2**64 - GPA, 0xFFFFFFFF),
    ],
)
@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize("second", [False, True], ids=["alone", "second"])
def test_a_buffer_that_is_not_all_guest_memory(layout, gpa, length, flags, second):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 1)
        rings.guest.descriptor(1, gpa, length, flags)
        refuse(rings, ChainFault.CHAIN_UNMAPPED, head=0 if second else 1)


@each_layout
def test_a_chain_of_more_than_4_gib(layout):
    """virtio 1.3, "The Virtqueue Descriptor Table": lengths must not wrap in 32 bits."""
    with Rings(layout, size=2048) as rings:
        for i in range(1025):
            more = NEXT if i < 1024 else 0
            rings.guest.descriptor(i, GPA, 4 << 20, more, i + 1)
        refuse(rings, ChainFault.CHAIN_TOO_LONG)


@each_layout
def test_unknown_flags_are_ignored(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, 0xFFF8, 0xFFFF)
        rings.guest.offer(0)
        (taken,) = rings.device.take()
        assert taken.readable == [(GOOD, 8)]


# Indirect tables.


@each_layout
def test_an_indirect_table_that_was_not_negotiated(layout):
    with Rings(layout, size=SIZE, indirect=False) as rings:
        rings.guest.descriptor(0, GOOD, 8, table=TABLES)
        rings.guest.descriptor(0, TABLES, 16, INDIRECT)
        refuse(rings, ChainFault.CHAIN_BAD_INDIRECT)


@each_layout
def test_an_indirect_table_in_an_indirect_table(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, TABLES, 16, INDIRECT, table=TABLES)
        rings.guest.descriptor(0, TABLES, 16, INDIRECT)
        refuse(rings, ChainFault.CHAIN_BAD_INDIRECT)


@each_layout
def test_an_indirect_descriptor_with_a_next(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, table=TABLES)
        rings.guest.descriptor(0, TABLES, 16, INDIRECT | NEXT, 1)
        rings.guest.descriptor(1, GOOD, 8)
        refuse(rings, ChainFault.CHAIN_BAD_INDIRECT)


@each_layout
@pytest.mark.parametrize("length", [0, 1, 15, 17, 31, 0xFFFFFFFF])
def test_an_indirect_table_of_a_bad_length(layout, length):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, table=TABLES)
        rings.guest.descriptor(0, TABLES, length, INDIRECT)
        refuse(rings, ChainFault.CHAIN_BAD_INDIRECT)


@each_layout
@pytest.mark.parametrize("entries", [1025, 32768, 0xFFFFFFF])
def test_an_indirect_table_that_is_too_long(layout, entries):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, table=TABLES)
        rings.guest.descriptor(0, TABLES, 16 * entries, INDIRECT)
        refuse(rings, ChainFault.CHAIN_TOO_LONG)


@each_layout
def test_a_loop_in_an_indirect_table(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 1, table=TABLES)
        rings.guest.descriptor(1, GOOD, 8, NEXT, 0, table=TABLES)
        rings.guest.descriptor(0, TABLES, 32, INDIRECT)
        refuse(rings, ChainFault.CHAIN_TOO_LONG)


@each_layout
def test_next_beyond_the_indirect_table_though_not_beyond_the_ring(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 2, table=TABLES)
        rings.guest.descriptor(2, GOOD, 8, table=TABLES)
        rings.guest.descriptor(0, TABLES, 32, INDIRECT)
        refuse(rings, ChainFault.CHAIN_BAD_INDEX)


@each_layout
@pytest.mark.parametrize("gpa", [0, GPA - 8, END - 8, END, 2**64 - 16, 2**64 - 8])
def test_an_indirect_table_that_is_not_guest_memory(layout, gpa):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, gpa, 32, INDIRECT)
        refuse(rings, ChainFault.CHAIN_UNMAPPED)


@each_layout
def test_an_indirect_table_that_ends_outside_guest_memory(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 1, table=END - 16)
        rings.guest.descriptor(0, END - 16, 32, INDIRECT)
        refuse(rings, ChainFault.CHAIN_UNMAPPED)


def crumbs(fd, gpa, uva):
    """Guest memory in regions of one byte each, 48 of them, and one for the rest."""
    place = [RegionInfo(gpa + i, 1, uva + (i << 20), Mapping(fd, 4000 + i, 1)) for i in range(48)]
    return GuestMemory([RegionInfo(GPA, 4 << 20, UVA, Mapping(fd, 0, 4 << 20)), *place])


@each_layout
def test_an_indirect_table_in_regions_of_one_byte(layout):
    """libvhost-user read it through one pointer, and overflowed when it copied the pieces."""
    with Rings(layout, size=SIZE) as rings:
        rings.device.set_live(False)
        rings.memory = crumbs(rings.fd, END + 8, 0x1000)
        rings.start(0)
        rings.guest.memory = rings.memory
        for part, size in ((DESC, 16 * SIZE), (AVAIL, 256), (USED, 1024)):
            rings.memory.write(part, bytes(size))
        rings.guest.descriptor(0, GOOD, 8, NEXT, 2, table=END + 8)
        rings.guest.descriptor(2, GOOD + 64, 9, table=END + 8)
        rings.guest.descriptor(0, END + 8, 48, INDIRECT)
        rings.guest.offer(0)
        (taken,) = rings.device.take()
        assert taken.readable == [(GOOD, 8), (GOOD + 64, 9)]
        rings.device.give([(taken, 0)])
        works(rings)


@each_layout
def test_a_chain_of_1024_descriptors_each_across_two_regions(layout):
    with Rings(layout, size=1024) as rings:
        for i in range(1024):
            more = NEXT if i < 1023 else 0
            rings.guest.descriptor(i, BORDER - 2 - i, 1030, more | WRITE, i + 1)
        rings.guest.offer(0)
        (taken,) = rings.device.take()
        assert len(taken.writable) == 2048
        assert taken.writable[-2:] == [(BORDER - 1025, 1025), (BORDER, 5)]
        rings.device.give([(taken, 0)])


@each_layout
def test_a_chain_of_more_pieces_than_a_scratch_holds(layout):
    with Rings(layout, size=4096) as rings:
        for i in range(2049):
            more = NEXT if i < 2048 else 0
            rings.guest.descriptor(i, BORDER - 1, 2, more, i + 1)
        refuse(rings, ChainFault.CHAIN_TOO_MANY_SEGMENTS)


@each_layout
def test_chains_that_fill_the_scratch_wait_for_the_next_burst(layout):
    with Rings(layout, size=2048) as rings:
        for i in range(1024):
            rings.guest.descriptor(i, BORDER - 1, 2, NEXT if i % 512 < 511 else 0, i + 1)
        rings.guest.descriptor(2000, GOOD, 8)
        heads = [0, 512, 0, 512, 2000, 512]
        rings.guest.offer(*heads)
        bursts = [rings.device.take() for _ in range(3)]
        assert [len(burst) for burst in bursts] == [4, 2, 0]
        assert [taken.id for burst in bursts for taken in burst] == heads
        assert {taken.fault for burst in bursts for taken in burst} == {ChainFault.CHAIN_OK}


# Indexes.


def is_broken(rings):
    """Broken, stays so, serves nothing, and lives again from a new base."""
    device = rings.device
    for _ in range(2):
        with pytest.raises(GuestError):
            device.take()
    assert device.broken
    assert device.want_kicks() is False
    rings.guest.put_u16(AVAIL + 2, 5)
    with pytest.raises(GuestError):
        device.take()
    device.set_live(False)
    device.base = 5
    device.set_live(True)
    assert not device.broken
    works(rings)


@each_layout
@pytest.mark.parametrize("jump", [SIZE + 1, 1000, 32768, 65535])
def test_an_avail_index_that_jumps_beyond_the_ring(layout, jump):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.offer(jump=jump)
        is_broken(rings)


@each_layout
def test_an_avail_index_that_goes_back(layout):
    with Rings(layout, size=SIZE, base=100) as rings:
        rings.guest.offer(jump=-1)
        is_broken(rings)


@each_layout
@pytest.mark.parametrize("head", [SIZE, 32768, 65535])
def test_a_head_beyond_the_table(layout, head):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.offer(head)
        is_broken(rings)


@each_layout
def test_good_chains_before_a_bad_head_come_out_first(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8)
        rings.guest.offer(0, 0, 999, 0)
        taken = rings.device.take()
        assert [(chain.id, chain.fault) for chain in taken] == [(0, 0), (0, 0)]
        rings.device.give([(chain, 0) for chain in taken])
        assert rings.guest.used_idx == 2
        is_broken(rings)


@each_layout
@pytest.mark.parametrize("used_idx", [0, 1, SIZE, 32768, 65535])
def test_a_used_index_that_makes_no_sense_at_start(layout, used_idx):
    with Rings(layout, size=SIZE, event_idx=True) as rings:
        rings.guest.put_u16(USED + 2, used_idx)
        rings.start(0)
        assert rings.device.used_index == used_idx
        works(rings)


@each_layout
def test_a_used_index_that_the_guest_overwrites(layout):
    """Our own index is what counts; the guest's copy is only written."""
    with Rings(layout, size=SIZE) as rings:
        works(rings)
        rings.guest.put_u16(USED + 2, 40000)
        rings.guest.descriptor(0, GOOD, 8)
        rings.guest.offer(0)
        rings.device.give([(rings.device.take()[0], 0)])
        assert rings.guest.used_idx == 2


@each_layout
@pytest.mark.parametrize("event", [0, 1, SIZE, 32768, 65535])
def test_any_used_event_costs_at_most_a_call_each_publish(layout, event):
    with Rings(layout, size=SIZE, event_idx=True) as rings:
        rings.guest.put_u16(AVAIL + 4 + 2 * SIZE, event)
        works(rings)
        for _ in range(3):
            rings.calls()
            works(rings)
            assert rings.calls() <= 1


# What changes between looks.


@each_layout
def test_a_descriptor_that_changes_between_two_takes(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8)
        rings.guest.offer(0)
        assert rings.device.take()[0].readable == [(GOOD, 8)]
        rings.device.put_back(1)
        rings.guest.descriptor(0, GOOD, 0xFFFFFFFF)
        (taken,) = rings.device.take()
        assert taken.fault == ChainFault.CHAIN_UNMAPPED
        rings.device.put_back(1)
        rings.guest.descriptor(0, GOOD + 1, 9)
        (taken,) = rings.device.take()
        assert taken.readable == [(GOOD + 1, 9)]
        rings.guest.descriptor(0, 0, 0xFFFFFFFF, NEXT, 7)
        assert taken.readable == [(GOOD + 1, 9)]
        rings.device.give([(taken, 0)])
        works(rings)


@each_layout
def test_a_chain_that_is_available_twice(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8)
        rings.guest.offer(*[0] * SIZE)
        taken = rings.device.take()
        assert [chain.id for chain in taken] == [0] * SIZE
        rings.device.give([(chain, 0) for chain in taken])
        works(rings)


# Where the ring is.


def ring_at(rings, **changes):
    place = {"desc_uva": UVA, "avail_uva": UVA + 65536, "used_uva": UVA + 131072} | changes
    size = place.pop("size", SIZE)
    features = place.pop("features", 1 << 32)
    return Virtqueue(rings.memory, size, features, **place)


@each_layout
@pytest.mark.parametrize("size", [0, 3, 63, 65, 32769, 65535, 65536, 2**32 + 64, -64])
def test_a_ring_of_a_bad_size(layout, size):
    with Rings(layout) as rings, pytest.raises(ProtocolError, match=str(size)):
        ring_at(rings, size=size)


@each_layout
@pytest.mark.parametrize(
    ("part", "offsets"), [("desc", [1, 2, 4, 8]), ("avail", [1]), ("used", [1, 2])]
)
def test_a_ring_that_is_not_aligned(layout, part, offsets):
    with Rings(layout) as rings:
        for offset in offsets:
            with pytest.raises(ProtocolError, match="aligned"):
                ring_at(rings, **{f"{part}_uva": UVA + offset})


@each_layout
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_a_ring_that_is_aligned_only_for_the_front_end(layout, offset):
    """The region starts at an odd place in its file: our own address is what we load from."""
    with Rings(layout) as rings:
        odd = RegionInfo(GPA, 1 << 20, UVA, Mapping(rings.fd, offset, 1 << 20))
        with pytest.raises(ProtocolError, match="aligned"):
            Virtqueue(
                GuestMemory([odd]),
                SIZE,
                0,
                desc_uva=UVA,
                avail_uva=UVA + 65536,
                used_uva=UVA + 131072,
            )


@each_layout
@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize(
    "uva", [0, UVA - 16, UVA + (2 << 20) - 16, UVA + (2 << 20), 2**64 - 16, 2**64, -16]
)
def test_a_ring_that_is_not_in_one_region(layout, part, uva):
    with Rings(layout) as rings, pytest.raises(ProtocolError):
        ring_at(rings, **{f"{part}_uva": uva})


@each_layout
@pytest.mark.parametrize(("part", "end"), [("avail", 4 + 2 * SIZE), ("used", 4 + 8 * SIZE)])
def test_the_event_field_must_be_in_the_region_too(layout, part, end):
    with Rings(layout) as rings:
        place = {f"{part}_uva": UVA + (2 << 20) - end}
        ring_at(rings, **place)
        with pytest.raises(ProtocolError):
            ring_at(rings, features=EVENT_IDX, **place)


@each_layout
@pytest.mark.parametrize("base", [-1, 65536, 2**32])
def test_a_base_beyond_16_bits(layout, base):
    with Rings(layout) as rings, pytest.raises(ProtocolError):
        ring_at(rings, base=base)


@each_layout
def test_a_refused_change_leaves_the_ring_as_it_was(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.device.set_live(False)
        fd = os.memfd_create("small")
        os.truncate(fd, 4096)
        elsewhere = GuestMemory([RegionInfo(0, 4096, 0x1000, Mapping(fd, 0, 4096))])
        os.close(fd)
        with pytest.raises(ProtocolError):
            rings.device.remap(elsewhere)
        with pytest.raises(ProtocolError):
            rings.device.set_addresses(desc_uva=UVA, avail_uva=UVA + 65536, used_uva=0)
        rings.device.set_live(True)
        works(rings)


@each_layout
def test_parts_of_the_ring_on_top_of_each_other(layout):
    """The guest reads nonsense; we write inside its ring and nowhere else."""
    with Rings(layout, size=SIZE) as rings:
        place = UVA + (1 << 20)
        rings.start(0, desc_uva=place, avail_uva=place, used_uva=place)
        for _ in range(50):
            try:
                rings.device.give([(taken, 1) for taken in rings.device.take()])
            except GuestError:
                break
        assert rings.memory.read(GPA + (1 << 20) - 4096, 4096) == bytes(4096)
        assert rings.memory.read(GPA + (1 << 20) + 16 * SIZE, 4096) == bytes(4096)


# Notifications and the dirty log.


@each_layout
def test_a_call_fd_that_cannot_be_written(layout):
    with Rings(layout, size=SIZE) as rings:
        full = os.eventfd(0, os.EFD_NONBLOCK)
        os.eventfd_write(full, 2**64 - 2)
        reader, writer = os.pipe()
        os.close(reader)
        closed = os.eventfd(0)
        os.close(closed)
        readonly = os.open("/dev/null", os.O_RDONLY)
        for fd in (full, writer, readonly, closed, 2**31 - 1):
            rings.start(rings.device.base, call_fd=fd)
            works(rings)
            rings.device.notify()
        assert events(full) == 2**64 - 2
        for fd in (full, writer, readonly):
            os.close(fd)


@each_layout
@pytest.mark.parametrize("size", [1, 64, 4096])
@pytest.mark.parametrize("used_log_gpa", [0, USED, 2**63, 2**64 - 4096])
def test_writes_beyond_the_dirty_log(layout, size, used_log_gpa):
    """CVE-2019-14835, CVE-2020-10722: the bits would lie past the log's end."""
    with Rings(layout, size=SIZE, event_idx=True) as rings:
        fd = os.memfd_create("log")
        os.truncate(fd, 2 * 4096)
        log = DirtyLog(fd, 0, size)
        rings.device.set_live(False)
        rings.device.set_log(log, used_log_gpa)
        rings.device.set_live(True)
        works(rings)
        rings.device.want_kicks()
        works(rings)
        assert os.pread(fd, 8192, size) == bytes(8192 - size)
        assert log.pages() == ([0] if used_log_gpa == 0 else [])
        os.close(fd)


@each_layout
@pytest.mark.parametrize("gpa", [-1, 2**64 - 8, 2**64])
def test_a_log_address_beyond_64_bits(layout, gpa):
    with Rings(layout) as rings:
        log = rings.log()
        rings.device.set_live(False)
        with pytest.raises(ProtocolError):
            rings.device.set_log(log, gpa)


# Anything at all.

numbers = st.one_of(st.integers(0, SIZE + 1), st.integers(0, 65535))
places = st.one_of(
    st.integers(GPA, END),
    st.sampled_from([DESC, AVAIL, USED, TABLES, TABLES + 32, BORDER - 8, END - 8, 0]),
    st.integers(0, 2**64 - 1),
)
lengths = st.one_of(st.integers(0, 100), st.sampled_from([16, 32, 64]), st.integers(0, 2**32 - 1))


@each_layout
@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), wild=st.lists(st.tuples(numbers, places, lengths, numbers)))
def test_no_descriptor_table_harms_anything_but_its_ring(layout, seed, wild):
    dice = random.Random(seed)
    with Rings(layout, size=SIZE) as rings:
        log = rings.log()
        for index, gpa, length, next in wild:
            table = dice.choice([DESC, DESC, TABLES])
            flags = dice.randrange(8)
            rings.guest.descriptor(index % SIZE, gpa, length, flags, next, table=table)
        rings.guest.offer(*[dice.randrange(SIZE) for _ in range(dice.randrange(SIZE))])
        count = rings.guest.u16(AVAIL + 2)
        given_back = 0
        while given_back < count:
            chains = rings.device.take()
            assert chains
            for taken in chains:
                pieces = [*taken.readable, *taken.writable]
                assert bool(pieces) == (taken.fault == ChainFault.CHAIN_OK)
                for gpa, length in pieces:
                    assert GPA <= gpa < gpa + length <= END
            rings.device.give([(taken, 0) for taken in chains])
            given_back += len(chains)
        assert rings.guest.used_idx == count
        assert log.pages() == [USED // 4096] * bool(count)
        works(rings)
