"""The packed layout: what `Virtqueue` and `DriverVirtqueue` call where it was negotiated."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.ring.chain cimport Chain, Scratch
from vhostpy.ring.state cimport DriverRing, Ring, UsedEntry
from vhostpy._spec cimport DescriptorFlag
from vhostpy.memory.guest cimport Segment

cdef enum:
    INDEX = 0x7fff          # of a position
    WRAP = 0x8000
    OWNER = DescriptorFlag.DESC_AVAIL | DescriptorFlag.DESC_USED


cdef inline uint16_t available_flags(uint16_t position) noexcept nogil:
    return DescriptorFlag.DESC_AVAIL if position & WRAP else DescriptorFlag.DESC_USED


# Steps are total: whatever `slots` says, a position of a ring ends in that ring.

cdef inline uint16_t step(uint16_t position, uint32_t slots, uint32_t size) noexcept nogil:
    cdef uint32_t index = (position & INDEX) + min(slots, size)
    if index < size:
        return <uint16_t>((position & WRAP) | index)
    return <uint16_t>((position & WRAP ^ WRAP) | (index - size))


cdef inline uint16_t step_one(uint16_t position, uint32_t size) noexcept nogil:
    position += 1
    return position if (position & INDEX) < size else (position & WRAP) ^ WRAP


cdef inline uint32_t packed_distance(uint16_t start, uint16_t end, uint32_t size) noexcept nogil:
    """Slots from one position on to another, less than two rounds."""
    cdef int32_t slots = <int32_t>(end & 0x7fff) - <int32_t>(start & 0x7fff)
    if (start ^ end) & 0x8000:
        return slots + <int32_t>size
    return slots if slots >= 0 else slots + 2 * <int32_t>size


cdef inline uint32_t packed_room(const Ring *ring) noexcept nogil:
    """Slots that the driver may have filled anew: all but those of chains that were taken
    and that it has not seen come back. None where its base was a lie."""
    cdef uint32_t out = packed_distance(ring.worker.used_idx, ring.worker.last_avail,
                                        ring.control.size)
    return ring.control.size - min(out, ring.control.size)


# The back-end's end. Held: `base` is the position of the next chain to take, and above it
# (bits 16-31) that of the next used descriptor; the indexes were checked.
cdef void packed_start(Ring *ring, uint32_t base) noexcept nogil
cdef int packed_pop(Ring *ring, Chain *chains, int limit, Scratch *scratch) noexcept nogil
cdef void packed_rewind(Ring *ring, const Chain *chains, int count) noexcept nogil
cdef void packed_push(Ring *ring, const Chain *chains, const uint32_t *written,
                      int count) noexcept nogil
cdef void packed_publish(Ring *ring) noexcept nogil
cdef bint packed_arm(Ring *ring) noexcept nogil
cdef void packed_disarm(Ring *ring) noexcept nogil

# The driver's end.
cdef void packed_driver_start(DriverRing *ring, uint32_t base) noexcept nogil
cdef int packed_add(DriverRing *ring, const Segment *pieces, int readable,
                    int writable) noexcept nogil
cdef int packed_add_table(DriverRing *ring, uint64_t gpa, uint32_t length,
                          uint32_t writable) noexcept nogil
cdef int packed_reserve(DriverRing *ring, uint16_t *ids, int limit) noexcept nogil
cdef void packed_add_burst(DriverRing *ring, const uint16_t *ids, const Segment *pieces,
                           int count, bint writable) noexcept nogil
cdef bint packed_driver_publish(DriverRing *ring) noexcept nogil
cdef int packed_collect(DriverRing *ring, UsedEntry *out, int limit) noexcept nogil
cdef bint packed_driver_arm(DriverRing *ring) noexcept nogil
cdef void packed_driver_disarm(DriverRing *ring) noexcept nogil
