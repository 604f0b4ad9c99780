"""virtio-blk's data path: requests of one virtqueue, to a storage and back."""
cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy._ring cimport Chain, Virtqueue
from vhostpy.memory.guest cimport Segment
from vhostpy.runtime.pool cimport Pollable, Turn, Workers
from vhostpy.backends.blk.request cimport Slot
from vhostpy.backends.blk.counters cimport BlkCounters
from vhostpy.backends.blk.latency cimport Latency
from vhostpy.runtime.limits cimport Limits
from vhostpy.backends.storage.storage cimport Channel, Request, Storage

cdef enum:
    SERIAL_BYTES = 20


@cython.final
cdef class DiskQueue(Pollable):
    # One virtqueue of one disk.
    cdef readonly Virtqueue virtqueue
    cdef readonly Storage storage
    cdef readonly Channel channel
    cdef Workers workers
    cdef Limits limits
    cdef readonly int timer_fd      # wakes the worker when the limits allow; -1: none
    # Control's orders.
    cdef uint32_t draining
    cdef uint32_t abandoned
    cdef uint32_t write_through
    cdef bint read_only
    cdef uint8_t serial[SERIAL_BYTES]
    # The worker's.
    cdef Slot *slots
    cdef uint16_t *free_slots
    cdef uint32_t slot_count
    cdef uint32_t free_count
    cdef Request *first             # not yet taken by the storage
    cdef Request **last
    cdef int64_t started            # requests that entered `memory` in this poll
    cdef BlkCounters counts
    cdef Latency *latency
    cdef uint64_t now               # ticks() of the last completion
    cdef bint told_broken
    cdef uint32_t first_fault       # ChainFault of the first chain that was answered for it
    cdef int32_t first_error        # negative errno of the first I/O error
    cdef int32_t first_error_op
    cdef uint64_t first_error_offset
    # Control's.
    cdef list kept                  # generations that abandoned requests still use

    cdef int take_limited(self, Turn *turn) noexcept nogil
    cdef bint sleeps_for_limits(self) noexcept nogil
    cdef int take(self, Turn *turn) noexcept nogil
    cdef bint begin(self, Chain *chain, Turn *turn) noexcept nogil
    cdef bint fail(self, const Chain *chain) noexcept nogil
    cdef uint8_t begin_transfer(self, Slot *slot, Segment *data, int count, uint64_t size,
                                uint64_t sector, int op) noexcept nogil
    cdef uint8_t begin_clear(self, Slot *slot, Segment *data, int count, uint64_t size,
                             int op) noexcept nogil
    cdef uint32_t get_id(self, const Segment *data, int count) noexcept nogil
    cdef void enqueue(self, Slot *slot, Request *request) noexcept nogil
    cdef int submit(self) noexcept nogil
    cdef int complete(self) noexcept nogil
    cdef void finish(self, Slot *slot) noexcept nogil
    cdef void note_error(self, Slot *slot, Request *request) noexcept nogil
    cdef void log_slot(self, Slot *slot) noexcept nogil
    cdef void answer(self, const Chain *chain, uint8_t *status, uint64_t gpa, uint8_t value,
                     uint32_t written) noexcept nogil
    cdef void release(self, Slot *slot) noexcept nogil
    cdef int reap(self) noexcept nogil
