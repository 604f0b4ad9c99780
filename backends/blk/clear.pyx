"""What a guest wants discarded, zeroed or erased: ranges in its data, as requests.

Source: virtio 1.3, "Block Device / Device Operation": struct virtio_blk_discard_write_zeroes.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc

from vhostpy.backends.blk.request cimport S_IOERR, S_UNSUPP, SECTOR, gather
from vhostpy.backends.storage.storage cimport REQUEST_UNMAP, Op, Request

cdef enum:
    RANGE = 16
    FLAG_UNMAP = 1

    # For the config space. Ranges that a storage clears in well under a second.
    CLEAR_SEGMENTS = 32
    CLEAR_SECTORS = 1 << 19

MAX_CLEAR_SEGMENTS = CLEAR_SEGMENTS
MAX_CLEAR_SECTORS = CLEAR_SECTORS


cdef int clear_requests(Slot *slot, Segment *data, int count, uint64_t size, int op,
                        uint64_t size_bytes, bint read_only) noexcept nogil:
    cdef uint64_t ranges[2 * CLEAR_SEGMENTS]
    cdef uint64_t capacity = size_bytes // SECTOR
    cdef uint64_t sector, sectors
    cdef uint32_t flags
    cdef int i, total
    cdef Request *request
    if size == 0 or size % RANGE or size // RANGE > CLEAR_SEGMENTS:
        return -S_IOERR
    total = <int>(size // RANGE)
    gather(data, count, ranges, <uint32_t>size)
    # The whole request is checked before any of it is done.
    for i in range(total):
        sector = ranges[2 * i]
        sectors = <uint32_t>ranges[2 * i + 1]
        flags = <uint32_t>(ranges[2 * i + 1] >> 32)
        if flags & ~<uint32_t>FLAG_UNMAP or (op != Op.WRITE_ZEROES and flags):
            return -S_UNSUPP
        if (sectors > CLEAR_SECTORS or sector > capacity or sectors > capacity - sector
                or read_only):
            return -S_IOERR
    if total > 1:
        slot.parts = <Request *>calloc(total, sizeof(Request))
        if slot.parts == NULL:
            return -S_IOERR
    slot.op = op
    for i in range(total):
        request = &slot.parts[i] if total > 1 else &slot.request
        request.op = op
        request.flags = REQUEST_UNMAP if ranges[2 * i + 1] >> 32 else 0
        request.offset = ranges[2 * i] * SECTOR
        request.size = <uint64_t><uint32_t>ranges[2 * i + 1] * SECTOR
        request.iov = NULL
        request.iov_count = 0
    return total
