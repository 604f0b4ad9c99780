"""The ports of a switch, as workers see them: a table that does not change."""
cimport cython
from libc.stdint cimport uint64_t
from vhostpy.runtime.pool cimport Workers
from vhostpy.vswitch.masks cimport lowest_bit

cdef struct Place:
    void *port             # borrowed Port; `Switch.attached` keeps it alive; NULL: a hole
    uint64_t full_since    # ticks() since when it has taken nothing; 0: it takes. A hint:
    #                        all workers write it, and a lost write costs one short wait

cdef struct PortTable:
    # Its ports do not change once it is published; freed after every worker has passed
    # a quiescent point.
    int count              # indexes 0..count-1
    int attached           # that are no holes
    uint64_t *everyone     # a set of them: bit i % 64 of word i / 64 is place i. No holes
    Place places[1]


cdef inline int next_member(const PortTable *table, const uint64_t *members,
                            int place) noexcept nogil:
    """The first place of that set from `place` on; `table.count`: no more."""
    cdef uint64_t word
    while place < table.count:
        word = members[place >> 6] >> (place & 63)
        if word:
            return place + lowest_bit(word)
        place = (place | 63) + 1
    return table.count


@cython.final
cdef class Ports:
    # The table that is published; control changes it.
    cdef PortTable *table
    cdef readonly Workers workers
    cdef int publish(self, dict attached) except -1
    # Shows workers these ports, by index; returns when no worker sees others.
