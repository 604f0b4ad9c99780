"""What is finite in this process, divided among its sockets: fds, mappings, addresses, closings.

One socket's front-ends can use up their share and no more; the rest is others' and our own.
Knows numbers; opens and maps nothing.
"""

import functools
import resource
import threading
import weakref
from typing import Any

from vhostpy.errors import ProtocolError
from vhostpy.system.background import Background
from vhostpy.system.calls import Calls

# All mappings together, of 128 TiB that a process has: a sparse file costs its sender nothing.
ADDRESSES_MAX = 1 << 46
# The table that contains SIGBUS (sigbus.h) has as many slots.
MAPPINGS_MAX = 65536
# What is ours: listeners, workers, storages need fds; threads and libraries need mappings.
FDS_SHARED = 1 / 2
MAPPINGS_SHARED = 7 / 8
UNLIMITED_FDS = 1 << 20

_sockets: "weakref.WeakSet[Account]" = weakref.WeakSet()


class Account:
    """What one socket's front-ends hold, and may.

    Of sockets there is one each, for as long as it is served (`open`, `close`); what belongs
    to none of them is COMMON's, which has no share.
    """

    def __init__(self, *, file_memory: bool = False) -> None:
        self.file_memory = file_memory  # guest memory may be in a file on a disk
        self.fds = 0
        self.mappings = 0
        self.mapped_bytes = 0
        # Closes what may wait for somebody. One that hangs holds up this socket's alone.
        self.closing = Background("closing")
        self.calls = Calls()  # what calling its drivers has cost
        # A collection may close an fd within: hence the R.
        self._lock = threading.RLock()

    def open(self) -> None:
        """One socket more among which all is divided."""
        _sockets.add(self)

    def close(self) -> None:
        """One socket less."""
        _sockets.discard(self)

    # Shares ----------------------------------------------------------------------------

    @property
    def fds_share(self) -> int:
        return self._share(int(fd_limit() * FDS_SHARED))

    @property
    def mappings_share(self) -> int:
        return self._share(int(min(mapping_limit(), MAPPINGS_MAX) * MAPPINGS_SHARED))

    @property
    def mapped_bytes_share(self) -> int:
        return self._share(ADDRESSES_MAX)

    def _share(self, total: int) -> int:
        return total // len(_sockets) if self in _sockets else total

    # What is held ----------------------------------------------------------------------

    def add_fd(self) -> None:
        with self._lock:
            self.fds += 1

    def remove_fd(self) -> None:
        with self._lock:
            self.fds -= 1

    def check_fds(self) -> None:
        """Raises ProtocolError where more are open than the share."""
        share = self.fds_share
        if self.fds > share:
            raise ProtocolError(
                f"more than {share} file descriptors: the share of each of {len(_sockets)} "
                f"sockets, of {fd_limit()} that this process may open",
                "raise the limit of open files (ulimit -Hn), or serve fewer sockets with one "
                "process",
            )

    def add_mapping(self, size_bytes: int, what: str) -> None:
        """Raises ProtocolError, which begins with `what`, where the share is used up."""
        with self._lock:
            if self.mappings + 1 > self.mappings_share:
                raise ProtocolError(
                    f"{what}: more than {self.mappings_share} mappings: the share of each of "
                    f"{len(_sockets)} sockets",
                    "raise vm.max_map_count (of use up to 65536), or serve fewer sockets with one "
                    "process",
                )
            if self.mapped_bytes + size_bytes > self.mapped_bytes_share:
                raise ProtocolError(
                    f"{what}: more than {self.mapped_bytes_share >> 30} GiB of addresses: the "
                    f"share of each of {len(_sockets)} sockets",
                    "a front-end should send only memory that its guest has; if that is so much, "
                    "serve fewer sockets with one process",
                )
            self.mappings += 1
            self.mapped_bytes += size_bytes

    def remove_mapping(self, size_bytes: int) -> None:
        with self._lock:
            self.mappings -= 1
            self.mapped_bytes -= size_bytes

    def status(self) -> dict[str, Any]:
        """What is held, and the shares."""
        return {
            "fds": self.fds,
            "fds_share": self.fds_share,
            "mappings": self.mappings,
            "mappings_share": self.mappings_share,
            "mapped_bytes": self.mapped_bytes,
            "mapped_bytes_share": self.mapped_bytes_share,
            "closing": self.closing.left,
            "calls_left_out": self.calls.left_out,
        }


COMMON = Account()


def fd_limit() -> int:
    """How many fds this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED_FDS if soft == resource.RLIM_INFINITY else soft


@functools.cache
def mapping_limit() -> int:
    """proc(5), max_map_count: how many mappings a process may have."""
    try:
        with open("/proc/sys/vm/max_map_count") as limit:
            return int(limit.read())
    except OSError:  # a container may hide it
        return MAPPINGS_MAX
