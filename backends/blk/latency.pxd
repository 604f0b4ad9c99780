"""How long a disk's requests take: a histogram for each operation of each queue.

A bin is a quarter of a power of two, so a time is known within 12 %. From the poll that took
a request to the one that answers it: what the guest sees, but for its own notifications.
Counting is a subtraction, a leading-zero count and an increment.
"""
from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil

cdef enum:
    OPS = 6                 # of _storage.Op
    STEP_BITS = 2
    BINS = 252              # 2**64 ticks: (64 - STEP_BITS + 1) << STEP_BITS

cdef struct Latency:
    uint64_t bins[OPS][BINS]    # requests; by the worker that polls the queue

cdef inline uint32_t bin_of(uint64_t elapsed) noexcept nogil:
    cdef int exponent
    if elapsed < 1 << STEP_BITS:
        return <uint32_t>elapsed
    exponent = 63 - __builtin_clzll(elapsed) - STEP_BITS
    return <uint32_t>((exponent << STEP_BITS) + (elapsed >> exponent))

cdef inline void count_latency(Latency *latency, int op, uint64_t elapsed) noexcept nogil:
    latency.bins[op][bin_of(elapsed)] += 1

cdef object latency_bins(const Latency *latency)
# {operation: {bin: count}} of those that happened; plain, so that queues can be summed.
