"""Notification fds that the other end makes block: whoever writes to one comes back soon."""

import contextlib
import os
import socket
import struct
import threading
import time

import pytest

from tests.hanging import held, lingering_socket
from tests.rings import Rings, events
from vhostpy.runtime.pool import Workers
from vhostpy.system import notify

FULL = 2**64 - 2
DEADLINE_S = 10


@pytest.fixture
def fd():
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def within(limit_s, work):
    """Runs it on a thread, so that a test that hangs ends."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    assert not thread.is_alive()


def test_signal_arrives(fd):
    assert notify.signal_once(fd)
    assert notify.signal_once(fd)
    assert os.eventfd_read(fd) == 2


def test_control_does_not_write_to_a_full_eventfd(fd):
    os.eventfd_write(fd, FULL)
    results = []
    within(DEADLINE_S, lambda: results.append(notify.signal_once(fd)))
    assert results == [True]  # it did not have to be interrupted
    assert os.eventfd_read(fd) == FULL


@pytest.mark.parametrize("again", range(2))
def test_ring_whose_call_fd_blocks_is_deaf_and_asks_for_a_look(workers, fd, again):
    with Rings(size=8) as rings:
        device = rings.start(0, call_fd=fd)
        os.eventfd_write(fd, FULL)
        events(notify.bell_fd())
        within(DEADLINE_S, device.notify)
        assert device.deaf
        assert events(notify.bell_fd()) >= 1
        start = time.monotonic()
        for _ in range(1000):
            device.notify()  # not written to again
        assert time.monotonic() - start < 1
        device.set_live(False)
        assert os.eventfd_read(fd) == FULL
        device.set_call(fd)
        assert not device.deaf
        assert os.eventfd_read(fd) == 1


# Sockets -----------------------------------------------------------------------------------


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def pair(request):
    """Both ends block: the flag is the front-end's to set, and must not be looked at."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, request.param)
    with ours, theirs:
        yield ours, theirs


def test_a_socket_is_given_what_an_eventfd_gives_its_reader(pair):
    ours, theirs = pair
    with Rings(size=8) as rings:
        device = rings.start(0, call_fd=ours.fileno())
        rings.add([b"x"], [])
        rings.driver.kick()
        device.give([(device.take()[0], 0)])
        assert theirs.recv(4096) == struct.pack("=Q", 1)
        device.set_live(False)
        device.set_call(ours.fileno())  # signalled once
        device.set_live(True)
        assert theirs.recv(4096) == struct.pack("=Q", 1)
        assert ours.getblocking()


def test_a_socket_that_nobody_reads_or_that_is_closed_holds_up_nobody(pair, workers):
    ours, theirs = pair
    with Rings(size=8) as rings:
        device = rings.start(0, call_fd=ours.fileno())

        def call():
            for _ in range(5000):
                device.notify()

        within(DEADLINE_S, call)
        assert theirs.recv(8) == struct.pack("=Q", 1)
        theirs.close()
        within(DEADLINE_S, call)
        assert not device.deaf


def test_a_socket_whose_sender_hangs_holds_up_nobody(pair, tmp_path, workers):
    ours, theirs = pair
    with held(tmp_path, ours.fileno()) as holds, Rings(size=8) as rings:
        if not holds:
            pytest.skip("needs the right to mount")
        device = rings.start(0, call_fd=ours.fileno())
        within(DEADLINE_S, device.notify)
        assert theirs.recv(8) == struct.pack("=Q", 1)


def test_which_fds_are_unix_sockets(pair, fd, tmp_path):
    assert all(notify.is_unix_socket(end.fileno()) for end in pair)
    assert not notify.is_unix_socket(fd)
    assert not notify.is_unix_socket(-1)
    with lingering_socket() as tcp, held(tmp_path, tcp.fileno()):
        results = []
        within(DEADLINE_S, lambda: results.append(notify.is_unix_socket(tcp.fileno())))
        assert results == [False]


def test_many_threads_that_hang_are_all_freed(workers):
    fds = [os.eventfd(0) for _ in range(20)]
    rings = [Rings(size=8) for _ in fds]
    threads = []
    for fd, ring in zip(fds, rings, strict=True):
        os.eventfd_write(fd, FULL)
        device = ring.start(0, call_fd=fd)
        threads.append(threading.Thread(target=device.notify, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert all(ring.device.deaf for ring in rings)
    for fd, ring in zip(fds, rings, strict=True):
        os.close(fd)
        ring.__exit__()


@pytest.mark.parametrize("broken_by", ["index", "head"])
def test_ring_that_breaks_asks_for_a_look(broken_by):
    with Rings(size=8) as rings:
        events(notify.bell_fd())
        if broken_by == "index":
            rings.guest.offer(jump=9)
        else:
            rings.guest.offer(8)
        with pytest.raises(Exception, match="broken"):
            rings.device.take()
        assert events(notify.bell_fd()) == 1
        with pytest.raises(Exception, match="broken"):
            rings.device.take()
        assert events(notify.bell_fd()) == 0  # once is enough


def names_of_threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/comm") as file:
            names.append(file.read().strip())
    return names


def test_watchdog_is_one_thread_and_no_fd_however_many_workers(workers):
    fds = len(os.listdir("/proc/self/fd"))
    assert names_of_threads().count("vhostpy-guard") == 1
    for _ in range(5):
        more = Workers()
        more.start()
        more.stop()
    del more
    assert names_of_threads().count("vhostpy-guard") == 1
    assert len(os.listdir("/proc/self/fd")) == fds
