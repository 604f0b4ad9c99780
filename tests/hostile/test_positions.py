"""Where a ring stands, while its driver offers again what it has not got back.

A second vCPU makes a chain available while we have it. Nothing that it writes may take us
out of the ring: what lies behind it is the guest's own at best, and a neighbour's at worst.
"""

import contextlib
import os
import random
import struct
import time

import pytest

from tests.flipper import Flipper
from tests.hostile.attacker import Attacker
from tests.hostile.canary import Canary
from tests.hostile.chains import GOOD, works
from tests.rings import (
    AVAIL,
    AVAILABLE,
    DESC,
    END,
    GPA,
    IS_USED,
    LAYOUTS,
    NEXT,
    USED,
    WRITE,
    Rings,
)
from vhostpy._spec import Feature
from vhostpy.errors import GuestError, ProtocolError
from vhostpy.ring.inflight import InflightArea, region_bytes
from vhostpy.ring.parts import sizes_of

SIZE = 8
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def word(length, id, flags):
    """The second half of a packed descriptor."""
    return length | id << 32 | flags << 48


def offer_whole_ring(rings):
    """A packed ring's one chain, of all its descriptors."""
    rings.guest.offer_chain(*[(GOOD, 8)] * rings.size, id=3)


def starts_anew(rings):
    """After a reset by the driver all is well."""
    base = 0x8000_8000 if rings.layout == "packed" else 0
    rings.device.set_live(False)
    rings.guest.memory.write(DESC, bytes(16 * rings.size))
    rings.guest.memory.write(AVAIL, bytes(sizes_of(rings.size, rings.features)[1]))
    rings.guest.memory.write(USED, bytes(sizes_of(rings.size, rings.features)[2]))
    rings.device.base = base
    rings.device.set_live(True)
    rings.guest.restart(base)
    works(rings)


def is_broken(rings):
    with pytest.raises(GuestError):
        rings.device.take()
    assert rings.device.broken
    assert rings.device.want_kicks() is False


# A chain that comes again before it was given back ------------------------------------------


@pytest.mark.parametrize("pushed", ["nothing", "one", "in order"])
def test_a_packed_chain_that_is_available_again_while_we_have_it(pushed):
    """Pushed is not published: the driver has not seen it yet, so cannot offer it again."""
    with Rings("packed", size=SIZE, in_order=pushed == "in order") as rings:
        offer_whole_ring(rings)
        (taken,) = rings.device.take()
        if pushed == "one":
            rings.device.give([(taken, 0)], publish=False)
        elif pushed == "in order":
            rings.device.release([taken], publish=False)
        offer_whole_ring(rings)  # in the next round, over the one that is out
        is_broken(rings)
        if pushed == "nothing":
            rings.device.give([(taken, 0)])
        rings.device.publish_pushed()
        assert rings.device.used_index == 0  # once around
        starts_anew(rings)


def test_a_packed_chain_that_was_published_comes_again():
    with Rings("packed", size=SIZE) as rings:
        for _ in range(5):
            offer_whole_ring(rings)
            (taken,) = rings.device.take()
            rings.device.give([(taken, 0)])
        assert not rings.device.broken


def test_a_packed_chain_that_was_put_back_comes_again():
    with Rings("packed", size=SIZE) as rings:
        offer_whole_ring(rings)
        for _ in range(5):
            rings.device.put_back(rings.device.take())
        assert len(rings.device.take()) == 1


@pytest.mark.parametrize("plain", range(1, SIZE))
def test_a_packed_chain_that_goes_on_into_slots_that_are_out(plain):
    with Rings("packed", size=SIZE) as rings:
        for id in range(plain):
            rings.guest.offer_chain((GOOD, 8), id=id)
        assert len(rings.device.take()) == plain
        rings.guest.offer_chain(*[(GOOD, 8)] * (SIZE - plain + 1), id=plain)
        is_broken(rings)
        starts_anew(rings)


def test_plain_packed_chains_up_to_the_ring_and_no_further():
    with Rings("packed", size=SIZE) as rings:
        for id in range(SIZE):
            rings.guest.offer_chain((GOOD, 8), id=id)
        for i in range(SIZE):  # a guest that makes each available again at once
            assert len(rings.device.take(1)) == 1
            rings.guest.offer_chain((GOOD, 8), id=i)
        is_broken(rings)
        starts_anew(rings)


