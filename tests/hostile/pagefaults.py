"""Page faults that last until a test lets them end: userfaultfd(2) on our own mapping.

A hole that is punched in a guest's memory, or a page that a disk has yet to bring, makes a
thread wait in the same way; only that nobody says for how long.
"""

import ctypes
import fcntl
import os
import platform
import select
import struct
from typing import Any, Self

from vhostpy.memory.guest import GuestMemory

PAGE = 4096
SYSCALL = {"x86_64": 323, "aarch64": 282}
USER_MODE_ONLY = 1  # needs no privilege
API, REGISTER, UNREGISTER, ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0xC020AA04
MISSING = 1
DEADLINE_MS = 20_000


class PageFaults:
    """Whoever touches these pages for the first time waits for `end`."""

    def __init__(self, memory: GuestMemory, gpa: int, length: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY
        self.fd = libc.syscall(SYSCALL[platform.machine()], flags)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self.fd, API, bytearray(struct.pack("<QQQ", 0xAA, 0, 0)))
        ((self.start, got),) = memory.translate(gpa, length)
        assert got == length
        self.length = length
        fcntl.ioctl(
            self.fd, REGISTER, bytearray(struct.pack("<QQQQ", self.start, length, MISSING, 0))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.fd >= 0:
            where = bytearray(struct.pack("<QQ", self.start, self.length))
            fcntl.ioctl(self.fd, UNREGISTER, where)  # wakes all that wait
            os.close(self.fd)
            self.fd = -1

    def begun(self) -> int:
        """Waits until a thread waits; the address of its page."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        assert poll.poll(DEADLINE_MS), "nobody touched these pages"
        message = os.read(self.fd, 32)
        return struct.unpack_from("<Q", message, 16)[0] & -PAGE  # type: ignore[no-any-return]

    def end(self, page: int) -> None:
        """The page is there, full of zeros."""
        fcntl.ioctl(self.fd, ZEROPAGE, bytearray(struct.pack("<QQQq", page, PAGE, 0, 0)))
