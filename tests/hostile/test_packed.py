"""What only a packed ring has: chains without an end, flags and ids that lie."""

import struct

import pytest

from tests.hostile.chains import GOOD, SIZE, refuse, works
from tests.rings import (
    AVAIL,
    AVAILABLE,
    DESC,
    INDIRECT,
    IS_USED,
    NEXT,
    TABLES,
    USED,
    WRITE,
    Rings,
)
from vhostpy._ring import ChainFault
from vhostpy.errors import GuestError, ProtocolError


def endless(rings):
    for i in range(rings.size):
        rings.guest.descriptor(i, GOOD, 8, 0, NEXT | AVAILABLE)


def is_broken(rings):
    """Broken, stays so, serves nothing, and lives again from a new base."""
    device = rings.device
    for _ in range(2):
        with pytest.raises(GuestError):
            device.take()
    assert device.broken
    assert device.want_kicks() is False
    device.set_live(False)
    device.base = 0x8005_8005
    device.set_live(True)
    assert not device.broken
    rings.guest.memory.write(DESC, bytes(16 * rings.size))
    rings.guest.restart(0x8005_8005)
    works(rings)


@pytest.mark.parametrize("size", [7, SIZE, 63, 32768])
def test_a_chain_that_never_ends(size):
    """Its id would be in its last descriptor: nothing could be given back."""
    with Rings("packed", size=size) as rings:
        endless(rings)
        is_broken(rings)


def test_a_chain_of_all_descriptors_is_none_too_long():
    with Rings("packed", size=SIZE) as rings:
        rings.guest.offer_chain(*[(GOOD, 8)] * SIZE, id=9)
        (taken,) = rings.device.take()
        assert (taken.id, taken.slots, len(taken.readable)) == (9, SIZE, SIZE)
        rings.device.give([(taken, 0)])
        assert rings.guest.collect() == [(9, 0)]
        works(rings)


def test_a_chain_that_never_ends_behind_a_good_one():
    with Rings("packed", size=SIZE) as rings:
        endless(rings)
        rings.guest.offer_chain((GOOD, 8), id=7)
        (taken,) = rings.device.take(1)
        assert (taken.id, taken.slots, taken.fault) == (7, 1, ChainFault.CHAIN_OK)
        rings.guest.descriptor(0, GOOD, 8, 0, NEXT | AVAILABLE)
        with pytest.raises(GuestError):
            rings.device.take()
        rings.device.give([(taken, 0)])
        assert rings.guest.collect() == [(7, 0)]
        is_broken(rings)


def test_a_burst_of_long_chains_is_taken_in_bounded_steps():
    with Rings("packed", size=32768) as rings:
        for id in range(15):
            rings.guest.offer_chain((GOOD, 0), *[(GOOD, 8)] * 2000, id=id)
        bursts = []
        while sum(map(len, bursts)) < 15:
            bursts.append(rings.device.take())
            assert {taken.fault for taken in bursts[-1]} == {ChainFault.CHAIN_ZERO_LENGTH}
        assert max(map(len, bursts)) <= 3
        for burst in bursts:
            rings.device.give([(taken, 0) for taken in burst])
        assert rings.guest.collect() == [(id, 0) for id in range(15)]
        works(rings)


@pytest.mark.parametrize("id", [SIZE, 32768, 65535])
def test_an_id_beyond_the_ring_goes_back_as_it_came(id):
    with Rings("packed", size=SIZE) as rings:
        rings.guest.offer_chain((GOOD, 8), id=id)
        rings.guest.offer_chain((GOOD, 8), (GOOD, 8), id=id)
        taken = rings.device.take()
        assert [chain.id for chain in taken] == [id, id]
        rings.device.give([(chain, 0) for chain in taken])
        assert rings.guest.collect() == [(id, 0), (id, 0)]
        works(rings)


@pytest.mark.parametrize("id", [0, 1, 65535])
def test_only_the_last_id_of_a_chain_counts(id):
    with Rings("packed", size=SIZE) as rings:
        rings.guest.offer_chain((GOOD, 8), (GOOD, 8), (GOOD, 8), id=id)
        for i in range(2):
            word = struct.pack("<H", 1000 + i)
            rings.guest.memory.write(DESC + 16 * i + 12, word)
        (taken,) = rings.device.take()
        assert (taken.id, taken.slots) == (id, 3)


@pytest.mark.parametrize("flags", [0, IS_USED, AVAILABLE | IS_USED])
def test_a_descriptor_that_is_not_available_is_not_looked_at(flags):
    with Rings("packed", size=SIZE) as rings:
        rings.guest.descriptor(0, 0, 0, 5, flags | NEXT)
        assert rings.device.take() == []
        assert rings.device.want_kicks() is False
        works(rings)


