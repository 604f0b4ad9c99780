"""A disk in anonymous memory, gone with the process.

Pages appear as they are written; discarded ones go back to the system, those to be erased
after they were overwritten. Copies are done on the worker that polls, a bounded piece a
poll: a guest may ask for 4 GiB at once.
"""
cimport cython
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memset
from posix.mman cimport (
    MADV_DONTNEED, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap,
    munmap,
)

from vhostpy.backends.storage.pieces cimport Position, copy_pieces
from vhostpy.backends.storage.storage cimport Channel, Op, Request, Storage

import os

from vhostpy.backends.storage.storage import check_block_size, check_size, size_text
from vhostpy.errors import ConfigError

cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE

cdef enum:
    PAGE = 4096
    STEP_BYTES = 512 << 10      # copied by one poll: about 50 us
    STEP_RELEASED = 4 << 20     # given back by one poll: 1,024 pages, about 100 us


@cython.final
cdef class RamStorage(Storage):
    """`size` bytes of zeros to begin with."""
    cdef uint8_t *base

    def __init__(self, size: int, block_size: int = 512) -> None:
        self.block_size = check_block_size(block_size)
        check_size(size, block_size, "RAM disk")
        if self.base != NULL:
            raise TypeError("made already")
        self.base = <uint8_t *>mmap(NULL, size, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.base == <uint8_t *>MAP_FAILED:
            self.base = NULL
            raise ConfigError(f"RAM disk of {size} bytes: {os.strerror(errno)}",
                              hint="choose a smaller one")
        self.size_bytes = size
        self.can_discard = self.can_write_zeroes = self.can_secure_erase = True
        self.name = f"ram {size_text(size)}"

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.size_bytes)

    def channel(self) -> RamChannel:
        return RamChannel(self)


@cython.final
cdef class RamChannel(Channel):
    """Requests in order of arrival; the first may be half done."""
    cdef RamStorage storage
    cdef Request *first
    cdef Request **last
    cdef uint64_t progress      # bytes of `first` that are done
    cdef Position position      # where that is, in its pieces

    def __cinit__(self, RamStorage storage not None):
        self.storage = storage
        self.last = &self.first

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        cdef int i
        for i in range(count):
            burst[i].next = NULL
            self.last[0] = burst[i]
            self.last = &burst[i].next
        return count

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        cdef int count = 0
        cdef int64_t budget = STEP_BYTES
        cdef Request *request
        while count < limit and budget > 0 and self.first != NULL:
            request = self.first
            if request.op == Op.READ or request.op == Op.WRITE:
                budget -= self.copy(request, <uint64_t>budget)
            elif request.op == Op.FLUSH:
                self.progress = request.size
            else:
                budget -= self.release(request)
            if self.progress < request.size:
                break
            request.result = 0
            self.first = request.next
            self.progress = self.position.at = 0
            self.position.piece = 0
            done[count] = request
            count += 1
        if self.first == NULL:
            self.last = &self.first
        return count

    cdef bint arm(self) noexcept nogil:
        return self.first != NULL

    cdef int64_t copy(self, Request *request, uint64_t budget) noexcept nogil:
        cdef uint64_t length = min(request.size - self.progress, budget)
        copy_pieces(request, &self.position, self.storage.base + request.offset + self.progress,
                    length, request.op == Op.READ)
        self.progress += length
        return <int64_t>length

    cdef int64_t release(self, Request *request) noexcept nogil:
        """Zeros by giving pages back; parts of a page are written. What it cost."""
        cdef uint64_t start = request.offset + self.progress
        cdef bint erases = request.op == Op.SECURE_ERASE
        cdef uint64_t end = min(request.offset + request.size,
                                start + <uint64_t>(STEP_BYTES if erases else STEP_RELEASED))
        cdef uint64_t first = (start + PAGE - 1) & ~<uint64_t>(PAGE - 1)
        cdef uint64_t last = end & ~<uint64_t>(PAGE - 1)
        self.progress = end - request.offset
        if erases:
            # The page that the system takes back holds nothing any more.
            memset(self.storage.base + start, 0, end - start)
        if first >= last:
            memset(self.storage.base + start, 0, end - start)
            return PAGE
        memset(self.storage.base + start, 0, first - start)
        memset(self.storage.base + last, 0, end - last)
        if madvise(self.storage.base + first, last - first, MADV_DONTNEED) < 0:
            memset(self.storage.base + first, 0, last - first)     # locked pages
        return <int64_t>(end - start if erases else ((last - first) >> 3) + PAGE)
