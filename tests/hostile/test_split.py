"""What only a split ring has: links that loop, heads and indexes that lie."""

import pytest

from tests.hostile.chains import GOOD, SIZE, refuse, works
from tests.rings import AVAIL, INDIRECT, NEXT, TABLES, USED, Rings
from vhostpy._ring import ChainFault
from vhostpy.errors import GuestError


def refuse_head(rings, fault, head=0):
    """The chain at `head`, which is written already, comes out with this fault."""
    rings.guest.offer(head)
    (taken,) = rings.device.take()
    assert (taken.id, taken.fault) == (head, fault)
    assert taken.readable == taken.writable == []
    rings.device.give([(taken, 0)])
    assert rings.guest.collect() == [(head, 0)]
    works(rings)


def test_a_descriptor_that_points_to_itself():
    with Rings("split", size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 0)
        refuse_head(rings, ChainFault.CHAIN_TOO_LONG)


def test_a_loop_of_all_descriptors():
    with Rings("split", size=SIZE) as rings:
        for i in range(SIZE):
            rings.guest.descriptor(i, GOOD, 8, NEXT, (i + 1) % SIZE)
        refuse_head(rings, ChainFault.CHAIN_TOO_LONG)


def test_a_loop_in_the_largest_ring_is_cut_by_the_scratch():
    with Rings("split", size=32768) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 1)
        rings.guest.descriptor(1, GOOD, 8, NEXT, 0)
        refuse_head(rings, ChainFault.CHAIN_TOO_MANY_SEGMENTS)


def test_a_burst_of_loops_is_taken_in_bounded_steps():
    with Rings("split", size=4096) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 0)
        rings.guest.offer(*[0] * 64)
        bursts = []
        while sum(map(len, bursts)) < 64:
            bursts.append(rings.device.take())
            assert {taken.fault for taken in bursts[-1]} == {ChainFault.CHAIN_TOO_LONG}
        assert max(map(len, bursts)) <= 2
        for burst in bursts:
            rings.device.give([(taken, 0) for taken in burst])
        works(rings)


@pytest.mark.parametrize("next", [SIZE, SIZE + 1, 32768, 65535])
def test_next_beyond_the_table(next):
    with Rings("split", size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, next)
        refuse_head(rings, ChainFault.CHAIN_BAD_INDEX)


# Indirect tables.


def test_an_indirect_table_in_an_indirect_table():
    with Rings("split", size=SIZE) as rings:
        rings.guest.descriptor(0, TABLES, 16, INDIRECT, table=TABLES)
        refuse(rings, ChainFault.CHAIN_BAD_INDIRECT, (TABLES, 16, INDIRECT))


def test_a_loop_in_an_indirect_table():
    with Rings("split", size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 1, table=TABLES)
        rings.guest.descriptor(1, GOOD, 8, NEXT, 0, table=TABLES)
        refuse(rings, ChainFault.CHAIN_TOO_LONG, (TABLES, 32, INDIRECT))


def test_next_beyond_the_indirect_table_though_not_beyond_the_ring():
    with Rings("split", size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 2, table=TABLES)
        rings.guest.descriptor(2, GOOD, 8, table=TABLES)
        refuse(rings, ChainFault.CHAIN_BAD_INDEX, (TABLES, 32, INDIRECT))


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


@pytest.mark.parametrize("jump", [SIZE + 1, 1000, 32768, 65535])
def test_an_avail_index_that_jumps_beyond_the_ring(jump):
    with Rings("split", size=SIZE) as rings:
        rings.guest.offer(jump=jump)
        is_broken(rings)


def test_an_avail_index_that_goes_back():
    with Rings("split", size=SIZE, used=100) as rings:
        rings.guest.offer(jump=-1)
        is_broken(rings)


@pytest.mark.parametrize("head", [SIZE, 32768, 65535])
def test_a_head_beyond_the_table(head):
    with Rings("split", size=SIZE) as rings:
        rings.guest.offer(head)
        is_broken(rings)


def test_good_chains_before_a_bad_head_come_out_first():
    with Rings("split", size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8)
        rings.guest.offer(0, 0, 999, 0)
        taken = rings.device.take()
        assert [(chain.id, chain.fault) for chain in taken] == [(0, 0), (0, 0)]
        rings.device.give([(chain, 0) for chain in taken])
        assert rings.guest.used_idx == 2
        is_broken(rings)


@pytest.mark.parametrize("used_idx", [0, 1, SIZE, 32768, 65535])
def test_a_used_index_that_makes_no_sense_at_start(used_idx):
    with Rings("split", size=SIZE, event_idx=True) as rings:
        rings.guest.put_u16(USED + 2, used_idx)
        rings.start(0)
        assert rings.device.used_index == used_idx
        works(rings)


def test_a_used_index_that_the_guest_overwrites():
    """Our own index is what counts; the guest's copy is only written."""
    with Rings("split", size=SIZE) as rings:
        works(rings)
        rings.guest.put_u16(USED + 2, 40000)
        rings.guest.descriptor(0, GOOD, 8)
        rings.guest.offer(0)
        rings.device.give([(rings.device.take()[0], 0)])
        assert rings.guest.used_idx == 2


@pytest.mark.parametrize("event", [0, 1, SIZE, 32768, 65535])
def test_any_used_event_costs_at_most_a_call_each_publish(event):
    with Rings("split", size=SIZE, event_idx=True) as rings:
        rings.guest.put_u16(AVAIL + 4 + 2 * SIZE, event)
        works(rings)
        for _ in range(3):
            rings.calls()
            works(rings)
            assert rings.calls() <= 1
