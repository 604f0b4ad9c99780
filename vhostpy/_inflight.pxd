"""Which chains a back-end has, in memory that outlives it: for whoever comes after a kill.

Source: vhost-user, "Inflight I/O tracking". The front-end keeps that memory and hands it
over again; it is shared, so what is read from it is checked.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy._hw cimport store_release_u16, write_once_u16, write_once_u64
from vhostpy.memory cimport Mapping

cdef enum:
    # "Split virtqueue": struct QueueRegionSplit, DescStateSplit.
    REGION_VERSION = 8
    REGION_DESC_NUM = 10
    REGION_BATCH_HEAD = 12
    REGION_USED_IDX = 14
    REGION_DESC = 16
    DESC_BYTES = 16
    DESC_INFLIGHT = 0       # one byte, and padding
    DESC_NEXT = 6
    DESC_COUNTER = 8

cdef struct Tracker:
    # The worker's while its ring is live.
    uint8_t *region
    uint64_t counter        # of the next chain: "used to preserve the order"
    uint32_t size           # chains that `region` can remember
    uint32_t pushed         # since the last publish
    uint16_t *batch         # their ids
    uint16_t batch_head     # the last of them
    # Chains to be taken again: an avail ring of our own, before the driver's.
    uint8_t *again
    uint16_t again_next
    uint16_t again_end
    bint again_last         # the last burst came from there


cdef inline void track_take(Tracker *tracker, uint16_t id) noexcept nogil:
    """Before any work on the chain is done."""
    cdef uint8_t *state = tracker.region + REGION_DESC + DESC_BYTES * id
    if id < tracker.size:
        write_once_u64(state + DESC_COUNTER, tracker.counter)
        tracker.counter += 1
        store_release_u16(state + DESC_INFLIGHT, 1)


cdef inline void track_rewind(Tracker *tracker, uint16_t id) noexcept nogil:
    if id < tracker.size:
        store_release_u16(tracker.region + REGION_DESC + DESC_BYTES * id + DESC_INFLIGHT, 0)


cdef inline void track_push(Tracker *tracker, uint16_t id) noexcept nogil:
    """Before used.idx moves: who comes after us finds the chains that it covers."""
    if id < tracker.size and tracker.pushed < tracker.size:
        write_once_u16(tracker.region + REGION_DESC + DESC_BYTES * id + DESC_NEXT,
                       tracker.batch_head)
        tracker.batch_head = id
        tracker.batch[tracker.pushed] = id
        tracker.pushed += 1
        write_once_u16(tracker.region + REGION_BATCH_HEAD, id)


cdef inline void track_publish(Tracker *tracker, uint16_t used_idx) noexcept nogil:
    """After used.idx has moved: the chains are the driver's."""
    cdef uint32_t i
    for i in range(tracker.pushed):
        store_release_u16(
            tracker.region + REGION_DESC + DESC_BYTES * tracker.batch[i] + DESC_INFLIGHT, 0)
    tracker.pushed = 0
    store_release_u16(tracker.region + REGION_USED_IDX, used_idx)


cdef class InflightQueue:
    # One queue's region.
    cdef Tracker tracker
    cdef readonly Mapping mapping
    cdef readonly list taken_before     # ids that recover() found, oldest first
    cdef recover(self, uint16_t used_idx)
    # Finishes what a killed back-end had begun; its chains come again, by `again`.
