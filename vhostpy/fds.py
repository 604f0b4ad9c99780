"""File descriptors that travel over a Unix socket: each has one owner at any time.

To close one that a stranger sent holds nobody up. Knows descriptors and bytes; knows no message.
"""

import array
import contextlib
import fcntl
import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from vhostpy.errors import ProtocolError

log = logging.getLogger("vhostpy")

# No message carries more: vhost-user, "Multiple Memory regions description", "Back-end
# communication".
FDS_MAX = 8
# unix(7), SCM_RIGHTS: the most that one sendmsg() passes. Room for all of them, or the
# kernel closes the rest within recvmsg(), which then blocks as close() may.
FDS_ROOM = 253
INT_SIZE = array.array("i").itemsize

# unix(7): bytes of a socket's path, less the closing zero.
SOCKET_PATH_MAX = 107
# What whoever closes a foreign file waits for it: nearly always long enough.
CLOSE_PATIENCE_S = 0.02
# So many of them may hang before nobody waits any more.
HUNG_MAX = 8


class Closer:
    """Closes files of strangers: their close() may block for as long as they like.

    A socket with SO_LINGER waits for its peer, a file on FUSE or NFS for a server. A
    thread closes them, one after the other; when one hangs, another takes its place, and
    once none hangs one is left.
    """

    def __init__(self) -> None:
        self.hung = 0  # closings that somebody has given up to wait for
        self.threads = 0
        self._queue: SimpleQueue[_Closing] = SimpleQueue()
        # Only ever held for a moment. A collection may close an fd within: hence the R.
        self._lock = threading.RLock()
        self._told = self._told_full = False

    def close(self, fd: int) -> None:
        """Has `fd` closed; when this returns it is, unless that hangs."""
        if sys.is_finalizing():
            return  # no thread would run any more; the kernel closes it in a moment
        closing = _Closing(fd)
        self._queue.put(closing)
        if not self._ensure_thread():
            return
        if not closing.finished.acquire(timeout=CLOSE_PATIENCE_S):
            self._give_up(closing)

    def _ensure_thread(self) -> bool:
        """Starts a thread where none is free. False: none may be, and what is queued waits."""
        with self._lock:
            if self.hung >= HUNG_MAX:
                if not self._told_full:
                    self._told_full = True
                    log.error(
                        "%d file descriptors of front-ends hang when they are closed; "
                        "further ones stay open until one of these is done",
                        self.hung,
                    )
                return False
            if self.threads <= self.hung:
                self.threads += 1
                try:
                    threading.Thread(target=self._run, name="closer", daemon=True).start()
                except RuntimeError:  # the process may have no more threads
                    self.threads -= 1
                    return False
            return True

    def _give_up(self, closing: "_Closing") -> None:
        with self._lock:
            if closing.done:
                return
            closing.given_up = True
            self.hung += 1
            if not self._queue.empty():
                self._ensure_thread()
            if not self._told:
                self._told = True
                log.warning(
                    "closing a file descriptor that a front-end sent takes long: a lingering "
                    "socket, or a file whose server does not answer (said once)"
                )

    def _run(self) -> None:
        while True:
            closing = self._queue.get()
            # What a close reports has happened to somebody else's file.
            with contextlib.suppress(OSError):
                os.close(closing.fd)
            with self._lock:
                closing.done = True
                self.hung -= closing.given_up
                is_spare = self.threads > self.hung + 1 and self._queue.empty()
                self.threads -= is_spare
            closing.finished.release()
            if is_spare:
                return


class _Closing:
    """One fd on its way."""

    __slots__ = ("done", "fd", "finished", "given_up")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.done = self.given_up = False
        self.finished = threading.Lock()
        self.finished.acquire()


closer = Closer()


def close(fd: int) -> None:
    """Closes any fd that somebody else sent; waits for nobody longer than a moment."""
    if _closes_at_once(fd):
        os.close(fd)
    else:
        closer.close(fd)


def close_socket(sock: socket.socket) -> None:
    """Closes a socket that fds may wait in, which go with it."""
    number = sock.detach()
    if number >= 0:
        close(number)


def is_sealable(fd: int) -> bool:
    """Whether it is a memfd or a file on tmpfs or hugetlbfs: nobody's but the kernel's."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def is_eventfd(fd: int) -> bool:
    """Whether it is an eventfd."""
    return kind_of(fd) == "anon_inode:[eventfd]"


def kind_of(fd: int) -> str:
    """The path of a file, or what else it is in /proc's words. Asks no file system."""
    return os.readlink(f"/proc/self/fd/{fd}")


def _closes_at_once(fd: int) -> bool:
    try:
        return is_sealable(fd) or is_eventfd(fd)
    except OSError:
        return False


class OwnedFd:
    """A file descriptor that is closed unless somebody takes it."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The number, still ours. Raises ValueError if it was taken or closed."""
        if self._fd < 0:
            raise ValueError("this file descriptor was taken or closed")
        return self._fd

    def take(self) -> int:
        """The number; whoever calls this has to close it."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def move(self) -> "OwnedFd":
        """A new owner; this one is empty after."""
        return OwnedFd(self.take())

    def close(self) -> None:
        """Closes it; nothing if it was taken or closed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close(fd)

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


def receive(sock: socket.socket, size: int) -> tuple[bytes, list[OwnedFd]]:
    """At most `size` bytes, and the fds that came with them; b"" at the end.

    The kernel glues bytes without fds to the next ones that have some, and stops there:
    a caller who wants to know which message the fds belong to must not ask for more
    bytes than that message still lacks (`Decoder.wanted`).
    Raises ProtocolError where data or fds were cut off; BlockingIOError passes.
    """
    data, ancillary, flags, _ = sock.recvmsg(
        size, socket.CMSG_SPACE(FDS_ROOM * INT_SIZE), socket.MSG_CMSG_CLOEXEC
    )
    fds: list[OwnedFd] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % INT_SIZE])
            fds += map(OwnedFd, numbers)
    if len(fds) > FDS_MAX or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        close_all(fds)
        raise ProtocolError(
            f"a message came with more than {FDS_MAX} file descriptors, or with more than "
            "this process may open",
            "if the front-end is sound, raise the limit of open files (ulimit -n)",
        )
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
