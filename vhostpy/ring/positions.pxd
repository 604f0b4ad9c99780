"""Where packed rings stand, in a file of ours, for whoever comes after us."""
from libc.stdint cimport uint32_t, uint64_t

cdef struct Entry:
    # One cache line each: rings of several workers share none.
    uint32_t valid      # stored last, and cleared first: a kill finds all of it or nothing
    uint32_t pair       # the last publish: from this position (bits 16-31) to that one
    uint64_t device     # of the file that the ring's memory is in
    uint64_t inode
    uint64_t gpa        # of the descriptor ring
    uint32_t size
    uint32_t owner
    uint64_t age        # of the ring's start
    uint64_t padding[2]

cdef class KeptPosition:
    # What one ring that runs has in the file.
    cdef Entry *entry
    cdef object table       # which it is in
    cdef readonly object found
