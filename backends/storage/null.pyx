"""A disk of nothing: requests succeed at once and touch no memory.

Shows what the path from the guest to a storage and back costs.
"""
cimport cython

from vhostpy.backends.storage.storage cimport Channel, Request, Storage

from vhostpy.backends.storage.storage import check_block_size, check_size, size_text


@cython.final
cdef class NullStorage(Storage):
    """`size` bytes; what a read returns is undefined: nothing is written to its buffers."""

    def __init__(self, size: int, block_size: int = 512) -> None:
        self.block_size = check_block_size(block_size)
        self.size_bytes = check_size(size, block_size, "null disk")
        self.can_discard = self.can_write_zeroes = True
        self.name = f"null {size_text(size)}"

    def channel(self) -> NullChannel:
        return NullChannel()


@cython.final
cdef class NullChannel(Channel):
    cdef Request *first
    cdef Request **last

    def __cinit__(self):
        self.last = &self.first

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        cdef int i
        for i in range(count):
            burst[i].result = 0
            burst[i].next = NULL
            self.last[0] = burst[i]
            self.last = &burst[i].next
        return count

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        cdef int count = 0
        while count < limit and self.first != NULL:
            done[count] = self.first
            self.first = self.first.next
            count += 1
        if self.first == NULL:
            self.last = &self.first
        return count

    cdef bint arm(self) noexcept nogil:
        return self.first != NULL
