"""Virtqueues: what crosses them. What a hostile guest does is in tests/hostile."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rings import BORDER, DESC, LAYOUTS, TABLES, USED, Rings
from vhostpy._ring import ChainFault

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
