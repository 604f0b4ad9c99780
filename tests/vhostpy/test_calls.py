"""Calls that take a worker's time: who makes them so is called no more, and no one else."""

import contextlib
import os
import socket
import threading

import pytest

from tests.backends.netguest import frame, mac
from tests.hostile.test_slow_memory import Neighbours, eventually
from tests.rings import Rings, events
from tests.serving import serving
from tests.watched import watched
from vhostpy._spec import Feature
from vhostpy.backends.net.device import NetDevice
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.runtime.pool import Workers
from vhostpy.server.listen import Server
from vhostpy.system import notify
from vhostpy.system.calls import Calls
from vhostpy.vswitch.switch import Switch

MOST = 5  # calls before it is decided: the first that took long, and four measured


@pytest.fixture
def fd():
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def call(device, count):
    """Calls the driver so often; how many calls were made."""
    before = device.calls
    for _ in range(count):
        device.notify()
    return device.calls - before


def test_dear_calls_are_made_a_few_times_then_left_out(fd):
    calls = Calls()
    with watched(fd), Rings(size=8) as rings:
        device = rings.start(0, call_fd=fd, calls=calls)
        events(notify.bell_fd())
        assert MOST - 1 <= call(device, 200) <= 3 * MOST
        assert calls.left_out >= 200 - 3 * MOST
        assert calls.pause_s > 0 and calls.dear_ms > 0.5
        assert events(notify.bell_fd()) == 1
        assert calls.is_news() and not calls.is_news()


@pytest.mark.parametrize("way", ["another call fd", "a quick one between", "the ring starts anew"])
def test_what_its_socket_did_is_not_forgotten_by(way, fd):
    """A dear call each time: no front-end gets more of them than by one fd."""
    calls = Calls()
    quick = os.eventfd(0)
    made = 0
    with watched(fd), Rings(size=8) as rings:
        device = rings.start(0, call_fd=fd, calls=calls)
        for _ in range(50):
            made += call(device, 1)
            device.set_live(False)
            if way == "the ring starts anew":
                device = rings.start(0, call_fd=fd, calls=calls)
                continue
            if way == "a quick one between":
                device.set_call(quick)
            before = device.calls
            device.set_call(fd)
            made += device.calls - before
            device.set_live(True)
    os.close(quick)
    assert made <= 3 * MOST, made


def test_a_socket_is_measured_as_an_eventfd_is():
    calls = Calls()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, watched(theirs.fileno()), Rings(size=8) as rings:
        device = rings.start(0, call_fd=ours.fileno(), calls=calls)
        made = 0
        for _ in range(50):
            made += call(device, 1)
            with contextlib.suppress(BlockingIOError):
                theirs.recv(8, socket.MSG_DONTWAIT)
        assert made <= 3 * MOST


def test_a_busy_machine_leaves_no_call_out(fd):
    """Whoever is displaced while it calls has not worked."""
    calls = Calls()
    ended = threading.Event()
    burning = [threading.Thread(target=lambda: burn(ended)) for _ in range(4)]
    with Rings(size=8) as rings:
        device = rings.start(0, call_fd=fd, calls=calls)
        for thread in burning:
            thread.start()
        try:
            assert call(device, 20_000) == 20_000
        finally:
            ended.set()
            for thread in burning:
                thread.join()
    assert calls.left_out == 0 and not calls.is_news()


def burn(ended):
    while not ended.is_set():
        sum(range(1000))


def test_calls_are_made_again_once_they_are_cheap(fd):
    calls = Calls(dear_us=200)
    with Rings(size=8) as rings:
        device = rings.start(0, call_fd=fd, calls=calls)
        with watched(fd):
            call(device, MOST + 1)
            assert calls.pause_s
        eventually(lambda: call(device, 1))
        assert call(device, 100) == 100


def test_a_receiver_whose_calls_are_dear_does_not_slow_its_neighbours(fd):
    with Neighbours() as n, watched(fd):
        receiver = n.hostile.hold(0)
        receiver.set_call(fd)
        receiver.set_live(True)
        n.hostile.post(2048, count=200)
        for _ in range(100):
            n.tag += 1
            n.innocent[0].send(frame(mac(0), mac(1), 60, n.tag))
            n.innocent[0].kick()
            n.exchange()
            eventually(n.hostile.received)
            n.hostile.drivers[0].arm()  # wants to be called for each
        assert receiver.calls <= 2 * MOST, receiver.calls  # one at each end of a pause
        assert n.hostile.drops() == {}


def test_the_operator_is_told_and_the_driver_called_once_when_the_pause_is_over(
    tmp_path, caplog, fd
):
    workers = Workers()
    workers.start()
    switch = Switch(workers)
    path = str(tmp_path / "s")
    server = Server(NetDevice("vu0", switch), path=path)

    async def status():
        return server.status()

    with serving(server) as loop, FrontEnd(path) as guest:
        guest.negotiate(1 << Feature.VERSION_1)
        guest.set_mem_table()
        queue = guest.start_queue(1, 8)
        with watched(queue.call.fileno()):
            for _ in range(50):
                guest.announce(queue, base=0)
                if loop.run(status())["account"]["calls_left_out"]:
                    break
            waits = loop.run(status())["waits_for"]
        assert "of a worker's time: none is made for" in waits
        os.eventfd_read(queue.call.fileno())
        eventually(lambda: events(queue.call.fileno()))
    assert caplog.text.count("vu0: a call to its driver takes") == 1
    workers.stop()