@pytest.mark.parametrize("avail", [0x0000, 0x8002, 0x0007])
def test_a_packed_base_behind_the_used_position_leaves_no_room(avail):
    with Rings("packed", size=SIZE) as rings:
        rings.start(avail | 0x8003 << 16 if avail else 0x0004 | 0x8003 << 16)
        for i in range(SIZE):
            rings.guest.descriptor(i, GOOD, 8, i, AVAILABLE)
        with contextlib.suppress(GuestError):
            assert len(rings.device.take()) <= SIZE
        rings.start(rings.device.base)  # it is in the ring, or this raises


def test_split_chains_up_to_the_ring_and_no_further():
    """A chain takes a descriptor at least, and one that loops takes no more than a place."""
    with Rings("split", size=SIZE) as rings:
        rings.guest.descriptor(0, GOOD, 8, NEXT, 0)
        rings.guest.offer(*[0] * SIZE)
        taken = rings.device.take()
        assert len(taken) == SIZE
        rings.guest.offer(0)
        is_broken(rings)
        rings.device.give([(chain, 0) for chain in taken])
        starts_anew(rings)


@pytest.mark.parametrize("base", [0, 58656 + SIZE, 58656 + SIZE + 1, 58655, 65535])
def test_a_split_base_far_from_used_idx_leaves_room_for_a_ring(base):
    with Rings("split", size=SIZE, used=58656) as rings:
        rings.guest.put_u16(AVAIL + 2, base % 65536)
        rings.start(base % 65536)
        explained = 0 <= base - 58656 <= SIZE  # another back-end has these
        room = SIZE - (base - 58656 if explained else 0)
        rings.guest.offer(*[1] * room)
        assert len(rings.device.take()) == room
        rings.guest.offer(1)
        is_broken(rings)


@each_layout
def test_chains_that_outlived_a_kill_count_as_out(layout, request):
    area = region_bytes(SIZE)
    fd = os.memfd_create("inflight")
    request.addfinalizer(lambda: os.close(fd))
    os.ftruncate(fd, area)

    def region():
        return InflightArea(fd, 0, area, 1, SIZE).queue(0)

    with Rings(layout, size=SIZE) as rings:
        rings.remember(region())
        for id in range(SIZE):
            rings.guest.offer_chain((GOOD, 8), id=id)
        assert len(rings.device.take()) == SIZE
        rings.start_after_a_kill(region())
        rings.guest.offer_chain((GOOD, 8), id=0)
        again = rings.device.take()
        assert [chain.id for chain in again] == list(range(SIZE))
        is_broken(rings)
        rings.device.give([(chain, 0) for chain in again])
        assert [id for id, _ in rings.guest.collect()][:SIZE] == list(range(SIZE))


# A thread that flips while we pop ----------------------------------------------------------


