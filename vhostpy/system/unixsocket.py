"""Socket files, in directories that others may write to as well.

Between two looks at a path somebody can put something else there, or turn a directory on the
way into a link to another. So what is changed is held by a descriptor, and what is removed is
removed from the directory in which it was looked at.
"""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator

from vhostpy.errors import ConfigError


@contextlib.contextmanager
def just_bound(path: str) -> Iterator[str]:
    """A name for the socket file that we have bound to `path` and do not listen on yet.

    It stays this file's, wherever `path` leads. Raises ConfigError where something else lies
    there by now: a socket on which somebody listens is not ours, and any other nobody's loss.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        name = f"/proc/self/fd/{fd}"  # no other way to change what O_PATH holds
        if not stat.S_ISSOCK(os.fstat(fd).st_mode) or not _is_refused(name):
            raise ConfigError(
                f"{path}: somebody has put something else in the socket's place",
                "choose a directory that only those may write to whom you trust",
            )
        yield name
    finally:
        os.close(fd)


def is_served(path: str | os.PathLike[str]) -> bool:
    """Whether a living process has the socket at `path`; it hears nothing of the question.

    To connect would be seen as a peer that comes and goes. A socket of another type cannot
    be connected, and the kernel says so (EPROTOTYPE) only where somebody has the other end.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError as error:
            return error.errno in (errno.EPROTOTYPE, errno.EACCES, errno.EPERM)
    return True  # of this very type


def identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Of what lies at `path`, links not followed; to be recognised by later."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def remove_if(path: str | os.PathLike[str], is_meant: Callable[[os.stat_result], bool]) -> None:
    """Removes what lies at `path` if it is what is meant; no matter if nothing does."""
    directory, name = os.path.split(os.fspath(path))
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Who swaps it now may write to this directory, and could remove it himself.
            if is_meant(os.lstat(name, dir_fd=fd)):
                os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)


def remove_own(path: str | os.PathLike[str], ours: tuple[int, int]) -> None:
    """Removes the file that had this `identity`, not what another process has put there."""
    remove_if(path, lambda status: (status.st_dev, status.st_ino) == ours)


def _is_refused(name: str) -> bool:
    """Nobody listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
    return False
