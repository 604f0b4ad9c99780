"""Masks of a burst: bit i speaks of frame i."""
from libc.stdint cimport uint64_t

cdef extern from *:
    int lowest_bit "__builtin_ctzll" (uint64_t) nogil
    int leading_zeros "__builtin_clzll" (uint64_t) nogil
    int bits_of "__builtin_popcountll" (uint64_t) nogil


cdef inline uint64_t bits_below(int count) noexcept nogil:
    return ~<uint64_t>0 if count >= 64 else (<uint64_t>1 << count) - 1


cdef inline uint64_t shifted(uint64_t mask, int count) noexcept nogil:
    return 0 if count >= 64 else mask >> count
