"""Chains that outlive a killed back-end: each is done, in order, and none is lost."""

import contextlib
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rings import Rings
from vhostpy._inflight import InflightArea, region_bytes
from vhostpy._ring import Taken
from vhostpy.errors import GuestError, ProtocolError

SIZE = 16
AREA = region_bytes(SIZE)


class Life:
    """A ring whose device remembers its chains, and can be killed."""

    def __init__(self, size=SIZE):
        self.rings = Rings(size=size)
        self.fd = os.memfd_create("inflight")
        os.ftruncate(self.fd, 2 * AREA)
        self.track()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)
        self.rings.__exit__()

    @property
    def device(self):
        return self.rings.device

    def track(self):
        area = InflightArea(self.fd, 0, 2 * AREA, 2, SIZE)
        self.device.set_live(False)
        self.device.track(area.queue(1))
        self.device.set_live(True)

    def kill(self):
        """The front-end knows nothing but what the used ring says."""
        self.rings.start(self.rings.guest.used_idx)
        self.track()

    def region(self):
        return os.pread(self.fd, AREA, AREA)

    def put_region(self, data):
        os.pwrite(self.fd, data, AREA)

    def add(self, count=1):
        """Fewer where the ring is full."""
        ids = []
        with contextlib.suppress(BufferError):
            for _ in range(count):
                ids.append(self.rings.driver.add([(self.rings.free[0], 16)], []))
        self.rings.driver.kick()
        return ids

    def take(self, limit=SIZE):
        return [taken.id for taken in self.device.take(limit)]

    def give(self, ids, publish=True):
        for id_ in ids:
            self.device.give([(Taken(id_, [], [], 0), 0)], publish=publish)


def marked(region):
    """Ids of chains that a region says are under way, by the document's own layout."""
    found = []
    for i in range(SIZE):
        inflight, _next, counter = struct.unpack_from("<B5xHQ", region, 16 + 16 * i)
        if inflight:
            found.append((counter, i))
    return [i for _, i in sorted(found)]


def test_region_is_laid_out_as_the_document_says():
    with Life() as life:
        assert struct.unpack_from("<QHHHH", life.region()) == (0, 1, SIZE, 0, 0)
        ids = life.add(5)
        assert life.take(3) == ids[:3]
        assert marked(life.region()) == ids[:3]
        life.give([ids[1], ids[0]], publish=False)
        assert marked(life.region()) == ids[:3]
        _, version, size, batch_head, used_idx = struct.unpack_from("<QHHHH", life.region())
        assert (version, size, batch_head, used_idx) == (1, SIZE, ids[0], 0)
        assert struct.unpack_from("<H", life.region(), 16 + 16 * ids[0] + 6) == (ids[1],)
        life.device.publish_pushed()
        assert marked(life.region()) == [ids[2]]
        assert struct.unpack_from("<H", life.region(), 14) == (2,)
        assert os.pread(life.fd, AREA, 0) == bytes(AREA), "another queue's"


def test_what_was_under_way_comes_again_in_order_before_what_is_new():
    with Life() as life:
        ids = life.add(6)
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
        assert marked(life.region()) == []


def test_order_survives_a_kill_while_they_come_again():
    with Life() as life:
        ids = life.add(5)
        life.take()
        life.kill()
        assert life.take(2) == ids[:2]
        life.kill()
        assert life.take() == ids


def test_chains_put_back_come_again_too():
    with Life() as life:
        ids = life.add(4)
        life.take(3)
        life.kill()
        life.device.put_back(life.device.take(2))
        assert life.take() == ids[:3]
        life.device.put_back(life.device.take(1))
        assert marked(life.region()) == ids[:3]
        assert life.take() == ids[3:]


def test_a_ring_that_comes_again_does_not_sleep():
    with Life() as life:
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
    st.tuples(st.just("kill"), st.sampled_from(["between", "while publishing", "while pushing"])),
)


@given(st.lists(deeds, max_size=40))
def test_every_chain_is_given_back_once_wherever_the_kill_comes(mix):
    with Life() as life:
        waiting, out, back, expected_back = [], [], [], []
        for deed, detail in mix:
            if deed == "add":
                back += [id_ for id_, _ in life.rings.driver.used()]
                waiting += life.add(detail)
            elif deed == "take":
                taken = life.take(detail)
                count = len(taken)
                assert taken == waiting[:count]
                out += taken
                del waiting[:count]
            elif deed == "give":
                given_ = [out[i] for i in sorted({i for i in detail if i < len(out)})]
                life.give(given_, publish=False)
                life.device.publish_pushed()
                out = [id_ for id_ in out if id_ not in given_]
                expected_back += given_
            else:
                if detail != "between" and out:
                    given_ = out[-2:]
                    life.give(given_, publish=False)
                    before = life.region()
                    if detail == "while publishing":
                        # used.idx has moved, nothing is unmarked.
                        life.device.publish_pushed()
                        life.put_region(before)
                        expected_back += given_
                        out = [id_ for id_ in out if id_ not in given_]
                life.kill()
                waiting = out + waiting
                out = []
                assert life.device.again == len(marked(life.region()))
        # The rest of its life goes well.
        while taken := life.take():
            out += taken
        assert out[len(out) - len(waiting) :] == waiting
        life.give(out)
        back += [id_ for id_, _ in life.rings.driver.used()]
        assert sorted(back) == sorted(expected_back + out)
        assert marked(life.region()) == []


# Memory that lies ------------------------------------------------------------------------


@given(st.binary(min_size=AREA, max_size=AREA), st.booleans())
def test_any_contents_are_refused_or_stay_within_the_ring(data, plausible):
    with Life() as life:
        if plausible:
            data = struct.pack("<QHH", 0, 1, SIZE) + data[12:]
        life.put_region(data)
        life.add(3)
        try:
            life.kill()
        except ProtocolError:
            assert not plausible
            return
        assert all(0 <= id_ < SIZE for id_ in life.device.inflight_queue.taken_before)
        with contextlib.suppress(GuestError):  # avail.idx is too far off for the lie
            for _ in range(4):
                life.give(life.take())


def test_a_chain_beyond_a_smaller_ring_is_refused():
    with Life(size=8) as life:
        region = bytearray(life.region())
        region[16 + 16 * 9] = 1
        life.put_region(region)
        with pytest.raises(ProtocolError, match="chain 9"):
            life.kill()


def test_memory_that_is_too_small_is_refused():
    with Life() as life:
        with pytest.raises(ProtocolError, match="need"):
            InflightArea(life.fd, 0, 2 * AREA - 1, 2, SIZE)
        with pytest.raises(ProtocolError, match="multiple of 8"):
            InflightArea(life.fd, 4, 2 * AREA - 4, 1, SIZE)
        with pytest.raises(ProtocolError):
            InflightArea(life.fd, AREA, 2 * AREA, 2, SIZE)  # beyond its file
        with Rings(size=32) as larger:
            larger.device.set_live(False)
            with pytest.raises(ProtocolError, match="32 chains"):
                larger.device.track(InflightArea(life.fd, 0, AREA, 1, SIZE).queue(0))
