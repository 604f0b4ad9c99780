"""The split layout: what `Virtqueue` and `DriverVirtqueue` call where it was negotiated."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.ring.chain cimport Chain, Scratch
from vhostpy.ring.state cimport DriverRing, Ring, UsedEntry
from vhostpy.memory.guest cimport Segment

# The back-end's end. Held: `base` is where the next avail entry is taken.
cdef void split_start(Ring *ring, uint16_t base) noexcept nogil
cdef bint split_contradicts(const Ring *ring) noexcept nogil
# The ring is neither where it was started nor could it come to be there.
cdef int split_pop(Ring *ring, Chain *chains, int limit, Scratch *scratch) noexcept nogil
cdef void split_push(Ring *ring, const Chain *chains, const uint32_t *written,
                     int count) noexcept nogil
cdef void split_publish(Ring *ring) noexcept nogil
cdef bint split_arm(Ring *ring) noexcept nogil
cdef void split_disarm(Ring *ring) noexcept nogil

# The driver's end.
cdef void split_driver_start(DriverRing *ring, uint16_t base) noexcept nogil
cdef int split_add(DriverRing *ring, const Segment *pieces, int readable,
                   int writable) noexcept nogil
cdef int split_add_table(DriverRing *ring, uint64_t gpa, uint32_t length,
                         uint32_t writable) noexcept nogil
cdef int split_reserve(DriverRing *ring, uint16_t *ids, int limit) noexcept nogil
cdef void split_add_burst(DriverRing *ring, const uint16_t *ids, const Segment *pieces,
                          int count, bint writable) noexcept nogil
cdef bint split_driver_publish(DriverRing *ring) noexcept nogil
cdef int split_collect(DriverRing *ring, UsedEntry *out, int limit) noexcept nogil
cdef bint split_driver_arm(DriverRing *ring) noexcept nogil
cdef void split_driver_disarm(DriverRing *ring) noexcept nogil
