"""The fds by which a ring's two ends signal each other: which will do, and how we signal one."""

import functools
import os

from vhostpy.errors import ProtocolError
from vhostpy.system.fds import OwnedFd, is_eventfd, kind_of
from vhostpy.system.notify import is_unix_socket, signal_once


def signal(fd: OwnedFd) -> None:
    """Signals a front-end's fd, behind the event loop's back: whatever watches it may take long.

    Nothing can close it before, as closing has to wait its turn too.
    """
    fd.account.closing.do(functools.partial(signal_once, fd.fileno()))


def call_fd_of(fd: OwnedFd | None) -> int:
    """The number of a call fd, -1 for none: an eventfd, or a Unix socket.

    User-mode Linux gives sockets, since an eventfd raises no signal that it could wait for.
    """
    if fd is not None and is_unix_socket(fd.fileno()):
        return fd.fileno()
    return eventfd_of(fd, "a call fd must be an eventfd or a Unix socket")


def eventfd_of(fd: OwnedFd | None, rule: str = "a kick or error fd must be an eventfd") -> int:
    """The number of a notification fd, -1 for none.

    Only an eventfd will do, for the reasons that `notify` gives. Its blocking flag is cleared.
    """
    if fd is None:
        return -1
    number = fd.fileno()
    if not is_eventfd(number):
        raise ProtocolError(f"{rule}, not {kind_of(number)}", "see docs/front-ends.md")
    os.set_blocking(number, False)
    return number
