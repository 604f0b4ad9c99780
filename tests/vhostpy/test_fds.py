"""Files that come with messages: who owns them, and that closing one may hang."""

import contextlib
import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest

from tests.hanging import fuse_file, held, lingering_socket
from tests.hostile.victim import eventually
from tests.serving import serving
from tests.talk import eventfds, open_fds
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import ProtocolError
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.memory.mapping import Mapping
from vhostpy.protocol.codec import Decoder, encode
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.payloads import VringFile, VringState
from vhostpy.runtime.pool import Workers
from vhostpy.server import listen
from vhostpy.server.listen import Server
from vhostpy.system.account import Account
from vhostpy.system.fds import FDS_MAX, FREED_AT_ONCE_BYTES, OwnedFd, freeing, receive, send


@pytest.fixture
def hangs():
    """`hangs()` makes an fd whose close hangs until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda account: OwnedFd(stack.enter_context(lingering_socket()).detach(), account)


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def pipe_end(account: Account) -> OwnedFd:
    read, write = os.pipe()
    os.close(read)
    return OwnedFd(write, account)


def closing_threads() -> int:
    return sum(thread.name == "closing" for thread in threading.enumerate())


# Closing them --------------------------------------------------------------------------


def test_a_close_that_hangs_holds_up_neither_its_caller_nor_other_sockets():
    before = closing_threads()
    with lingering_socket() as ours:
        bad, good = Account(), Account()
        OwnedFd(ours.detach(), bad).close()
        behind = [pipe_end(bad) for _ in range(100)]
        for fd in behind:
            fd.close()
        fd = pipe_end(good)
        fd.close()
        eventually(lambda: good.fds == 0)
        assert (bad.fds, bad.closing.left) == (101, 101)
        eventually(lambda: closing_threads() == before + 1)
    eventually(lambda: (bad.fds, bad.closing.left) == (0, 0))
    eventually(lambda: closing_threads() == before)


def test_shared_memory_and_our_eventfds_are_closed_while_everything_else_hangs(hangs):
    account = Account()
    hangs(account).close()
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        for fd in (os.memfd_create("guest"), os.dup(file.fileno())):
            OwnedFd(fd, account).close()
            assert not is_open(fd)
    fd = os.eventfd(0)
    OwnedFd(fd).close()
    assert not is_open(fd)


def test_an_eventfd_whose_watcher_hangs_holds_up_nobody(tmp_path):
    account, number = Account(), os.eventfd(1)
    with held(tmp_path, number, "watch") as holds:
        if not holds:
            pytest.skip("needs the right to mount")
        closes = threading.Thread(target=OwnedFd(number, account).close)
        closes.start()
        closes.join(5)
        assert not closes.is_alive()
        assert account.closing.left == 1
    eventually(lambda: account.fds == 0)


def test_memory_of_a_guest_that_has_gone_is_freed_by_a_thread():
    """50 ms for each GiB, in which nobody else would get an answer."""
    held = threading.Event()
    freeing.do(held.wait)
    size = FREED_AT_ONCE_BYTES + (1 << 20)
    number = os.memfd_create("gone")
    os.posix_fallocate(number, 0, size)
    account = Account()
    mapping = Mapping(number, 0, size, account)
    OwnedFd(number, account).close()
    del mapping
    try:
        assert is_open(number)
        assert "/memfd:gone" in Path("/proc/self/maps").read_text()
        assert (account.fds, account.mappings, account.mapped_bytes) == (1, 1, size)
    finally:
        held.set()
    eventually(lambda: (account.fds, account.mappings, account.mapped_bytes) == (0, 0, 0))
    assert not is_open(number)
    assert "/memfd:gone" not in Path("/proc/self/maps").read_text()


def test_a_close_that_fails_is_nobodys_error():
    """It is closed all the same: close(2), "Dealing with error returns"."""
    account = Account()
    OwnedFd(999_999, account).close()
    eventually(lambda: account.fds == 0)


def test_more_threads_than_there_may_be_are_waited_for(monkeypatch):
    account = Account()
    with monkeypatch.context() as none:
        none.setattr(threading.Thread, "start", refuse_to_start)
        pipe_end(account).close()
        assert account.fds == 1
    pipe_end(account).close()
    eventually(lambda: account.fds == 0)


def refuse_to_start(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


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
def test_who_sends_a_lingering_socket_is_refused_until_it_is_closed(
    attack, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(listen, "HANDOVER_S", 0.1)
    workers = Workers()
    workers.start()
    paths = [str(tmp_path / name) for name in ("bad", "good")]
    disks = [Disk(path, RamStorage(1 << 20), workers, queues=4) for path in paths]
    servers = [Server(disk, path=path) for disk, path in zip(disks, paths, strict=True)]
    account = servers[0].account
    with serving(*servers) as loop, FrontEnd(paths[1]) as good:
        good.get_features()
        held = threading.Event()
        loop.loop.call_soon_threadsafe(held.wait)  # all is sent before any is looked at
        try:
            with lingering_socket() as fd:
                with FrontEnd(paths[0]) as bad:
                    attack(bad, fd.fileno())
                    fd.close()  # the server has the last one
                    held.set()
                    assert bad.hung_up()  # though what it sent hangs
                for _ in range(2):
                    with FrontEnd(paths[0]) as refused:
                        assert refused.hung_up()
                assert "files of earlier ones to be closed" in servers[0].status()["waits_for"]
                assert caplog.text.count("refused a front-end: files") == 1
                good.get_features()
        finally:
            held.set()
        eventually(lambda: not account.fds)
        with FrontEnd(paths[0]) as again:
            again.get_features()
    workers.stop()


def test_a_file_on_fuse_is_refused_and_closed_without_its_servers_help(tmp_path):
    account = Account()
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
        closing = threading.Thread(target=OwnedFd(number, account).close)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()
        assert account.closing.left == 1
    eventually(lambda: not account.fds)


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
