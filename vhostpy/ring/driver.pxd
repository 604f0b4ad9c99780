"""The driver's end of a virtqueue, in memory that this process owns."""
cimport cython
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vhostpy.ring.state cimport DriverRing, UsedEntry
from vhostpy.memory.guest cimport GuestMemory, Segment


@cython.final
cdef class DriverVirtqueue:
    cdef DriverRing *ring
    cdef readonly GuestMemory memory
    cdef readonly uint64_t features
    cdef int add_chain(self, const Segment *pieces, int readable, int writable) noexcept nogil
    # Adds a chain of readable, then writable pieces (`gpa` and `length` count); its id,
    # or -1 when too few descriptors are free. Not visible to the device before publish().
    cdef int add_table(self, uint64_t gpa, uint32_t length, uint32_t writable) noexcept nogil
    # The same for an indirect table that lies at `gpa` already, with `writable` bytes in it.
    cdef int reserve(self, uint16_t *ids, int limit) noexcept nogil
    # The ids that the next descriptors will have, up to `limit` of those that are free; how
    # many. A chain's id is that of its first. Fetches what add_burst() is going to write.
    cdef void add_burst(self, const uint16_t *ids, const Segment *pieces, int count,
                        bint writable) noexcept nogil
    # Adds a chain of one descriptor for each piece; `ids` and `count` are reserve()'s.
    cdef bint publish(self) noexcept nogil
    # Makes added chains visible; True when the device asks for a kick.
    cdef int collect(self, UsedEntry *out, int limit) noexcept nogil
    # Chains that the device gave back, up to `limit`; RING_BROKEN if it gives back what
    # it does not have.
