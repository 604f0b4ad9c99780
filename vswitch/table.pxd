"""The ports of a switch, as workers see them: a table that does not change."""
cimport cython
from libc.stdint cimport uint64_t
from vhostpy.runtime.pool cimport Workers

cdef struct Place:
    void *port             # borrowed Port; `Switch.attached` keeps it alive; NULL: a hole
    uint64_t full_since    # ticks() since when it has taken nothing; 0: it takes. A hint:
    #                        all workers write it, and a lost write costs one short wait

cdef struct PortTable:
    # Its ports do not change once it is published; freed after every worker has passed
    # a quiescent point.
    int count              # indexes 0..count-1
    int attached           # that are no holes
    Place places[1]


@cython.final
cdef class Ports:
    # The table that is published; control changes it.
    cdef PortTable *table
    cdef readonly Workers workers
    cdef int publish(self, dict attached) except -1
    # Shows workers these ports, by index; returns when no worker sees others.