def test_a_guest_that_makes_used_descriptors_available_again_at_once():
    """It has more chains out than the ring has places: no driver does, and we follow none."""
    with Rings("packed", size=8) as rings:
        for _ in range(8):
            rings.guest.offer_chain((GOOD, 8))
        taken = rings.device.take()
        for _ in range(8):
            rings.guest.offer_chain((GOOD, 8))
        with pytest.raises(GuestError):
            rings.device.take()
        assert rings.device.inflight == len(taken) == 8
        rings.device.give([(chain, 0) for chain in taken])
        assert rings.device.inflight == 0
        is_broken(rings)


def test_a_used_descriptor_that_the_guest_overwrites():
    with Rings("packed", size=SIZE) as rings:
        rings.guest.offer_chain((GOOD, 8), id=3)
        (taken,) = rings.device.take()
        rings.guest.memory.write(DESC, b"\xff" * 16)
        rings.device.give([(taken, 0)])
        assert rings.guest.collect() == [(3, 0)]
        works(rings)


@pytest.mark.parametrize("written", [0, 1, 2**32 - 1])
def test_a_used_descriptor_says_whether_anything_was_written(written):
    """virtio 1.3, "Write Flag"; without it the length is not to be read."""
    with Rings("packed", size=SIZE) as rings:
        rings.guest.offer_chain((GOOD, 8), (GOOD, 8, WRITE), id=3)
        (taken,) = rings.device.take()
        rings.device.give([(taken, written)])
        used = rings.guest.memory.read(DESC + 8, 8)
        flags = AVAILABLE | IS_USED | (WRITE if written else 0)
        assert struct.unpack("<IHH", used) == (written, 3, flags)


# Indirect tables.


def test_in_an_indirect_table_only_write_means_anything():
    """virtio 1.3, "Indirect Flag: Scatter-Gather Support": others "are ignored"."""
    with Rings("packed", size=SIZE) as rings:
        size = rings.guest.write_table(
            TABLES,
            (GOOD, 8, NEXT | INDIRECT),
            (GOOD + 16, 9, 0xFFFF & ~WRITE),
            (GOOD + 32, 10, 0xFFFF),
        )
        rings.guest.offer_chain((TABLES, size, INDIRECT | WRITE))
        (taken,) = rings.device.take()
        assert taken.readable == [(GOOD, 8), (GOOD + 16, 9)]
        assert taken.writable == [(GOOD + 32, 10)]


@pytest.mark.parametrize("at", [1, 2])
def test_an_indirect_table_behind_other_descriptors(at):
    """virtio 1.3, "Scatter-Gather Support": a list has descriptors of one type."""
    with Rings("packed", size=SIZE) as rings:
        size = rings.guest.write_table(TABLES, (GOOD, 8))
        pieces = [(GOOD, 8)] * 3
        pieces[at] = (TABLES, size, INDIRECT)
        refuse(rings, ChainFault.CHAIN_BAD_INDIRECT, *pieces)


# Event suppression.


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("event", [0, 1, SIZE, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("flags", [0, 1, 2, 3, 0xFFFC, 0xFFFF])
def test_any_event_suppression_costs_at_most_a_call_each_publish(event_idx, event, flags):
    with Rings("packed", size=SIZE, event_idx=event_idx) as rings:
        rings.guest.memory.write(AVAIL, struct.pack("<HH", event, flags))
        works(rings)
        for _ in range(3):
            rings.calls()
            works(rings)
            assert rings.calls() <= 1
        if flags == 1:
            assert rings.device.calls == 0


@pytest.mark.parametrize("event", [0, 1, SIZE, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("flags", [0, 1, 2, 3, 0xFFFC, 0xFFFF])
def test_what_the_guest_writes_to_our_event_suppression_is_not_read(event, flags):
    with Rings("packed", size=SIZE, event_idx=True) as rings:
        rings.guest.memory.write(USED, struct.pack("<HH", event, flags))
        works(rings)
        assert rings.device.want_kicks() is False
        works(rings)


# The driver trusts the device as little.


def crossed(rings, id, flags, length=1):
    """The device writes this as its next used descriptor."""
    rings.driver.add([(GOOD, 8)], [])
    rings.driver.kick()
    rings.guest.memory.write(DESC, struct.pack("<QIHH", 0, length, id, flags))
    return rings.driver.used()


@pytest.mark.parametrize("id", [1, SIZE - 1, SIZE, 65535])
@pytest.mark.parametrize("in_order", [False, True])
def test_the_driver_refuses_what_the_device_does_not_have(id, in_order):
    with Rings("packed", size=SIZE, in_order=in_order) as rings:
        with pytest.raises(ProtocolError):
            crossed(rings, id, AVAILABLE | IS_USED | WRITE)
        with pytest.raises(ProtocolError):
            rings.driver.used()


def test_the_driver_reads_no_length_without_the_flag():
    with Rings("packed", size=SIZE) as rings:
        assert crossed(rings, 0, AVAILABLE | IS_USED) == [(0, 0)]


@pytest.mark.parametrize("flags", [0, AVAILABLE, IS_USED])
def test_the_driver_waits_for_both_flags(flags):
    with Rings("packed", size=SIZE) as rings:
        assert crossed(rings, 0, flags) == []
