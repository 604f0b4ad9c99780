"""Files that come with messages: who owns them, and that closing one may hang."""

import contextlib
import os
import socket
import tempfile
import threading

import pytest

from tests.hanging import fuse_file, lingering_socket
from tests.hostile.victim import eventually
from tests.serving import serving
from tests.talk import eventfds, open_fds
from vhostpy import fds
from vhostpy.backends.disk import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import ProtocolError
from vhostpy.fds import FDS_MAX, HUNG_MAX, Closer, OwnedFd, receive, send
from vhostpy.frontend import FrontEnd
from vhostpy.mapping import Mapping
from vhostpy.payloads import VringFile, VringState
from vhostpy.protocol import Decoder, encode
from vhostpy.protocol import FrontEndRequest as R
from vhostpy.server import Server
from vhostpy.worker import Workers

LONG_S = 60


@pytest.fixture
def closer(monkeypatch):
    """One of this test's own, which no other one has made wait."""
    closer = Closer()
    monkeypatch.setattr(fds, "closer", closer)
    return closer


@pytest.fixture
def hangs():
    """`hangs()` makes an fd whose close hangs until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda: OwnedFd(stack.enter_context(lingering_socket()).detach())


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def pipe_end() -> OwnedFd:
    read, write = os.pipe()
    os.close(read)
    return OwnedFd(write)


def test_a_close_that_hangs_holds_up_neither_its_caller_nor_the_next(closer, hangs, caplog):
    for _ in range(HUNG_MAX - 1):
        hangs().close()
    assert closer.hung == HUNG_MAX - 1
    fd = pipe_end()
    number = fd.fileno()
    fd.close()
    assert not is_open(number)
    assert len(caplog.records) == 1


def test_beyond_so_many_that_hang_nobody_waits_and_the_rest_is_closed_when_they_end(
    closer, monkeypatch, caplog
):
    with contextlib.ExitStack() as stack:
        for _ in range(HUNG_MAX):
            OwnedFd(stack.enter_context(lingering_socket()).detach()).close()
        assert closer.hung == HUNG_MAX
        monkeypatch.setattr(fds, "CLOSE_PATIENCE_S", LONG_S)
        late = [pipe_end() for _ in range(10)]
        numbers = [fd.fileno() for fd in late]
        for fd in late:
            fd.close()
        assert all(map(is_open, numbers))
        assert len(caplog.records) == 2
    eventually(lambda: not closer.hung and not any(map(is_open, numbers)))
    fd = pipe_end()
    number = fd.fileno()
    fd.close()
    assert not is_open(number)


def test_threads_that_took_the_place_of_those_that_hung_end_with_that(closer):
    pipe_end().close()
    assert closer.threads == 1
    with contextlib.ExitStack() as stack:
        for _ in range(HUNG_MAX - 1):
            OwnedFd(stack.enter_context(lingering_socket()).detach()).close()
        pipe_end().close()
        assert closer.threads == HUNG_MAX
    eventually(lambda: closer.threads == 1)
    pipe_end().close()
    eventually(lambda: not closer.hung)


def test_eventfds_and_shared_memory_are_closed_while_everything_else_hangs(closer, hangs):
    for _ in range(HUNG_MAX):
        hangs().close()
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        for fd in (os.eventfd(0), os.memfd_create("guest"), os.dup(file.fileno())):
            OwnedFd(fd).close()
            assert not is_open(fd)


def test_a_close_that_fails_is_nobodys_error(closer):
    """It is closed all the same: close(2), "Dealing with error returns"."""
    closer.close(999_999)
    assert closer.hung == 0


def surplus(guest: FrontEnd, fd: int) -> None:
    """Closed when the message was handled."""
    guest.send_raw(encode(R.SET_OWNER), [fd])


def too_many(guest: FrontEnd, fd: int) -> None:
    """More than any message has: would be closed by the kernel if there were no room."""
    with OwnedFd(os.eventfd(0)) as harmless:
        guest.send_raw(encode(R.SET_OWNER), [harmless] * FDS_MAX + [fd])


def unread(guest: FrontEnd, fd: int) -> None:
    """Still in the socket when the session ends."""
    guest.send_raw(b"\xff" * 12)
    guest.send_raw(encode(R.SET_OWNER), [fd])


@pytest.mark.parametrize("attack", [surplus, too_many, unread])
def test_a_lingering_socket_holds_up_no_other_front_end(attack, closer, hangs, tmp_path):
    workers = Workers()
    workers.start()
    paths = [str(tmp_path / name) for name in ("bad", "good")]
    disks = [Disk(path, RamStorage(1 << 20), workers, queues=4) for path in paths]
    servers = [Server(disk, path=path) for disk, path in zip(disks, paths, strict=True)]
    with serving(*servers) as loop, FrontEnd(paths[1]) as good:
        good.get_features()
        held = threading.Event()
        loop.loop.call_soon_threadsafe(held.wait)  # all is sent before any is looked at
        try:
            with FrontEnd(paths[0]) as bad, hangs() as fd:
                attack(bad, fd.fileno())
            assert closer.hung == 0  # the server has the last one
        finally:
            held.set()
        good.get_features()
        eventually(lambda: closer.hung == 1)
        good.get_features()
        eventually(lambda: servers[0].connection is None)
        with FrontEnd(paths[0]) as again:
            again.get_features()
    workers.stop()


def test_a_file_on_fuse_is_refused_and_closed_without_its_servers_help(closer, tmp_path):
    with fuse_file(tmp_path) as number:
        if number is None:
            pytest.skip("cannot mount FUSE: run as root")
        refused = []

        def map_it() -> None:
            try:
                Mapping(number, 0, 4096)
            except ProtocolError as error:
                refused.append(str(error))

        # In a thread: a failure is to be told, not to hang.
        mapping = threading.Thread(target=map_it)
        mapping.start()
        mapping.join(10)
        assert not mapping.is_alive()
        assert "is on fuse, whose page faults may block" in refused[0]
        closing = threading.Thread(target=OwnedFd(number).close)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()
        assert closer.hung == 1
    eventually(lambda: not closer.hung)


# How they travel, and whose they are --------------------------------------------------


@pytest.fixture
def pair():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with a, b:
        yield a, b


def test_fds_cross_a_socket_and_are_closed_on_exec(pair):
    here, there = pair
    with eventfds(1)[0] as fd:
        assert send(here, b"abc", [fd]) == 3
        data, (got,) = receive(there, 100)
        assert data == b"abc"
        assert got.fileno() != fd.fileno()
        assert not os.get_inheritable(got.fileno())
        os.eventfd_write(got.fileno(), 7)
        assert os.eventfd_read(fd.fileno()) == 7
        got.close()


def test_more_fds_than_any_message_has_are_an_error_and_all_closed(pair):
    here, there = pair
    before = open_fds()
    fds = eventfds(FDS_MAX + 1)
    send(here, b"x", fds)
    for fd in fds:
        fd.close()
    with pytest.raises(ProtocolError, match="more than 8 file descriptors"):
        receive(there, 100)
    assert open_fds() == before


def test_fds_belong_to_the_last_message_of_what_the_kernel_hands_out(pair):
    here, there = pair
    fds = eventfds(1)
    send(here, encode(R.SET_VRING_NUM, VringState(0, 256)))
    send(here, encode(R.SET_VRING_KICK, VringFile(0, True)), fds)
    send(here, encode(R.GET_FEATURES))
    decoder = Decoder()
    messages = decoder.feed(*receive(there, 65536))
    assert [(m.request, len(m.fds)) for m in messages] == [
        (R.SET_VRING_NUM, 0),
        (R.SET_VRING_KICK, 1),
    ]
    messages += decoder.feed(*receive(there, 65536))
    assert messages[2].request == R.GET_FEATURES
    for message in messages:
        message.close()
    fds[0].close()


def test_owned_fd_has_one_owner():
    fd = eventfds(1)[0]
    number = fd.fileno()
    moved = fd.move()
    assert fd.closed
    with pytest.raises(ValueError, match="taken or closed"):
        fd.fileno()
    fd.close()
    assert moved.fileno() == number
    with moved:
        os.eventfd_write(number, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.eventfd_write(number, 1)


def test_forgotten_owned_fd_is_closed():
    before = open_fds()
    eventfds(3)
    assert open_fds() == before
