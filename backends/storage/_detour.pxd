"""A request of `uring` that one submission entry cannot carry, and the steps of its way."""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from posix.uio cimport iovec
from vhostpy.backends.storage._storage cimport Request

cdef enum:
    PAGE = 4096
    ZERO_PIECES = 16
    BOUNCE_BYTES = 256 << 10

# What a request on a detour is at.
cdef enum Stage:
    CONTINUE                # pieces of the request that are left
    BOUNCE                  # a piece through the buffer
    MERGE                   # first reads the blocks that a write changes in part
    # Ways to clear, in this order.
    DISCARD_BLOCKS
    PUNCH_HOLE
    ZERO_RANGE
    WRITE_ZEROS

cdef struct Detour:
    int stage
    bint bounces            # counted in the channel's `bounces`
    bint writes             # counted in the storage's `writers`
    bint alone              # it holds the storage's `alone`
    uint64_t offset         # of what is left
    uint64_t size
    iovec *iov              # for the next entry
    int32_t count
    iovec *cut_at           # a piece of the request's whose start we moved, or NULL
    iovec cut               # as it was
    uint8_t *buffer         # BOUNCE_BYTES
    uint64_t start          # what the buffer holds: from this offset, in whole blocks,
    uint64_t length         # so many bytes
    uint64_t moved          # of them are transferred
    iovec pieces[ZERO_PIECES]

cdef void step(Detour *detour, uint64_t got) noexcept nogil
# `got` bytes of the list are done; the next entry goes on behind them.
cdef void copy_part(const Request *request, uint64_t at, uint8_t *buffer, uint64_t length,
                    bint from_buffer) noexcept nogil
# `length` bytes of the request's buffers, from byte `at` on, to or from `buffer`.
cdef void next_bounce(const Request *request, Detour *detour, uint32_t alignment) noexcept nogil
# Fills in the blocks that the next piece touches, and what has to be done first.
cdef void fill_bounce(const Request *request, Detour *detour) noexcept nogil
# What is to be written into the buffer.
cdef int32_t point_at_zeros(Detour *detour) noexcept nogil
# Makes `pieces` all zeros, as much as is left; how many they are.


cdef inline uint64_t bounce_part(const Detour *detour) noexcept nogil:
    # Bytes of the request that the buffer holds.
    return min(detour.size, detour.start + detour.length - detour.offset)
