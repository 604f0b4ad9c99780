"""Chains that outlive a killed back-end: each is done, in order, and none is lost."""

import contextlib
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rings import LAYOUTS, Rings
from vhostpy.errors import GuestError, ProtocolError
from vhostpy.ring.inflight import InflightArea, area_bytes, region_bytes

SIZE = 16
AREA = region_bytes(SIZE)

layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Life:
    """A ring whose device remembers its chains, and can be killed."""

    def __init__(self, layout="split", size=SIZE, used=0):
        self.rings = Rings(layout, size=size, used=used)
        self.fd = os.memfd_create("inflight")
        os.ftruncate(self.fd, 2 * AREA)
        self.out = {}
        self.rings.remember(self.queue())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)
        self.rings.__exit__()

    @property
    def device(self):
        return self.rings.device

    def queue(self):
        return InflightArea(self.fd, 0, 2 * AREA, 2, SIZE).queue(1)

    def kill(self):
        self.rings.start_after_a_kill(self.queue())
        self.out.clear()

    def region(self):
        return os.pread(self.fd, AREA, AREA)

    def put_region(self, data):
        os.pwrite(self.fd, data, AREA)

    def add(self, count=1, pieces=1):
        """Fewer where the ring is full."""
        ids = []
        with contextlib.suppress(BufferError):
            for _ in range(count):
                ids.append(self.rings.driver.add([(self.rings.free[0], 16)] * pieces, []))
        self.rings.driver.kick()
        return ids

    def take(self, limit=SIZE):
        taken = self.device.take(limit)
        self.out |= {chain.id: chain for chain in taken}
        return [chain.id for chain in taken]

    def give(self, ids, publish=True):
        self.device.give([(self.out.pop(id_), 0) for id_ in ids], publish=publish)


def marked(region, layout):
    """Ids of chains that a region says are under way, by the document's own layout."""
    found = []
    for i in range(SIZE):
        if layout == "split":
            inflight, _next, counter = struct.unpack_from("<B5xHQ", region, 16 + 16 * i)
            id_ = i
        else:
            inflight, _next, _last, _num, counter, id_ = struct.unpack_from(
                "<BxHHHQH", region, 32 + 32 * i
            )
        if inflight:
            found.append((counter, id_))
    return [id_ for _, id_ in sorted(found)]


def test_split_region_is_laid_out_as_the_document_says():
    with Life() as life:
        assert struct.unpack_from("<QHHHH", life.region()) == (0, 1, SIZE, 0, 0)
        ids = life.add(5)
        assert life.take(3) == ids[:3]
        assert marked(life.region(), "split") == ids[:3]
        life.give([ids[1], ids[0]], publish=False)
        assert marked(life.region(), "split") == ids[:3]
        _, version, size, batch_head, used_idx = struct.unpack_from("<QHHHH", life.region())
        assert (version, size, batch_head, used_idx) == (1, SIZE, ids[0], 0)
        assert struct.unpack_from("<H", life.region(), 16 + 16 * ids[0] + 6) == (ids[1],)
        life.device.publish_pushed()
        assert marked(life.region(), "split") == [ids[2]]
        assert struct.unpack_from("<H", life.region(), 14) == (2,)
        assert os.pread(life.fd, AREA, 0) == bytes(AREA), "another queue's"


def packed_header(region):
    """free_head, old_free_head, used_idx, old_used_idx, and the two wrap counters."""
    return struct.unpack_from("<HHHHBB", region, 12)


def packed_entry(region, entry):
    """next, last, num, counter, id, flags, len, addr."""
    return struct.unpack_from("<xxHHHQHHIQ", region, 32 + 32 * entry)


def test_packed_region_is_laid_out_as_the_document_says():
    with Life("packed") as life:
        assert struct.unpack_from("<QHH", life.region()) == (0, 1, SIZE)
        assert packed_header(life.region()) == (0, 0, 0, 0, 1, 1)
        assert [packed_entry(life.region(), i)[0] for i in range(SIZE)] == [*range(1, SIZE + 1)]
        pieces = [(life.rings.free[0], 16), (life.rings.free[1], 32)]
        ids = [life.rings.driver.add(pieces[:1], pieces[1:]) for _ in range(3)]
        life.rings.driver.kick()
        assert life.take() == ids
        assert marked(life.region(), "packed") == ids
        assert packed_header(life.region()) == (6, 6, 0, 0, 1, 1)
        assert packed_entry(life.region(), 2)[1:4] == (3, 2, 1)  # chain 1: last, num, counter
        for entry, (gpa, length), flag in ((2, pieces[0], 1), (3, pieces[1], 2)):
            *_, id_, flags, there, addr = packed_entry(life.region(), entry)
            assert (id_, there, addr) == (ids[1], length, gpa)
            assert flags & 7 == flag  # NEXT, WRITE
        life.give([ids[1], ids[0]])
        assert marked(life.region(), "packed") == [ids[2]]
        assert packed_header(life.region()) == (0, 0, 4, 4, 1, 1)
        # Free: chain 0's entries, chain 1's, then what was free before.
        assert [packed_entry(life.region(), i)[0] for i in (0, 1, 2, 3)] == [1, 2, 3, 6]
        assert os.pread(life.fd, AREA, 0) == bytes(AREA), "another queue's"


