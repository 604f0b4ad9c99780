"""A net port by itself: frames into a guest's rings; migration, many pairs."""

import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.netguest import (
    BROADCAST,
    IN_ORDER,
    LEGACY,
    LONGEST,
    MODERN,
    PACKED,
    PAGE,
    VERSION_1,
    Guest,
    data,
    device,
    each_form,
    frame,
    guest,
    mac,
)
from vhostpy.backends.net.device import NetDevice
from vhostpy.memory.guest import DirtyLog

# What a guest receives -------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("size", [14, 31, 32, 33, 60, 64, 1514, 9014, LONGEST])
def test_a_frame_arrives_as_it_was_given(features, size):
    g = guest(features=features)
    g.post(70000)
    assert g.device.port.give([data(size)]) == 1
    assert g.received() == [data(size)]
    assert g.counters() == {
        "from_guest_packets": 0,
        "from_guest_bytes": 0,
        "to_guest_packets": 1,
        "to_guest_bytes": size,
    }


@each_form
@given(
    sizes=st.lists(st.integers(14, 3000), min_size=1, max_size=10),
    pieces=st.lists(st.integers(1, 400), min_size=1, max_size=20),
    cuts=st.lists(st.integers(1, 400), max_size=5, unique=True),
)
def test_buffers_and_frames_may_be_in_pieces_of_any_size(features, sizes, pieces, cuts):
    g = guest(features=features)
    g.post(*pieces, 3100, count=len(sizes))
    frames = []
    for tag, size in enumerate(sizes):
        edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
        whole = data(size, tag)
        frames.append([whole[a:b] for a, b in pairwise(edges)])
    assert g.device.port.give(frames) == len(frames)
    assert g.received() == [data(size, tag) for tag, size in enumerate(sizes)]


@pytest.mark.parametrize("features", [MODERN, PACKED, PACKED | IN_ORDER])
@given(
    sizes=st.lists(st.one_of(st.integers(14, 3000), st.just(LONGEST)), min_size=1, max_size=6),
    buffers=st.lists(st.integers(12, 2000), min_size=1, max_size=200),
)
def test_mergeable_frames_use_as_many_buffers_as_they_need(features, sizes, buffers):
    g = guest(features=features)
    for buffer in buffers:
        g.post(buffer)
    taken = g.device.port.give([data(size, tag) for tag, size in enumerate(sizes)])
    arrived = g.received()
    assert arrived == [data(size, tag) for tag, size in enumerate(sizes[:taken])]
    if taken < len(sizes):  # then what is left does not hold the next one
        used = 0
        for size in sizes[:taken]:
            need = size + 12
            while need > 0:
                need -= buffers[used]
                used += 1
        assert sum(buffers[used:]) < sizes[taken] + 12


def test_the_longest_frame_fits_into_many_small_buffers():
    g = guest(size=1024)
    g.post(80, count=1000)
    assert g.device.port.give([data(LONGEST)]) == 1
    assert g.received() == [data(LONGEST)]


def test_a_frame_that_all_buffers_together_cannot_hold_does_not_wait():
    g = guest(size=16)
    g.post(100, count=16)
    assert g.device.port.give([data(1700), data(60)]) == 2
    assert g.received() == [data(60)]
    assert g.drops() == {"buffer_too_small": 1}


def test_buffers_are_not_consumed_by_a_frame_that_does_not_fit_yet():
    g = guest()
    g.post(500, count=3)
    assert g.device.port.give([data(1600), data(60)]) == 0
    assert g.used() == []
    g.post(500)
    assert g.device.port.give([data(1600), data(60)]) == 1
    assert g.received() == [data(1600)]
    assert g.drops() == {}


def test_a_receiver_without_buffers_takes_nothing():
    g = guest()
    assert g.device.port.give([data(60)]) == 0
    g.post(2000, count=2)
    assert g.device.port.give([data(60, n) for n in range(5)]) == 2
    assert g.received() == [data(60, 0), data(60, 1)]
    assert g.drops() == {}