class Churn:
    """One ring whose driver has gone mad, and what a device does with such a ring."""

    def __init__(self, layout, size, seed, *, in_order=False):
        self.dice = random.Random(seed)
        self.rings = Rings(layout, size=size, in_order=in_order)
        self.packed = layout == "packed"
        self.size = size
        self.taken = self.breaks = 0
        self.out, self.hidden = [], []  # chains that are out; given back, not published
        parts = zip((DESC, AVAIL, USED), sizes_of(size, self.rings.features), strict=True)
        self.parts = [(place - GPA, place - GPA + length) for place, length in parts]
        self.canary = self.dice.randbytes(END - GPA)
        self.rings.guest.memory.write(GPA, self.canary)
        self.restart()

    def words(self):
        """What a second vCPU writes all the while."""
        memory = self.rings.guest.memory
        if not self.packed:
            used = self.rings.guest.used_idx
            indexes = [used + self.dice.randrange(self.size + 1) for _ in range(2)]
            heads = [self.dice.randrange(self.size + (self.dice.random() < 0.1)) for _ in range(2)]
            avail = [index % 65536 << 16 | heads[0] << 32 | heads[1] << 48 for index in indexes]
            yield memory, AVAIL, *avail
            links = [self.dice.choice([0, NEXT]) << 32 | next << 48 for next in heads]
            yield memory, DESC + 8, *(8 | link for link in links)
            return
        for i in {0, self.dice.randrange(self.size)}:
            more = NEXT if self.dice.random() < 0.7 else 0
            where = DESC + 16 * i + 8
            yield memory, where, word(8, 1, AVAILABLE | more), word(8, 1, IS_USED | more)

    def scribble(self):
        """Descriptors of the guest's own choice; in a split ring an avail index, too."""
        guest, dice = self.rings.guest, self.dice
        chained = dice.random() < 0.5
        for i in range(self.size):
            flags = dice.choice([0, NEXT, WRITE]) if not chained else NEXT * (i + 1 < self.size)
            if self.packed:
                guest.descriptor(i, GOOD, 8, i, flags | dice.choice([AVAILABLE, IS_USED]))
            else:
                guest.descriptor(i, GOOD, 8, flags, (i + 1) % self.size)
        if not self.packed:
            heads = [dice.randrange(self.size) for _ in range(self.size)]
            guest.memory.write(AVAIL + 4, struct.pack(f"<{self.size}H", *heads))
            index = guest.used_idx + dice.randrange(self.size + 1)
            guest.put_u16(AVAIL + 2, index % 65536)

    def restart(self):
        device = self.rings.device
        self.scribble()
        device.set_live(False)
        index = self.dice.randrange(self.size), self.dice.randrange(self.size)
        wraps = [self.dice.choice([0, 0x8000]) for _ in range(2)]
        base = index[0] | wraps[0] | (index[1] | wraps[1]) << 16
        if not self.packed:
            base = (self.rings.guest.used_idx + self.dice.choice([0, 0, 0, 1, 999])) % 65536
        elif self.dice.random() < 0.7:
            base = base >> 16 | base >> 16 << 16
        device.base = base
        device.set_live(True)
        self.out, self.hidden = [], []

    def step(self):
        device, dice = self.rings.device, self.dice
        what = dice.randrange(8)
        if what < 3:
            with contextlib.suppress(BufferError):
                new = device.take(dice.choice([1, 3, 64]))
                self.out += new
                self.taken += len(new)
        elif what == 3 and self.out:
            count = dice.randrange(1, min(len(self.out), 64) + 1)
            device.put_back(self.out[-count:])
            del self.out[-count:]
        elif what in (4, 5) and self.out:
            count = dice.randrange(1, min(len(self.out), 64) + 1)
            chains, self.out = self.out[:count], self.out[count:]
            if what == 5:
                device.release(chains, publish=False)
            else:
                device.give([(chain, dice.randrange(9)) for chain in chains], publish=False)
            self.hidden += chains
        elif what == 6:
            device.publish_pushed()
            self.hidden = []
        elif what == 7:
            device.want_kicks()
        slots = [chain.slots if self.packed else 1 for chain in self.out + self.hidden]
        assert sum(slots) <= self.size
        assert device.inflight == len(self.out)

    def run(self, seconds):
        memory = self.rings.guest.memory
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with Flipper(*self.words()):
                for _ in range(200):
                    try:
                        self.step()
                    except GuestError:
                        self.breaks += 1
                        self.restart()
                    if self.dice.random() < 0.1:
                        self.scribble()
        now = bytearray(memory.read(GPA, END - GPA))
        for start, stop in self.parts:
            now[start:stop] = self.canary[start:stop]
        changed = [hex(GPA + i) for i in range(len(now)) if now[i] != self.canary[i]]
        assert not changed, f"{len(changed)} bytes outside the ring, from {changed[0]} on"


def churn(layout, seconds, seeds):
    taken = breaks = 0
    for seed in seeds:
        size = (7, 8, 64, 1024)[seed % 4] if layout == "packed" else (8, 64)[seed % 2]
        ring = Churn(layout, size, seed, in_order=bool(seed & 4))
        with ring.rings:
            ring.run(seconds)
        taken, breaks = taken + ring.taken, breaks + ring.breaks
    assert taken > 100 and breaks > 10, (taken, breaks)


@each_layout
def test_a_ring_that_is_written_while_it_is_read_stays_where_it_is(layout):
    churn(layout, 0.3, range(8))


