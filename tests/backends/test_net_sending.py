"""A net port by itself: frames out of a guest's rings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.netguest import (
    IN_ORDER,
    LONGEST,
    MODERN,
    PACKED,
    data,
    each_form,
    guest,
)


@each_form
@pytest.mark.parametrize("size", [14, 15, 31, 32, 33, 60, 1514, 9014, LONGEST])
def test_a_frame_comes_out_as_it_was_sent(features, size):
    g = guest(features=features)
    g.send(data(size))
    g.kick()
    assert g.device.port.take() == [data(size)]
    assert g.device.port.take() == []
    assert g.sent() == [(0, 0)]


@each_form
@given(
    size=st.integers(14, 9000),
    cuts=st.lists(st.integers(1, 100), max_size=30, unique=True),
    indirect=st.booleans(),
)
def test_header_and_frame_may_be_cut_anywhere(features, size, cuts, indirect):
    g = guest(features=features)
    g.send(data(size), cuts=cuts, indirect=indirect, header=bytes(range(1, g.header_size + 1)))
    g.kick()
    assert g.device.port.take() == [data(size)]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_frame_may_lie_across_regions(cut):
    g = guest(memory_bytes=2 << 20, regions=2)
    border = 1 << 20
    whole = bytes(12) + data(60)
    g.memory.write(border - cut, whole)
    g.drivers[1].add([(border - cut, len(whole))], [])
    g.kick()
    assert g.device.port.take() == [data(60)]


def test_writable_parts_of_what_a_guest_sends_are_not_touched():
    g = guest()
    g.send(data(60), writable=[100])
    g.kick()
    assert g.device.port.take() == [data(60)]
    assert g.device.port.take() == []
    assert g.sent() == [(0, 0)]


@pytest.mark.parametrize("size", [0, 1, 13])
def test_what_is_shorter_than_its_headers_is_refused(size):
    g = guest()
    g.send(data(60)[:size])
    g.send(data(60))
    g.kick()
    assert g.device.port.take() == ["too_short", data(60)]
    assert g.device.port.take() == []
    assert len(g.sent()) == 2


def test_a_chain_shorter_than_the_virtio_header_is_refused():
    g = guest()
    for length in (1, 11, 12):
        g.send(b"", header=bytes(length))
    g.send(b"", header=bytes(12), writable=[1000])
    g.kick()
    assert g.device.port.take() == ["too_short"] * 4


def test_a_chain_without_a_readable_part_is_refused():
    g = guest()
    g.drivers[1].add([], [(g.allocate(2000), 2000)])
    g.kick()
    assert g.device.port.take() == ["too_short"]


def test_what_no_stack_can_build_is_refused():
    g = guest()
    g.send(data(LONGEST + 1))
    g.send(data(60))
    g.kick()
    assert g.device.port.take() == ["too_long", data(60)]


def test_a_bad_chain_is_refused_and_counted_by_its_reason():
    g = guest()
    g.drivers[1].add([(1 << 40, 100)], [])
    g.send(data(60))
    g.kick()
    assert g.device.port.take() == ["bad_chain", data(60)]
    assert g.device.port.take() == []
    assert len(g.sent()) == 2
    assert g.counters()["unmapped"] == 1


def test_frames_of_a_disabled_queue_are_taken_and_discarded():
    g = guest()
    g.device.ring_enabled(1, False)
    g.send(data(60))
    g.kick()
    assert g.device.port.take() == ["disabled"]
    g.device.port.take()
    assert len(g.sent()) == 1
    g.device.ring_enabled(1, True)
    g.send(data(61))
    g.kick()
    assert g.device.port.take() == [data(61)]


def test_nothing_is_taken_from_a_ring_that_is_not_live():
    g = guest()
    g.send(data(60))
    g.kick()
    g.hold(1)
    assert g.device.port.take() == []
    g.queues[1].set_live(True)
    assert g.device.port.take() == [data(60)]


@pytest.mark.parametrize("features", [MODERN, PACKED, MODERN | IN_ORDER, PACKED | IN_ORDER])
def test_buffers_go_back_in_steps_of_a_quarter_but_for_the_last_burst(features):
    g = guest(size=64, features=features)
    for number in range(20):
        g.send(data(60, number))
    g.kick()
    for taken, seen in (15, 0), (1, 0), (4, 16):
        assert len(g.device.port.take(limit=taken)) == taken
        assert len(g.sent()) == seen
    assert g.device.port.take() == []
    assert len(g.sent()) == 4


@each_form
def test_half_of_a_ring_never_stays_back(features):
    g = guest(size=64, features=features)
    for number in range(32):
        g.send(data(60, number))
    g.kick()
    assert len(g.device.port.take()) == 32
    assert len(g.sent()) == 32


@each_form
def test_a_ring_full_of_long_chains_does_not_stay_back(features):
    """What a driver runs out of is descriptors."""
    g = guest(features=features)
    for number in range(256 // 5):
        g.send(data(60, number), cuts=[20, 30, 40, 50])
    g.kick()
    assert len(g.device.port.take()) == 256 // 5
    assert len(g.sent()) == 256 // 5


def test_what_was_held_back_is_shown_when_the_ring_stops():
    g = guest()
    g.send(data(60))
    g.kick()
    g.device.port.take()
    assert g.sent() == []
    g.stop()
    assert len(g.sent()) == 1
