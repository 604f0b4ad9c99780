"""A histogram of times in ticks: 32 steps in each power of two, so within 3 % of the truth."""
from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil

cdef enum:
    STEP_BITS = 5
    BINS = 2048            # 2**64 ticks need (64 - STEP_BITS + 1) << STEP_BITS = 1920

cdef inline uint32_t bin_of(uint64_t value) noexcept nogil:
    cdef int exponent
    if value < 1 << STEP_BITS:
        return <uint32_t>value
    exponent = 63 - __builtin_clzll(value) - STEP_BITS
    return <uint32_t>(((exponent + 1) << STEP_BITS)
                      + ((value >> exponent) & ((1 << STEP_BITS) - 1)))


cdef inline uint64_t value_of(uint32_t index) noexcept nogil:
    # The middle of the bin.
    cdef uint32_t exponent = index >> STEP_BITS
    cdef uint64_t low
    if exponent == 0:
        return index
    low = <uint64_t>((1 << STEP_BITS) + (index & ((1 << STEP_BITS) - 1))) << (exponent - 1)
    return low + ((<uint64_t>1 << (exponent - 1)) >> 1)
