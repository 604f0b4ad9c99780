"""What calls to the drivers behind one socket cost us: dear ones are left out."""
from libc.stdint cimport int32_t, uint16_t, uint64_t

cdef enum:
    DEAR_CALLS = 4          # no more than so many, until they have been forgotten

cdef struct CallCosts:
    # Written by whoever calls: what one of them loses by another does not matter.
    uint64_t dear_ticks     # a call is dear that takes longer
    uint64_t dear_ns
    uint64_t until          # ticks(): till then none is made, or each is measured
    uint64_t span           # how long that is; 0: no call was dear lately
    int32_t dear            # calls that were
    int32_t padding
    uint64_t last_ns        # what the last of them took
    uint64_t left_out
    uint64_t stops          # times that it was decided to make none

cdef struct Call:
    # One that is under way.
    uint64_t since
    uint64_t cpu_ns
    bint measured

cdef bint begin_call(CallCosts *costs, Call *call) noexcept nogil
# False: it is to be left out.
cdef bint end_call(CallCosts *costs, const Call *call, uint16_t *dear,
                   bint arrived) noexcept nogil
# `dear` counts what was dear of this fd, one after the other. `arrived`: the other end has
# been woken. True: for some time no more calls are to be made; control should know.

cdef class Calls:
    # Of one socket: outlives rings, sessions and call fds.
    cdef CallCosts costs
    cdef double rate
    cdef uint64_t said      # control's: of costs.stops
