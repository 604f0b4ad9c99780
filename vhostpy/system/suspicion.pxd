"""For how long whoever makes others wait is kept away. In a file of its own, for all to use."""
from libc.stdint cimport uint64_t

cdef inline uint64_t longer(uint64_t span, uint64_t stall) noexcept nogil:
    """For how long whoever caused a stall is kept away, after `span` the last time: so that
    it costs others a hundredth of their time at first, and then less and less."""
    return min(max(span << 1, stall * 100), <uint64_t>1 << 41)
