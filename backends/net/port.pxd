"""virtio-net's data path: a switch port on virtqueue pairs.

Queue pair i is virtqueues 2i (the guest receives) and 2i + 1 (the guest transmits).
"""
cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.runtime.pollable cimport Turn
from vhostpy.vswitch.port cimport Frame, Port
from vhostpy._ring cimport Chain, Scratch, Virtqueue
from vhostpy.backends.net.pair cimport Pair

cdef enum:
    PAIRS_MAX = 128        # 256 virtqueues


@cython.final
cdef class NetPort(Port):
    cdef Pair *pairs                 # pair_limit of them
    cdef list virtqueues             # keeps the Virtqueue objects alive that `pairs` borrows
    cdef readonly int pair_limit
    cdef int enabled_pairs           # pairs that receive
    cdef uint8_t route[PAIRS_MAX]    # their numbers
    cdef readonly int header_size    # 12, or 10 for a legacy guest without MRG_RXBUF
    cdef readonly bint mergeable
    cdef readonly uint64_t pause_ticks   # a sender that is silent for so long sees its buffers

    cdef int receiving_pair(self, int queue) noexcept nogil
    cdef int fill(self, Pair *pair, Frame **frames, int count, Turn *turn) noexcept nogil
    cdef int put_whole(self, Pair *pair, Frame **frames, int count, Turn *turn) noexcept nogil
    cdef int put(self, Pair *pair, Frame *frame, int wanted, Turn *turn) noexcept nogil
    cdef int collect(self, Pair *pair, uint64_t need, int wanted) noexcept nogil
    cdef void give_up(self, Pair *pair, int count) noexcept nogil
    cdef void count_fault(self, Pair *pair, Chain *chain) noexcept nogil
    cdef int nothing_more(self, Pair *pair, int count) noexcept nogil
    cdef int pop_more(self, Pair *pair, int wanted, int chains) noexcept nogil
    cdef int choose_receivers(self) except -1
    cdef int checked(self, index) except -1
