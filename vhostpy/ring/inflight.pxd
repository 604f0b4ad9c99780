"""Which chains a back-end has, in memory that outlives it: for whoever comes after a kill."""
from libc.stdint cimport uint8_t, uint64_t
from vhostpy.ring.state cimport Ring
from vhostpy.ring.tracker cimport Tracker
from vhostpy.memory.guest cimport Mapping


cdef class InflightQueue:
    # One queue's region.
    cdef Tracker tracker
    cdef readonly Mapping mapping
    cdef uint64_t size_bytes
    cdef readonly list taken_before     # chains that start() found, oldest first: their entries
    cdef start(self, Ring *ring)
    # The ring's chains are remembered here from now on. Finishes what a killed back-end had
    # begun; its chains come again, by `again`, and the ring goes on behind them.

cdef void touch(const uint8_t *start, uint64_t size) noexcept nogil
# Has the pages there, now: before they are read with the GIL, which a page fault would hold.
