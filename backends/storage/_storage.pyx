"""Base classes of storages; see `_storage.pxd` for the contract."""
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.time cimport nanosleep, timespec

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

    # Door, for tests. ------------------------------------------------------------------

    def run(self, op, offset: int, size: int, data: bytes = b"", *, flags: int = 0,
            piece: int = 4096, timeout_s: float = 10) -> tuple:
        """One request by itself, from buffers of `piece` bytes: (result, bytes read)."""
        cdef Request *request = <Request *>calloc(1, sizeof(Request))
        cdef Request *done = NULL
        cdef char *buffer = NULL
        cdef timespec nap
        cdef uint64_t at = 0
        cdef int taken = 0
        nap.tv_sec, nap.tv_nsec = 0, 50_000
        request.op, request.flags = op, flags
        request.offset, request.size = offset, size
        request.result = 1
        if op <= Op.WRITE:
            assert not data or len(data) == size
            buffer = <char *>malloc(size)
            if data:
                memcpy(buffer, <const char *>data, size)
            request.iov = <iovec *>calloc(size // piece + 1, sizeof(iovec))
            while at < request.size:
                request.iov[request.iov_count].iov_base = buffer + at
                request.iov[request.iov_count].iov_len = min(<uint64_t>piece, request.size - at)
                at += request.iov[request.iov_count].iov_len
                request.iov_count += 1
        deadline = time.monotonic() + timeout_s
        while not taken or done == NULL:
            if time.monotonic() > deadline:
                raise TimeoutError      # and the buffers are left to the storage
            with nogil:
                if not taken:
                    taken = self.submit(&request, 1)
                if self.poll(&done, 1) == 0:
                    nanosleep(&nap, NULL)
        result = request.result
        out = buffer[:size] if op == Op.READ else b""
        free(request.iov)
        free(buffer)
        free(request)
        return result, out
