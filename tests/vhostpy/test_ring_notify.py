"""Virtqueues: who is notified, and when: calls of the driver, kicks of the device."""

import os
import select
import threading

import pytest

from tests.rings import BORDER, LAYOUTS, USED, Rings, events, exchange

USED_BEFORE = [0, 1, 63, 64, 127, 32767, 65530, 65535]  # descriptors, before a test starts

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_way = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
each_order = pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
each_start = pytest.mark.parametrize("used", USED_BEFORE)
each_table = pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])


# Calls: the device notifies the driver --------------------------------------------------


@each_layout
def test_calls_come_at_each_publish_unless_the_flag_says_no(layout):
    with Rings(layout) as rings:
        assert [exchange(rings, 3) for _ in range(3)] == [1, 1, 1]
        rings.driver.disarm()
        assert [exchange(rings, 3) for _ in range(3)] == [0, 0, 0]
        rings.driver.arm()
        assert exchange(rings) == 1


@each_layout
@each_start
def test_with_event_idx_a_call_comes_only_when_used_event_is_passed(layout, used):
    with Rings(layout, event_idx=True, used=used) as rings:
        assert exchange(rings) == 1  # the first after a start, whatever used_event says
        assert [exchange(rings, 5) for _ in range(3)] == [0, 0, 0]
        assert rings.driver.arm() is False
        assert [exchange(rings, 5) for _ in range(3)] == [1, 0, 0]
        rings.guest.want_call_after(rings.device.used_index, 7)
        assert [exchange(rings, 5) for _ in range(3)] == [0, 1, 0]
        rings.guest.want_call_after(rings.device.used_index, 5)
        assert [exchange(rings, n) for n in (5, 1, 1)] == [0, 1, 0]  # the sixth, not before


@each_layout
def test_with_event_idx_the_first_publish_of_each_life_calls(layout):
    with Rings(layout, event_idx=True) as rings:
        exchange(rings)
        assert exchange(rings) == 0
        rings.start(rings.device.base)
        assert exchange(rings) == 1
        assert exchange(rings) == 0
        rings.device.set_live(False)
        rings.device.base = rings.device.base
        assert exchange(rings) == 1


@each_layout
@each_way
def test_a_new_call_fd_is_signalled_once(layout, event_idx):
    with Rings(layout, event_idx=event_idx) as rings:
        other = os.eventfd(0, os.EFD_NONBLOCK)
        with pytest.raises(RuntimeError):
            rings.device.set_call(other)
        rings.device.set_live(False)
        rings.device.set_call(other)
        rings.device.set_live(True)
        assert events(other) == 1
        rings.driver.arm()
        assert exchange(rings) == 0
        assert events(other) == 1
        rings.device.notify()
        assert events(other) == 1
        os.close(other)


@each_layout
def test_without_a_call_fd_nobody_is_called(layout):
    with Rings(layout) as rings:
        rings.start(call_fd=-1)
        assert exchange(rings) == 0
        assert rings.device.calls == 0


@each_layout
@each_way
def test_arm_tells_the_driver_of_chains_that_came_before(layout, event_idx):
    with Rings(layout, event_idx=event_idx) as rings:
        rings.add([b"x"], [])
        rings.driver.kick()
        rings.device.give([(rings.device.take()[0], 0)])
        assert rings.driver.arm() is True
        rings.driver.used()
        assert rings.driver.arm() is False


# Kicks: the driver notifies the device --------------------------------------------------


@each_layout
def test_kicks_come_at_each_publish_until_chains_are_taken(layout):
    with Rings(layout) as rings:
        assert rings.device.want_kicks() is False
        for _ in range(3):
            rings.add([b"x"], [])
            assert rings.driver.kick() is True
            assert rings.kicks() == 1
        rings.device.take(1)  # who polls needs no kick
        rings.add([b"x"], [])
        assert rings.driver.kick() is False
        assert rings.kicks() == 0
        assert rings.device.want_kicks() is True  # there are some
        assert len(rings.device.take()) + len(rings.device.take()) == 3
        assert rings.device.want_kicks() is False
        rings.device.refuse_kicks()
        rings.add([b"x"], [])
        assert rings.driver.kick() is False


@each_layout
@each_start
def test_with_event_idx_one_kick_comes_for_each_arm(layout, used):
    with Rings(layout, event_idx=True, used=used) as rings:
        assert rings.device.want_kicks() is False
        kicks = []
        for _ in range(4):
            rings.add([b"x"], [])
            kicks.append(rings.driver.kick())
        assert kicks == [True, False, False, False]
        assert rings.device.want_kicks() is True
        assert len(rings.device.take()) == 4
        assert rings.device.want_kicks() is False
        rings.add([b"x"], [])
        assert rings.driver.kick() is True
        if layout == "split":
            assert rings.guest.u16(USED) == 0  # virtio 1.3: MUST be 0 with EVENT_IDX


@each_layout
@each_way
def test_a_kick_can_be_forced(layout, event_idx):
    with Rings(layout, event_idx=event_idx) as rings:
        rings.device.refuse_kicks()
        assert rings.driver.kick(force=True) is True
        assert rings.kicks() == 1


@each_layout
@each_way
def test_put_back_chains_are_seen_by_arm(layout, event_idx):
    with Rings(layout, event_idx=event_idx) as rings:
        rings.add([b"x"], [])
        rings.driver.kick()
        chains = rings.device.take()
        assert rings.device.want_kicks() is False
        rings.device.put_back(chains)
        assert rings.device.want_kicks() is True


@each_layout
@each_way
def test_two_sleepers_never_miss_each_other(layout, event_idx):
    """Each end sleeps as soon as it is idle: a lost notification would hang both."""
    rounds = 1000
    with Rings(layout, event_idx=event_idx, size=8) as rings:
        failed = []

        def serve():
            served = 0
            while served < rounds:
                chains = rings.device.take(3)
                if chains:
                    rings.device.give([(taken, 0) for taken in chains])
                    served += len(chains)
                elif not rings.device.want_kicks():
                    if not select.select([rings.kick_fd], [], [], 20)[0]:
                        failed.append("no kick")
                        return
                    rings.kicks()
                    rings.device.refuse_kicks()

        thread = threading.Thread(target=serve)
        thread.start()
        added = back = 0
        while back < rounds and not failed:
            while added < rounds and rings.driver.free:
                rings.driver.add([(BORDER, 60)], [])
                added += 1
            rings.driver.kick()
            came = len(rings.driver.used())
            back += came
            if not came and not rings.driver.arm():
                if not select.select([rings.call_fd], [], [], 20)[0]:
                    failed.append("no call")
                rings.calls()
                rings.driver.disarm()
        thread.join()
        assert failed == []
        assert back == rounds