@layouts
@pytest.mark.parametrize("used", [0, 13, 29])
def test_what_was_under_way_comes_again_in_order_before_what_is_new(layout, used):
    with Life(layout, used=used) as life:
        ids = life.add(6, pieces=2)
        life.take(5)
        life.give([ids[3], ids[0]])
        life.kill()
        assert life.device.again == 3
        assert life.take(2) == [ids[1], ids[2]]
        assert life.take() == [ids[4]]
        assert life.device.again == 0
        assert life.take() == [ids[5]]
        life.give([ids[5], ids[4], ids[2], ids[1]])
        assert sorted(id_ for id_, _ in life.rings.driver.used()) == sorted(ids)
        assert marked(life.region(), layout) == []
        life.kill()
        assert life.add(8, pieces=2) == life.take()


def test_chains_that_come_again_are_as_they_were():
    """Packed: their descriptors were overwritten by used ones; what is known is a copy."""
    with Life("packed") as life:
        first = life.rings.add([b"first", b"piece"], [7])
        second = life.rings.add([b"second"], [9], table=True)
        third = life.rings.add([b"third"], [])
        life.rings.driver.kick()
        assert len(life.take()) == 3
        life.give([third.id])
        life.kill()
        again = life.device.take()
        assert [taken.id for taken in again] == [first.id, second.id]
        assert [life.device.read(taken) for taken in again] == [first.data, second.data]
        assert [taken.writable for taken in again] == [first.writable, second.writable]
        life.device.give([(taken, 5) for taken in again])
        assert life.rings.driver.used() == [(third.id, 0), (first.id, 5), (second.id, 5)]


@layouts
def test_order_survives_a_kill_while_they_come_again(layout):
    with Life(layout) as life:
        ids = life.add(5)
        life.take()
        life.kill()
        assert life.take(2) == ids[:2]
        life.kill()
        assert life.take() == ids


@layouts
def test_chains_put_back_come_again_too(layout):
    with Life(layout) as life:
        ids = life.add(4, pieces=2)
        life.take(3)
        life.kill()
        life.device.put_back(life.device.take(2))
        assert life.take() == ids[:3]
        life.device.put_back(life.device.take(1))
        assert marked(life.region(), layout) == ids[:3]
        assert life.take() == ids[3:]
        life.give(ids)
        assert marked(life.region(), layout) == []


@layouts
def test_a_ring_that_comes_again_does_not_sleep(layout):
    with Life(layout) as life:
        life.add(1)
        life.take()
        life.kill()
        assert life.device.want_kicks()
        life.take()
        assert not life.device.want_kicks()


# A kill at any moment -------------------------------------------------------------------

deeds = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 4)),
    st.tuples(st.just("take"), st.integers(1, 6)),
    st.tuples(st.just("give"), st.lists(st.integers(0, SIZE - 1), max_size=4)),
    st.tuples(st.just("kill"), st.integers(0, 3)),
)


@layouts
@given(mix=st.lists(deeds, max_size=40), used=st.sampled_from([0, 5, 16, 30]))
def test_every_chain_is_given_back_once_wherever_the_kill_comes(layout, mix, used):
    with Life(layout, used=used) as life:
        waiting, out, back, expected_back = [], [], [], []
        for deed, detail in mix:
            if deed == "add":
                back += [id_ for id_, _ in life.rings.driver.used()]
                waiting += life.add(detail, pieces=1 + detail % 3)
            elif deed == "take":
                taken = life.take(detail)
                assert taken == waiting[: len(taken)]
                out += taken
                del waiting[: len(taken)]
            elif deed == "give":
                given_ = [out[i] for i in sorted({i for i in detail if i < len(out)})]
                life.give(given_)
                out = [id_ for id_ in out if id_ not in given_]
                expected_back += given_
            else:
                # What it had given back, and the driver was not yet to see.
                life.give(out[max(len(out) - detail, 0) :], publish=False)
                life.kill()
                waiting = out + waiting
                out = []
                assert marked(life.region(), layout) == waiting[: life.device.again]
        # The rest of its life goes well.
        while taken := life.take():
            out += taken
        assert out[len(out) - len(waiting) :] == waiting
        life.give(out)
        back += [id_ for id_, _ in life.rings.driver.used()]
        assert sorted(back) == sorted(expected_back + out)
        assert marked(life.region(), layout) == []
        life.kill()
        assert life.device.again == 0


