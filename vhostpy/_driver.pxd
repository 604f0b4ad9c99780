"""The driver's end of a virtqueue, in memory that this process owns."""
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from vhostpy._ends cimport DriverRing, UsedEntry
from vhostpy.memory cimport GuestMemory, Segment


@cython.final
cdef class DriverVirtqueue:
    cdef DriverRing *ring
    cdef readonly GuestMemory memory
    cdef readonly uint64_t features
    cdef int add_chain(self, const Segment *pieces, int readable, int writable) noexcept nogil
    # Adds a chain of readable, then writable pieces (`gpa` and `length` count); its id,
    # or -1 when too few descriptors are free. Not visible to the device before publish().
    cdef int add_table(self, uint64_t gpa, uint32_t length) noexcept nogil
    # The same for an indirect table that lies at `gpa` already.
    cdef bint publish(self) noexcept nogil
    # Makes added chains visible; True when the device asks for a kick.
    cdef int collect(self, UsedEntry *out, int limit) noexcept nogil
    # Chains that the device gave back, up to `limit`; RING_BROKEN if it gives back what
    # it does not have.
