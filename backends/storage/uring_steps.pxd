"""A request of `uring` that one submission entry cannot carry, and the steps of its way."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from posix.uio cimport iovec
from vhostpy.backends.storage.storage cimport Request

cdef enum:
    PAGE = 4096
    ZERO_PIECES = 16
    BOUNCE_BYTES = 256 << 10

# What channels of a storage share.
cdef struct Shared:
    int flush_error         # sticky: the kernel reports a lost write only once
    uint32_t is_device
    uint32_t no_discard     # the kernel's answers, found out by trying
    uint32_t no_punch
    uint32_t no_zero_range
    uint32_t offset_alignment
    uint32_t memory_alignment
    bint direct
    # tmpfs: io_uring would hand each transfer to a thread of the kernel's, which costs
    # five times what the copy does; so the worker copies. Nothing there waits for a disk.
    bint in_memory
    int fd                  # for that
    # A guest may write less than a block where blocks are larger than sectors: then one
    # write at a time, with no other under way.
    bint gated
    int64_t writers
    int64_t alone

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

cdef Detour *new_detour(const Request *request) noexcept nogil
# All of the request is left. NULL: no memory.
cdef void step(Detour *detour, uint64_t got) noexcept nogil
# `got` bytes of the list are done; the next entry goes on behind them.
cdef void next_bounce(const Request *request, Detour *detour, uint32_t alignment) noexcept nogil
# Fills in the blocks that the next piece touches, and what has to be done first.
cdef void fill_bounce(const Request *request, Detour *detour) noexcept nogil
# What is to be written into the buffer.
cdef void copy_bounce(const Request *request, Detour *detour, bint to_guest) noexcept nogil
# The part of the buffer that is the request's, to or from its pieces.
cdef int32_t point_at_zeros(Detour *detour) noexcept nogil
# Makes `pieces` all zeros, as much as is left; how many they are.
cdef bint pass_gate(Shared *shared, Detour *detour, bint partial) noexcept nogil
# False: a write has to wait for others.
cdef int next_way(const Shared *shared, const Request *request, int tried) noexcept nogil
# How to clear, after the way that did not work; 0: there is nothing to do.
cdef bint learn(Shared *shared, int stage, int result) noexcept nogil
# Whether `result` says that this way does not work here; the next requests know it then.


cdef inline uint64_t bounce_part(const Detour *detour) noexcept nogil:
    # Bytes of the request that the buffer holds.
    return min(detour.size, detour.start + detour.length - detour.offset)
