"""How much a disk may do in a time: requests, and bytes that are read and written.

A limit is a clock: each request moves it forward by its share of a second. While it is not
ahead of the true time, requests pass; else they wait. What it may stay behind is the burst
that an idle disk saves up. Whoever takes more than is there (a request may be large, and
several workers may look at once) leaves a debt that the next ones wait for: so the rate
over time is exact, though nothing is divided, and only a burst touches what is shared.
"""
from libc.stdint cimport int64_t, uint32_t
from vhostpy.runtime.pool cimport Turn

cdef struct Limit:
    int64_t clock           # ticks; the workers of all queues move it
    double cost             # ticks of one unit (a request, a byte); 0: no limit
    double rate             # units a tick
    int64_t burst           # ticks that the clock may be behind

cdef class Limits:
    # Of one disk, shared by its queues.
    cdef Limit requests
    cdef Limit bytes
    cdef uint32_t on            # some limit is set
    cdef double ticks_per_s
    cdef readonly object settings

    cdef bint clip(self, Turn *turn) noexcept nogil
    # Lessens the turn's budget to what may pass now; False: nothing may.
    cdef void charge(self, int64_t requests, int64_t bytes) noexcept nogil
    # They passed.
    cdef int64_t wait_ns(self, int64_t now) noexcept nogil
    # Until something may pass; 0: now.
