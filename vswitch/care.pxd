"""Care with slow memory: a forwarder whose poll was blocked finds out whose memory it was.

The sender's own or a receiver's may have been the cause. So for a while frames are copied
out of the sender's first, and times are taken in between.
"""
from libc.stdint cimport uint8_t, uint64_t
from vhostpy.runtime.pollable cimport Conduct, Turn
from vhostpy.vswitch.port cimport Frame, Port

cdef enum:
    CAREFUL_BURST = 8      # frames of one poll that copies them first

cdef struct Care:
    uint64_t until         # ticks(); 0: there is none
    uint8_t *copies        # room for a burst of them
    bint on                # in this poll
    uint64_t step_at       # when the last step ended
    uint64_t slowest       # the longest step of this poll
    void *slowest_port     # borrowed Port, whose memory it was; NULL: the sender's

cdef bint care_begin(Care *care, Turn *turn) noexcept nogil
# Whether this poll copies frames first.
cdef void care_copy(Care *care, Frame *burst, int count) noexcept nogil
# No receiver's lock is held while the sender's memory makes us wait.
cdef void care_step(Care *care, void *port) noexcept nogil
# A step has ended, in which that port's memory was written to; NULL: the sender's was read.
cdef bint care_passes_over(Care *care, Port port, uint64_t now) noexcept nogil
# Whether a slow port gets nothing; when its time is over, it is first a careful one's.
cdef bint care_stalled(Care *care, Conduct sender, uint64_t since, uint64_t end) noexcept nogil
# The poll was blocked for that time. True: by the sender's own memory, again.