@pytest.mark.long
@pytest.mark.sanitized
@pytest.mark.parametrize("piece", range(2))
@each_layout
def test_a_ring_that_is_written_while_it_is_read_for_minutes(layout, piece):
    churn(layout, 2, range(1000 * (piece + 1), 1000 * (piece + 1) + 75))


@pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
@each_layout
def test_a_driver_whose_device_writes_while_it_reads_gets_back_what_it_gave(layout, in_order):
    """The other end trusts as little: a chain comes back once, and only while it is out."""
    dice = random.Random(1)
    came_back = refused = 0
    rounds = 0
    while rounds < 60 or (not (came_back and refused) and rounds < 2000):
        rounds += 1
        with Rings(layout, size=SIZE, in_order=in_order) as rings:
            memory, out = rings.guest.memory, set()
            if layout == "packed":
                used = [word(8, dice.randrange(SIZE), AVAILABLE | IS_USED), word(8, 0, 0)]
                words = [(memory, DESC + 16 * i + 8, *used) for i in range(SIZE)]
            else:
                used = [dice.randrange(3) << 16 | dice.randrange(4) << 32 for _ in range(2)]
                words = [(memory, USED, *used), (memory, USED + 8, 0, dice.getrandbits(64))]
            with Flipper(*words):
                for _ in range(100):
                    with contextlib.suppress(BufferError):
                        out.add(rings.driver.add([(GOOD, 8)] * dice.randrange(1, 4), []))
                    rings.driver.kick()
                    try:
                        ids = [id for id, _ in rings.driver.used()]
                    except ProtocolError:
                        refused += 1
                        break
                    assert len(set(ids)) == len(ids) and out.issuperset(ids)
                    out.difference_update(ids)
                    came_back += len(ids)
    assert came_back and refused


# Over sockets ------------------------------------------------------------------------------


def test_a_chain_that_is_popped_twice_writes_into_no_neighbours_memory(place):
    """IN_ORDER: one used descriptor for all of a burst steps over the slots of all of it.

    The ring ends where its guest's memory does, next to the memory that was mapped before.
    """
    size, memory = 1024, ((GPA, END - GPA),)
    features = 1 << Feature.VERSION_1 | 1 << Feature.IN_ORDER
    desc = END - 16 * size
    with (
        place.unnoticed(),
        Canary(place.path("bad0"), memory) as canary,
        Attacker(
            place.path("bad1"), 1, kind="packed", features=features, layout=memory, start=False
        ) as attacker,
    ):
        attacker.queue.size, attacker.queue.desc_gpa = size, desc
        chain = [struct.pack("<QIHH", GOOD, 8, 0x4142, NEXT * (i + 1 < size)) for i in range(size)]
        attacker.memory.write(desc, b"".join(chain))
        attacker.memory.write(AVAIL, struct.pack("<HH", 0, 1))  # no calls
        flips = [word(8, 0x4142, NEXT | owner) for owner in (AVAILABLE, IS_USED)]
        attacker.start()
        with Flipper((attacker.memory, desc + 8, *flips)):
            for _ in range(40):
                for _ in range(10):
                    attacker.kick()
                    time.sleep(0.001)
                attacker.end.stop_queue(1)  # its driver resets what it has broken
                attacker.start()
        assert canary.changed() == 0


def test_requests_that_are_popped_twice_leave_a_disks_ring_where_it_is(place):
    """A first request that spends the turn's bytes has the rest put back."""
    size = 1024
    with (
        place.unnoticed(),
        Attacker(place.path("badram"), 0, kind="packed", size=size) as attacker,
    ):
        attacker.memory.write(GOOD, struct.pack("<IIQ", 0, 0, 0))
        pieces = [(GOOD, 16), *[(GOOD + 4096, 4096, WRITE)] * (size - 2), (GOOD + 16, 1, WRITE)]
        attacker.ring.offer_chain(*pieces, id=0)
        flips = [word(16, 0, NEXT | owner) for owner in (AVAILABLE, IS_USED)]
        with Flipper((attacker.memory, DESC + 8, *flips)):
            for _ in range(40):
                for _ in range(10):
                    attacker.kick()
                    time.sleep(0.001)
                base = attacker.end.stop_queue(0)
                assert base & 0x7FFF < size and base >> 16 & 0x7FFF < size
                attacker.start()
