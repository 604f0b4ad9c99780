"""File descriptors that travel over a Unix socket: each has one owner at any time.

Knows descriptors and bytes; knows no message.
"""

import array
import os
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vhostpy.errors import ProtocolError

# No message carries more: vhost-user, "Multiple Memory regions description", "Back-end
# communication". What comes beyond is closed by the kernel and seen as MSG_CTRUNC.
FDS_MAX = 8
INT_SIZE = array.array("i").itemsize


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
            os.close(fd)

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
        size, socket.CMSG_SPACE(FDS_MAX * INT_SIZE), socket.MSG_CMSG_CLOEXEC
    )
    fds: list[OwnedFd] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % INT_SIZE])
            fds += map(OwnedFd, numbers)
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
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
