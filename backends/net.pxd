"""virtio-net's data path: a switch port on virtqueue pairs.

Queue pair i is virtqueues 2i (the guest receives) and 2i + 1 (the guest transmits).
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy._port cimport Frame, Port, QueueCounters
from vhostpy._ring cimport Scratch, Virtqueue

cdef enum:
    PAIRS_MAX = 128        # 256 virtqueues

cdef struct Pair           # private to net.pyx

cdef class NetPort(Port):
    cdef Pair *pairs                 # PAIRS_MAX of them
    cdef list virtqueues             # keeps the Virtqueue objects alive that `pairs` borrows
    cdef readonly int pair_limit
    cdef int enabled_pairs
    cdef int header_size             # 12, or 10 for a legacy guest without MRG_RXBUF
    cdef bint mergeable
    cdef bint shared                 # several workers can reach a receive queue: lock it