@pytest.mark.parametrize("features", [VERSION_1, LEGACY])
def test_a_buffer_that_is_too_small_goes_back_unused_and_blocks_nothing(features):
    g = guest(features=features)
    g.post(100)
    g.post(2000)
    assert g.device.port.give([data(1000), data(60)]) == 2
    assert [length for _, length in g.used()] == [0, 60 + g.header_size]
    assert g.drops() == {"buffer_too_small": 1}


def test_a_mergeable_buffer_has_to_hold_the_header():
    g = guest()
    g.post(11)
    g.post(2000)
    assert g.device.port.give([data(60), data(61)]) == 2
    assert [length for _, length in g.used()] == [0, 61 + 12]
    assert g.drops() == {"buffer_too_small": 1}


def test_bad_buffers_go_back_unused_and_the_next_one_is_tried():
    g = guest()
    g.post_bad()
    g.post_bad([], readable=[(g.allocate(100), 100)])
    g.post(2000)
    assert g.device.port.give([data(60)]) == 1
    assert [length for _, length in g.used()] == [0, 0, 72]
    assert g.drops() == {}
    assert g.device.status()["queues"][0]["buffer_faults"]["unmapped"] == 1
    assert g.device.status()["queues"][0]["buffer_faults"]["bad_order"] == 1


def test_a_bad_buffer_within_a_frame_takes_those_before_it_along():
    g = guest()
    g.post(500)
    g.post_bad()
    g.post(500, count=3)
    assert g.device.port.give([data(1200)]) == 1
    used = g.used()
    assert [length for _, length in used] == [0, 0, 500, 500, 1212 - 1000]
    assert b"".join(content for content, _ in used)[12:] == data(1200)
    assert g.device.status()["queues"][0]["buffer_faults"]["unmapped"] == 1


def test_nothing_but_bad_buffers_costs_a_bounded_time_and_drops_by_name():
    g = guest(size=1024)
    for _ in range(1024):
        g.post_bad()
    assert g.device.port.give([data(60)]) == 1
    assert len(g.used()) == 256
    assert g.drops() == {"buffer_fault": 1}


def test_a_receiver_that_is_not_there_drops_by_name():
    d = device()
    assert d.port.give([data(60)] * 3) == 3
    assert d.status()["queues"][0]["drops"]["receiver_down"] == 3


@pytest.mark.parametrize("how", ["disabled", "held", "stopped"])
def test_a_receive_queue_that_may_not_be_filled_drops_by_name(how):
    g = guest()
    g.post(2000)
    if how == "disabled":
        g.device.ring_enabled(0, False)
    elif how == "held":
        g.hold(0)
    else:
        g.stop()
    assert g.device.port.give([data(60)]) == 1
    assert g.used() == []
    assert g.drops() == {"receiver_down": 1}


def test_frames_of_a_sending_queue_keep_to_one_receiving_queue():
    g = guest(pairs=4)
    for queue in range(4):
        g.post(2000, count=10, queue=queue)
    g.device.ring_enabled(2 * 3, False)
    for queue in range(8):
        g.device.port.give([data(60, queue)], queue=queue)
    assert [g.received(queue) for queue in range(4)] == [
        [data(60, 0), data(60, 3), data(60, 6)],
        [data(60, 1), data(60, 4), data(60, 7)],
        [data(60, 2), data(60, 5)],
        [],
    ]


def test_pairs_that_receive_need_not_be_the_first_ones():
    g = guest(pairs=2)
    g.device.ring_enabled(0, False)
    g.post(2000, queue=1)
    assert g.device.port.give([data(60)]) == 1
    assert g.received(1) == [data(60)]


