"""The lock on an image: two writers would destroy it.

Compatible with QEMU's ("file.locking", block/file-posix.c): byte 100 + n of the image is
locked, for reading, by whoever uses permission n, and byte 200 + n by whoever lets nobody
else have it. A byte locked in the other range is a conflict. The bytes need not exist.

The locks are the open file's (F_OFD_SETLK): they last until the kernel has ended the last
request of a killed process, and so does the wait for them.
"""

import contextlib
import errno
import fcntl
import logging
import os
import struct
import time

from vhostpy.errors import ConfigError

log = logging.getLogger("vhostpy")

USED, UNSHARED = 100, 200
# Permissions: QEMU, include/block/block-common.h, as bit numbers.
CONSISTENT_READ, WRITE, RESIZE = 0, 1, 3
LOCK = struct.Struct("@hhqqi")  # struct flock

WAIT_S = 30.0  # for a process that dies
GRACE_S = 1.0  # for one that lives: it may be about to end
PROGRESS_S = 5.0
PF_EXITING = 4  # proc(5), /proc/pid/stat, field 9
SIGKILL_PENDING = 1 << 8


def lock_image(fd: int, path: str, *, read_only: bool, share_rw: bool = False) -> None:
    """Locks the image for the life of `fd`. Raises ConfigError where others have it.

    Many may read; a writer is alone, unless all say `share_rw`, as both ends of a live
    migration do. Waits while the lock's holder is dying.
    """
    used = [CONSISTENT_READ] if read_only else [CONSISTENT_READ, WRITE]
    unshared = [RESIZE] if share_rw else [WRITE, RESIZE]
    started = time.monotonic()
    progress_s = 0.0  # when to speak next
    pause_s = 0.02
    while not _try_lock(fd, path, used, unshared):
        holder = _holder(fd)
        waited_s = time.monotonic() - started
        if waited_s >= (GRACE_S if holder else WAIT_S):
            raise ConfigError(
                f"{path}: in use by {holder or 'another process, which cannot be seen from here'}",
                "an image has one writer, or readers only; see who holds it: lslocks, lsof; both "
                "ends of a live migration need --share-rw",
            )
        if not holder and waited_s >= progress_s:
            progress_s += PROGRESS_S
            log.warning(
                "%s: still locked, perhaps by requests of a process that was killed; waiting "
                "%.0f s more at most",
                path,
                WAIT_S - waited_s,
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.25)


def unlock_image(fd: int) -> None:
    """Gives the locks back at once: what else has the open file may let it go later."""
    whole = LOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, USED, 2 * (UNSHARED - USED), 0)
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)


def _try_lock(fd: int, path: str, used: list[int], unshared: list[int]) -> bool:
    """Takes all locks or none. Those that come later see ours, so look after taking."""
    ours = [USED + n for n in used] + [UNSHARED + n for n in unshared]
    theirs = [UNSHARED + n for n in used] + [USED + n for n in unshared]
    try:
        for byte in ours:
            _lock(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # somebody's lock for writing
            _unlock(fd, ours)
            return False
        log.warning(
            "%s: its file system has no locks (%s): nothing keeps a second process from it",
            path,
            error.strerror,
        )
        return True
    # As a lock for writing is what our own, for reading, do not conflict with.
    free = all(
        _lock(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) == fcntl.F_UNLCK for byte in theirs
    )
    if not free:
        _unlock(fd, ours)
    return free


def _unlock(fd: int, taken: list[int]) -> None:
    for byte in taken:
        _lock(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)


def _lock(fd: int, command: int, kind: int, byte: int) -> int:
    result = fcntl.fcntl(fd, command, LOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    return int(LOCK.unpack(result)[0])


def _holder(fd: int) -> str:
    """A living process that has the image open, in words; "" where none can be seen."""
    image = os.fstat(fd)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        ourselves = int(pid) == os.getpid()
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
            if _count_open(pid, image) > ourselves and not _is_dying(pid):
                with open(f"/proc/{pid}/comm") as comm:
                    name = comm.read().strip()
                return "this process" if ourselves else f"{name} (pid {pid})"
    return ""


def _count_open(pid: str, image: os.stat_result) -> int:
    count = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since
            opened = os.stat(f"/proc/{pid}/fd/{number}")
            count += (opened.st_dev, opened.st_ino) == (image.st_dev, image.st_ino)
    return count


def _is_dying(pid: str) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        flags = int(stat.read().rpartition(")")[2].split()[6])
    with open(f"/proc/{pid}/status") as status:
        pending = [
            int(line.split()[1], 16) for line in status if line.startswith(("SigPnd:", "ShdPnd:"))
        ]
    return bool(flags & PF_EXITING or any(mask & SIGKILL_PENDING for mask in pending))
