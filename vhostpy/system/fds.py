"""File descriptors that travel over a Unix socket: each has one owner at any time.

To close one that a stranger sent holds nobody up. Knows descriptors and bytes; knows no message.
"""

import array
import contextlib
import fcntl
import functools
import os
import socket
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vhostpy.errors import ProtocolError
from vhostpy.system.account import COMMON, Account
from vhostpy.system.background import Background

# No message carries more: vhost-user, "Multiple Memory regions description", "Back-end
# communication".
FDS_MAX = 8
# unix(7), SCM_RIGHTS: the most that one sendmsg() passes. Room for all of them, or the
# kernel closes the rest within recvmsg(), which then blocks as close() may.
FDS_ROOM = 253
INT_SIZE = array.array("i").itemsize

# unix(7): bytes of a socket's path, less the closing zero.
SOCKET_PATH_MAX = 107
# A file that is the kernel's own is closed at once, unless it is the last hold on so much
# memory: to free 1 GiB takes some 50 ms.
FREED_AT_ONCE_BYTES = 64 << 20

# Frees memory of guests that have gone. It takes its time, and waits for nobody.
freeing = Background("freeing")


def close_socket(sock: socket.socket, account: Account) -> None:
    """Hangs up at once; closes in the background, since fds that wait in it go with it."""
    with contextlib.suppress(OSError):  # of one that listens, or whose other end has gone
        sock.shutdown(socket.SHUT_RDWR)
    number = sock.detach()
    if number >= 0:
        OwnedFd(number, account).close()


def _close(fd: int, account: Account) -> None:
    """Closes any fd, and waits for nobody.

    A stranger's close() may block for as long as it likes: a socket with SO_LINGER waits for
    its peer, a file on FUSE or NFS for a server; and whatever can be watched, an eventfd too,
    for the mutex of each epoll(7) that watches it, which is held while that hands out events to
    memory whose page fault lasts. All but memory go to a thread, which is its socket's own.
    (An eventfd that belongs to no socket is one that we made.)
    """
    if sys.is_finalizing():
        return  # no thread would run any more; the kernel closes it in a moment
    work = functools.partial(_close_now, fd, account)
    if is_sealable(fd):
        if os.fstat(fd).st_blocks * 512 > FREED_AT_ONCE_BYTES:
            freeing.do(work)
        else:
            work()
    elif account is COMMON and is_eventfd(fd):
        work()
    else:
        account.closing.do(work)


def _close_now(fd: int, account: Account) -> None:
    try:
        os.close(fd)
    finally:
        account.remove_fd()


def is_sealable(fd: int) -> bool:
    """Whether it is a memfd or a file on tmpfs or hugetlbfs: nobody's but the kernel's."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def is_eventfd(fd: int) -> bool:
    """Whether it is an eventfd."""
    try:
        return kind_of(fd) == "anon_inode:[eventfd]"
    except OSError:  # it is not open
        return False


def kind_of(fd: int) -> str:
    """The path of a file, or what else it is in /proc's words. Asks no file system."""
    return os.readlink(f"/proc/self/fd/{fd}")


class OwnedFd:
    """A file descriptor that is closed unless somebody takes it.

    Until it is closed it counts as one of its account's.
    """

    __slots__ = ("_fd", "account")

    def __init__(self, fd: int, account: Account = COMMON) -> None:
        self._fd = fd
        self.account = account
        account.add_fd()

    def fileno(self) -> int:
        """The number, still ours. Raises ValueError if it was taken or closed."""
        if self._fd < 0:
            raise ValueError("this file descriptor was taken or closed")
        return self._fd

    def take(self) -> int:
        """The number; whoever calls this has to close it."""
        fd = self.fileno()
        self._fd = -1
        self.account.remove_fd()
        return fd

    def move(self) -> "OwnedFd":
        """A new owner; this one is empty after."""
        return OwnedFd(self.take(), self.account)

    def close(self) -> None:
        """Closes it; nothing if it was taken or closed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _close(fd, self.account)

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return "OwnedFd(closed)" if self._fd < 0 else f"OwnedFd({self._fd})"


def close_all(fds: Sequence[OwnedFd]) -> None:
    """Closes each that was not taken."""
    for fd in fds:
        fd.close()


def receive(
    sock: socket.socket, size: int, account: Account = COMMON, flags: int = 0
) -> tuple[bytes, list[OwnedFd]]:
    """At most `size` bytes, and the fds that came with them; b"" at the end.

    The kernel glues bytes without fds to the next ones that have some, and stops there:
    a caller who wants to know which message the fds belong to must not ask for more
    bytes than that message still lacks (`Decoder.wanted`).
    Raises ProtocolError where data or fds were cut off, or the account has too many;
    BlockingIOError passes.
    """
    data, ancillary, cut, _ = sock.recvmsg(
        size, socket.CMSG_SPACE(FDS_ROOM * INT_SIZE), socket.MSG_CMSG_CLOEXEC | flags
    )
    fds: list[OwnedFd] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % INT_SIZE])
            fds += [OwnedFd(number, account) for number in numbers]
    if len(fds) > FDS_MAX or cut & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        close_all(fds)
        raise ProtocolError(
            f"a message came with more than {FDS_MAX} file descriptors, or with more than "
            "this process may open",
            "if the front-end is sound, raise the limit of open files (ulimit -n)",
        )
    if fds:
        try:
            account.check_fds()
        except ProtocolError:
            close_all(fds)
            raise
    return data, fds


def send(sock: socket.socket, data: bytes | memoryview, fds: Sequence[OwnedFd | int] = ()) -> int:
    """Sends bytes with fds (which stay the caller's); returns how many bytes went.

    The fds are gone with the first byte: a caller who sends a rest sends it without.
    """
    if not fds:
        return sock.send(data)
    numbers = [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))
    return sock.sendmsg([data], [rights])