def test_a_header_that_is_right_already_is_not_written_again():
    g = guest()
    g.post(2000, count=2)
    first, second = (g.posted[0, i][0][0] for i in (0, 1))
    g.memory.write(first, b"\xaa" * 12)
    g.memory.write(second, bytes(10) + b"\x01\x00")
    assert g.device.port.give([data(60, 0), data(60, 1)]) == 2
    assert g.received() == [data(60, 0), data(60, 1)]


# Migration --------------------------------------------------------------------------------


def logged(g: Guest, index: int) -> DirtyLog:
    fd = os.memfd_create("log")
    os.ftruncate(fd, 4096)
    log = DirtyLog(fd, 0, 4096)
    os.close(fd)
    g.hold(index).set_log(log, None)
    g.queues[index].set_live(True)
    return log


def test_exactly_the_pages_that_were_written_are_logged():
    g = guest()
    log = logged(g, 0)
    start = g.allocate(64 * PAGE, PAGE)
    # Across two pages; in pieces that skip one; a page-sized one of which little is used.
    g.drivers[0].add([], [(start + PAGE - 20, 4000)])
    g.drivers[0].add([], [(start + 4 * PAGE, 100), (start + 6 * PAGE, 3 * PAGE)])
    g.drivers[0].kick()
    assert g.device.port.give([data(1000), data(100)]) == 2
    pages = [page - start // PAGE for page in log.pages()]
    assert pages == [0, 1, 4, 6]


def test_all_buffers_of_a_merged_frame_are_logged():
    g = guest()
    log = logged(g, 0)
    start = g.allocate(64 * PAGE, PAGE)
    for i in range(4):
        g.drivers[0].add([], [(start + 2 * i * PAGE, 1000)])
    g.drivers[0].kick()
    assert g.device.port.give([data(2900)]) == 1
    assert [page - start // PAGE for page in log.pages()] == [0, 2, 4]


def test_what_a_guest_sends_is_not_logged():
    g = guest()
    log = logged(g, 1)
    g.send(data(60))
    g.kick()
    assert g.device.port.take() == [data(60)]
    g.device.port.take()
    assert log.pages() == []


# Many pairs, and front-ends that come and go ----------------------------------------


def test_128_pairs_are_256_queues():
    g = guest(pairs=128, size=4)
    assert g.device.queue_limit == 256
    g.post(2000, queue=127)
    g.device.port.give([data(60)], queue=127)
    assert g.received(127) == [data(60)]
    g.send(data(61), queue=127)
    g.kick(127)
    assert g.device.port.take(queue=127) == [data(61)]


def test_a_front_end_that_goes_leaves_the_port_and_no_address():
    g = guest()
    other = Guest(NetDevice("vu1", g.device.switch))
    other.post(2000, count=8)
    g.send(frame(BROADCAST, mac(0)))
    g.kick()
    g.device.switch.forwarder(g.device.port).turn()
    assert len(g.device.switch.fdb.entries()) == 1
    g.stop()
    assert g.device.switch.fdb.entries() == []
    assert g.device.port.index == 0
    again = Guest(g.device)
    again.post(2000)
    other.send(frame(BROADCAST, mac(1)))
    other.kick()
    other.device.switch.forwarder(other.device.port).turn()
    assert again.received() == [frame(BROADCAST, mac(1))]


def test_rings_may_stop_and_start_many_times_in_any_layout():
    d = device()
    forms = [MODERN, PACKED, MODERN, PACKED | IN_ORDER, MODERN | IN_ORDER]
    for number in range(50):
        g = Guest(d, memory_bytes=1 << 20, size=16, features=forms[number % len(forms)])
        g.post(2000)
        assert d.port.give([data(60, number)]) == 1
        assert g.received() == [data(60, number)]
        g.send(data(61, number))
        g.kick()
        assert d.port.take() == [data(61, number)]
        g.stop()
    assert d.status()["rings_started"] == 0
    assert d.status()["queues"][0]["from_guest_packets"] == 50