# Memory that lies ------------------------------------------------------------------------


@layouts
@given(data=st.binary(min_size=AREA, max_size=AREA), plausible=st.booleans())
def test_any_contents_are_refused_or_stay_within_the_ring(layout, data, plausible):
    with Life(layout) as life:
        life.add(3, pieces=2)
        life.take(2)
        region = bytearray(life.region())
        if plausible:
            # Some fields lie.
            for i in range(0, 40, 4):
                offset = 12 + int.from_bytes(data[i : i + 2], "little") % (AREA - 12)
                region[offset] = data[i + 2] % SIZE if data[i + 3] & 1 else data[i + 2]
        else:
            region[12:] = data[12:]
        life.put_region(region)
        with contextlib.suppress(ProtocolError):
            life.kill()
        # avail.idx may be too far off for the lie.
        with contextlib.suppress(GuestError, ProtocolError):
            for _ in range(4):
                life.give(list(dict.fromkeys(life.take())))
            life.kill()


@layouts
def test_memory_of_another_version_or_size_is_refused(layout):
    for version, size in ((2, SIZE), (1, SIZE - 1), (1, 65535)):
        with Life(layout) as life:
            life.put_region(struct.pack("<QHH", 0, version, size) + life.region()[12:])
            with pytest.raises(ProtocolError, match=f"version {version} for {size}"):
                life.kill()


def test_a_chain_beyond_a_smaller_ring_is_refused():
    with Life(size=8) as life:
        region = bytearray(life.region())
        region[10] = 16
        region[16 + 16 * 9] = 1
        life.put_region(region)
        with pytest.raises(ProtocolError, match="chain 9"):
            life.kill()


PACKED_LIES = {
    "a free list that is a loop": (32 + 32 * 9 + 2, 8, "expected 16 together"),
    "a chain that leads into another": (32 + 32 * 1 + 2, 4, "not its own"),
    "a chain without end": (32 + 6, 255, "not its own"),
    "a chain of nothing": (32 + 6, 0, "expected 16 together"),
    "a used descriptor beyond the ring": (18, 16, "of a ring of 16"),
    "a wrap counter of 2": (20, 2, "wraps 2"),
}


@pytest.mark.parametrize("lie", PACKED_LIES)
def test_entries_of_a_packed_ring_that_do_not_add_up_are_refused(lie):
    offset, value, words = PACKED_LIES[lie]
    with Life("packed") as life:
        life.add(2, pieces=3)
        life.take()
        region = bytearray(life.region())
        region[offset] = value
        life.put_region(region)
        with pytest.raises(ProtocolError, match=words):
            life.kill()


def test_more_descriptors_than_a_ring_has_break_it():
    """Packed: a driver that offers what the device has not given back."""
    with Life("packed") as life:
        life.add(SIZE)
        assert len(life.take()) == SIZE
        life.rings.guest.offer_chain((life.rings.free[0], 16), id=3)  # first round
        for _ in range(SIZE):
            life.rings.guest.offer_chain((life.rings.free[0], 16), id=3)
        with pytest.raises(GuestError):
            life.take()
        assert life.device.broken
        assert len(marked(life.region(), "packed")) == SIZE


def test_memory_that_is_too_small_is_refused():
    with Life() as life:
        with pytest.raises(ProtocolError, match="need"):
            InflightArea(life.fd, 0, 2 * AREA - 1, 2, 2 * SIZE)
        with pytest.raises(ProtocolError, match="multiple of 8"):
            InflightArea(life.fd, 4, 2 * AREA - 4, 1, SIZE)
        with pytest.raises(ProtocolError):
            InflightArea(life.fd, AREA, 2 * AREA, 2, SIZE)  # beyond its file
        with Rings(size=64) as larger:
            larger.device.set_live(False)
            with pytest.raises(ProtocolError, match="queue of 64"):
                larger.device.track(InflightArea(life.fd, 0, AREA, 1, SIZE).queue(0))


def test_a_guest_may_take_a_larger_queue_than_it_was_offered():
    """SeaBIOS takes 256 of QEMU's 128: the memory that we make is for that."""
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, area_bytes(4, 128))
    area = InflightArea(fd, 0, area_bytes(4, 128), 4, 128)
    for layout in LAYOUTS:
        with Rings(layout, size=256) as rings:
            rings.remember(area.queue(2 + LAYOUTS.index(layout)))
            rings.proves_itself()
    os.close(fd)
