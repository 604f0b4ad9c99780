"""Rings that a hostile guest or front-end builds: dropped and counted, and no more.

Each bad chain must come out with its reason and nothing else, go back unused, and leave
a ring on which the next good chain still works; a ring whose indexes lie stays broken
until it is started anew. Reads and writes outside guest memory would crash the process.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.chains import GOOD, SIZE, refuse, works
from tests.rings import (
    AVAIL,
    AVAILABLE,
    BORDER,
    DESC,
    END,
    GPA,
    INDIRECT,
    IS_USED,
    LAYOUTS,
    NEXT,
    TABLES,
    USED,
    UVA,
    WRITE,
    Rings,
)
from vhostpy._ring import ChainFault
from vhostpy.errors import GuestError
from vhostpy.memory.guest import GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping

each_layout = pytest.mark.parametrize("layout", LAYOUTS)


# Chains in the ring itself.


@each_layout
@pytest.mark.parametrize("at", range(3))
def test_a_zero_length_anywhere_in_the_chain(layout, at):
    """CVE-2020-10725"""
    with Rings(layout, size=SIZE) as rings:
        pieces = [(GOOD, 0 if i == at else 8) for i in range(3)]
        refuse(rings, ChainFault.CHAIN_ZERO_LENGTH, *pieces)


@each_layout
@pytest.mark.parametrize("flags", [0, WRITE])
def test_a_zero_length_alone(layout, flags):
    with Rings(layout, size=SIZE) as rings:
        refuse(rings, ChainFault.CHAIN_ZERO_LENGTH, (GOOD, 0, flags))


@each_layout
@pytest.mark.parametrize("behind", [0, 1, 60])
def test_readable_after_writable(layout, behind):
    """What follows the fault in the chain is skipped with it."""
    with Rings(layout, size=SIZE) as rings:
        rest = [(GOOD, 8)] * behind
        refuse(rings, ChainFault.CHAIN_BAD_ORDER, (GOOD, 8, WRITE), (GOOD, 8), *rest)


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
        before = [(GOOD, 8)] * second
        refuse(rings, ChainFault.CHAIN_UNMAPPED, *before, (gpa, length, flags))


@each_layout
def test_a_chain_of_more_than_4_gib(layout):
    """virtio 1.3, "The Virtqueue Descriptor Table": lengths must not wrap in 32 bits."""
    with Rings(layout, size=2048) as rings:
        refuse(rings, ChainFault.CHAIN_TOO_LONG, *[(GPA, 4 << 20)] * 1025)


@each_layout
def test_unknown_flags_are_ignored(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.offer_chain((GOOD, 8, 0xFFF8))
        (taken,) = rings.device.take()
        assert taken.readable == [(GOOD, 8)]


# Indirect tables.


@each_layout
def test_an_indirect_table_that_was_not_negotiated(layout):
    with Rings(layout, size=SIZE, indirect=False) as rings:
        rings.guest.write_table(TABLES, (GOOD, 8))
        refuse(rings, ChainFault.CHAIN_BAD_INDIRECT, (TABLES, 16, INDIRECT))


@each_layout
@pytest.mark.parametrize("behind", [1, 40])
def test_an_indirect_descriptor_with_a_next(layout, behind):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.write_table(TABLES, (GOOD, 8))
        rest = [(GOOD, 8)] * behind
        refuse(rings, ChainFault.CHAIN_BAD_INDIRECT, (TABLES, 16, INDIRECT), *rest)


@each_layout
@pytest.mark.parametrize("length", [0, 1, 15, 17, 31, 0xFFFFFFFF])
def test_an_indirect_table_of_a_bad_length(layout, length):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.write_table(TABLES, (GOOD, 8))
        refuse(rings, ChainFault.CHAIN_BAD_INDIRECT, (TABLES, length, INDIRECT))


@each_layout
@pytest.mark.parametrize("entries", [1025, 32768, 0xFFFFFFF])
def test_an_indirect_table_that_is_too_long(layout, entries):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.write_table(TABLES, (GOOD, 8))
        refuse(rings, ChainFault.CHAIN_TOO_LONG, (TABLES, 16 * entries, INDIRECT))


@each_layout
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ((GOOD, 0), ChainFault.CHAIN_ZERO_LENGTH),
        ((END, 1), ChainFault.CHAIN_UNMAPPED),
        ((2**64 - 1, 0xFFFFFFFF, WRITE), ChainFault.CHAIN_UNMAPPED),
    ],
)
def test_a_bad_buffer_in_an_indirect_table(layout, at, bad, fault):
    with Rings(layout, size=SIZE) as rings:
        pieces = [(GOOD, 8)] * 3
        pieces[at] = bad
        size = rings.guest.write_table(TABLES, *pieces)
        refuse(rings, fault, (TABLES, size, INDIRECT))


@each_layout
def test_readable_after_writable_in_an_indirect_table(layout):
    with Rings(layout, size=SIZE) as rings:
        size = rings.guest.write_table(TABLES, (GOOD, 8, WRITE), (GOOD, 8))
        refuse(rings, ChainFault.CHAIN_BAD_ORDER, (TABLES, size, INDIRECT))


@each_layout
@pytest.mark.parametrize("gpa", [0, GPA - 8, END - 8, END, 2**64 - 16, 2**64 - 8])
def test_an_indirect_table_that_is_not_guest_memory(layout, gpa):
    with Rings(layout, size=SIZE) as rings:
        refuse(rings, ChainFault.CHAIN_UNMAPPED, (gpa, 32, INDIRECT))


@each_layout
def test_an_indirect_table_that_ends_outside_guest_memory(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.guest.descriptor(
            0, GOOD, 8, *((NEXT, 1) if layout == "split" else ()), table=END - 16
        )
        refuse(rings, ChainFault.CHAIN_UNMAPPED, (END - 16, 32, INDIRECT))


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
        rings.start()
        rings.guest.memory = rings.memory
        for part, size in ((DESC, 16 * SIZE), (AVAIL, 256), (USED, 1024)):
            rings.memory.write(part, bytes(size))
        rings.guest.write_table(END + 8, (GOOD, 8), (GOOD + 32, 7), (GOOD + 64, 9))
        rings.guest.offer_chain((END + 8, 48, INDIRECT))
        (taken,) = rings.device.take()
        assert taken.readable == [(GOOD, 8), (GOOD + 32, 7), (GOOD + 64, 9)]
        rings.device.give([(taken, 0)])
        works(rings)


@each_layout
def test_a_chain_of_1024_descriptors_each_across_two_regions(layout):
    with Rings(layout, size=1024) as rings:
        rings.guest.offer_chain(*[(BORDER - 2 - i, 1030, WRITE) for i in range(1024)])
        (taken,) = rings.device.take()
        assert len(taken.writable) == 2048
        assert taken.writable[-2:] == [(BORDER - 1025, 1025), (BORDER, 5)]
        rings.device.give([(taken, 0)])


@each_layout
def test_a_chain_of_more_pieces_than_a_scratch_holds(layout):
    with Rings(layout, size=4096) as rings:
        refuse(rings, ChainFault.CHAIN_TOO_MANY_SEGMENTS, *[(BORDER - 1, 2)] * 2049)


@each_layout
def test_chains_that_fill_the_scratch_wait_for_the_next_burst(layout):
    with Rings(layout, size=4096) as rings:
        ids = [0, 512, 1024, 1536, 4000, 2560]
        for id in ids:
            rings.guest.offer_chain(*[(BORDER - 1, 2)] * (1 if id == 4000 else 512), id=id)
        bursts = [rings.device.take() for _ in range(3)]
        assert [len(burst) for burst in bursts] == [4, 2, 0]
        assert [taken.id for burst in bursts for taken in burst] == ids
        assert {taken.fault for burst in bursts for taken in burst} == {ChainFault.CHAIN_OK}


# What changes between looks.


@each_layout
def test_a_descriptor_that_changes_between_two_takes(layout):
    with Rings(layout, size=SIZE) as rings:
        flags = rings.guest.available() if layout == "packed" else 0

        def rewrite(gpa, length, more=0, next=0):
            if layout == "packed":
                next, more = 0, flags | more
            rings.guest.descriptor(0, gpa, length, *((next, more) if flags else (more, next)))

        rings.guest.offer_chain((GOOD, 8))
        (taken,) = rings.device.take()
        assert taken.readable == [(GOOD, 8)]
        rings.device.put_back([taken])
        rewrite(GOOD, 0xFFFFFFFF)
        (taken,) = rings.device.take()
        assert taken.fault == ChainFault.CHAIN_UNMAPPED
        rings.device.put_back([taken])
        rewrite(GOOD + 1, 9)
        (taken,) = rings.device.take()
        assert taken.readable == [(GOOD + 1, 9)]
        rewrite(0, 0xFFFFFFFF, NEXT, 7)
        assert taken.readable == [(GOOD + 1, 9)]
        rings.device.give([(taken, 0)])
        works(rings)


@each_layout
@pytest.mark.parametrize("in_order", [False, True])
def test_a_burst_of_chains_of_one_id(layout, in_order):
    with Rings(layout, size=SIZE, in_order=in_order) as rings:
        for _ in range(SIZE):
            rings.guest.offer_chain((GOOD, 8))
        chains = rings.device.take()
        assert [taken.id for taken in chains] == [0] * SIZE
        rings.device.give([(taken, 0) for taken in chains])
        assert rings.guest.collect() == [(0, 0)] * SIZE
        works(rings)


@each_layout
def test_chains_put_back_and_given_without_end(layout):
    with Rings(layout, size=3 if layout == "packed" else 4) as rings:
        for i in range(50):
            rings.guest.offer_chain((GOOD, 8), (GOOD, 8 + i), id=1)
            for _ in range(i % 3):
                rings.device.put_back(rings.device.take())
            (taken,) = rings.device.take()
            assert taken.readable == [(GOOD, 8), (GOOD, 8 + i)]
            rings.device.give([(taken, 0)])
            assert rings.guest.collect() == [(1, 0)]


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
        chance = [AVAILABLE, AVAILABLE, AVAILABLE, IS_USED, 0, AVAILABLE | IS_USED]
        for index, gpa, length, next in wild:
            table = dice.choice([DESC, DESC, TABLES])
            flags = dice.randrange(8)
            last = (next, flags | dice.choice(chance)) if layout == "packed" else (flags, next)
            rings.guest.descriptor(index % SIZE, gpa, length, *last, table=table)
        if layout == "split":
            rings.guest.offer(*[dice.randrange(SIZE) for _ in range(dice.randrange(SIZE))])
        given_back = 0
        try:
            while chains := rings.device.take():
                for taken in chains:
                    pieces = [*taken.readable, *taken.writable]
                    assert bool(pieces) == (taken.fault == ChainFault.CHAIN_OK)
                    for gpa, length in pieces:
                        assert GPA <= gpa < gpa + length <= END
                rings.device.give([(taken, 0) for taken in chains])
                given_back += len(chains)
        except GuestError:
            assert layout == "packed", "a split ring says how many chains there are"
        assert rings.device.inflight == 0
        ring_pages = {USED // 4096, DESC // 4096}
        assert set(log.pages()) <= ring_pages
        if layout == "split":
            assert rings.guest.used_idx == given_back == rings.guest.u16(AVAIL + 2)
            works(rings)
