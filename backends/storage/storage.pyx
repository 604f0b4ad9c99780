"""Base classes of storages; see `storage.pxd` for the contract."""
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.time cimport nanosleep, timespec

import contextlib
import select
import time

from vhostpy.errors import ConfigError


def size_text(size: int) -> str:
    """1T, 512M, 1536: as the command line takes it."""
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)


def check_block_size(block_size: int) -> int:
    """Guests take these; a larger one does not fit their pages."""
    if block_size not in (512, 1024, 2048, 4096):
        raise ConfigError(f"block size {block_size}", hint="512, 1024, 2048 or 4096")
    return block_size


def check_size(size: int, block_size: int, what: str) -> int:
    """`size`, of a storage that has no size of its own."""
    if size < block_size or size % block_size or size >> 63:
        raise ConfigError(f"{what} of {size} bytes", hint=f"a multiple of {block_size} is needed")
    return size


cdef class Storage:
    """What a disk is made of; subclasses say how."""

    def channel(self):
        """A new queue into this storage, for one worker's use."""
        raise NotImplementedError

    def actual_bytes(self) -> int:
        """How large what it stands on is now; may wait for that. Any thread."""
        return self.size_bytes

    def grow(self, actual_bytes: int) -> bool:
        """Shows whole blocks of `actual_bytes` from now on; False: no more than before.

        It never shrinks: a guest may have read or written any of it.
        """
        size = actual_bytes // self.block_size * self.block_size
        if size <= self.size_bytes:
            return False
        self.size_bytes = size      # one store; workers look at it at each request
        return True

    def close(self) -> None:
        """Releases what the storage holds; every channel is closed before."""


cdef class Channel:
    """One user's queue into a storage."""

    def __cinit__(self):
        self.completion_fd = -1

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        return 0

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        return 0

    cdef bint arm(self) noexcept nogil:
        return False

    cdef void disarm(self) noexcept nogil:
        pass

    def close(self) -> None:
        """Called when no request is under way."""

    # Doors, for tests. -----------------------------------------------------------------

    def run(self, op, offset: int, size: int, data: bytes = b"", *, flags: int = 0,
            piece: int = 4096, gap: int = 0, timeout_s: float = 10) -> tuple:
        """One request by itself: (result, bytes read).

        From buffers of `piece` bytes that lie `gap` bytes apart.
        """
        request = (op, offset, size, data, flags, piece, gap)
        return self.run_all([request], timeout_s=timeout_s)[0]

    def run_all(self, requests: list, *, sleep: bool = False, timeout_s: float = 10) -> list:
        """Requests as `run()` takes them, all under way at once. `sleep`: as a worker does
        that has nothing else to do."""
        cdef int count = len(requests), taken = 0, ended = 0, found = 0, i
        cdef Request *all = <Request *>calloc(count, sizeof(Request))
        cdef Request **burst = <Request **>calloc(count, sizeof(Request *))
        cdef Request *done[16]
        cdef timespec nap
        nap.tv_sec, nap.tv_nsec = 0, 50_000
        requests = list(requests)
        for i in range(count):
            burst[i] = &all[i]
            requests[i] = (*requests[i], *DEFAULTS[len(requests[i]) - 3:])
            make_request(&all[i], requests[i])
        deadline = time.monotonic() + timeout_s
        with contextlib.ExitStack() as stack:
            poller = select.epoll()
            stack.callback(poller.close)
            if self.completion_fd >= 0:
                poller.register(self.completion_fd, select.EPOLLIN | select.EPOLLET)
            while ended < count:
                if time.monotonic() > deadline:
                    raise TimeoutError      # and the buffers are left to the storage
                with nogil:
                    if taken < count:
                        taken += self.submit(burst + taken, count - taken)
                    found = self.poll(done, 16)
                    if found == 0 and not sleep:
                        nanosleep(&nap, NULL)
                ended += found
                if found == 0 and sleep:
                    if not self.arm():
                        poller.poll(timeout_s)
                    self.disarm()
        results = []
        for i in range(count):
            results.append((all[i].result, take_buffer(&all[i], requests[i][6])))
        free(burst)
        free(all)
        return results


DEFAULTS = (b"", 0, 4096, 0)   # of a request's data, flags, piece, gap


cdef make_request(Request *request, tuple values):
    cdef char *buffer
    cdef char *source
    cdef iovec *iov
    cdef uint64_t at = 0, gap
    op, offset, size, data, flags, piece, gap = values
    request.op, request.flags = op, flags
    request.offset, request.size = offset, size
    request.result = 1
    request.owner = NULL
    if op > Op.WRITE:
        return
    assert not data or len(data) == size
    source = data
    buffer = <char *>malloc(size + (size // piece + 1) * gap)
    request.owner = buffer
    request.iov = <iovec *>calloc(size // piece + 1, sizeof(iovec))
    while at < request.size:
        iov = &request.iov[request.iov_count]
        iov.iov_base = buffer + at + request.iov_count * gap
        iov.iov_len = min(<uint64_t>piece, request.size - at)
        if data:
            memcpy(iov.iov_base, source + at, iov.iov_len)
        at += iov.iov_len
        request.iov_count += 1


cdef bytes take_buffer(Request *request, uint64_t gap):
    """What was read. Also looks whether the list came back as it was."""
    cdef char *buffer = <char *>request.owner
    cdef char *base
    cdef uint64_t at = 0
    cdef int i
    parts = []
    for i in range(request.iov_count):
        base = <char *>request.iov[i].iov_base
        assert base == buffer + at + i * gap, "the list was changed"
        parts.append(base[:request.iov[i].iov_len] if request.op == Op.READ else b"")
        at += request.iov[i].iov_len
    assert request.op > Op.WRITE or at == request.size, "the list was changed"
    data = b"".join(parts)
    free(request.iov)
    free(buffer)
    return data
