"""The ports of a switch, as workers see them: a table that does not change, and masks."""
from libc.stdint cimport uint64_t

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

cdef PortTable *new_table(dict attached, const PortTable *old) except NULL
# Of index -> Port; `old` hands on which ports were full.
