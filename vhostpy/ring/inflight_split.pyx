"""Split rings' chains in memory that outlives us.

Order of stores: a chain is marked, with its number, before it is worked on; chains given
back are linked before used.idx moves, and unmarked behind it. So a kill between any two
stores leaves either a chain that is marked and will be done again, or one that the driver
has. Marks come in the avail ring's order and go, where chains are put back, from its end:
the count of them says where the ring goes on.

Source: vhost-user, "Inflight I/O tracking" ("For split virtqueue"). The region is shared
with the front-end: recovery checks what it reads.
"""
from libc.stdint cimport uint8_t, uint32_t

from vhostpy.system.hw cimport (
    read_once_u8, read_once_u16, read_once_u64, store_release_u16, write_once_u16,
    write_once_u64,
)
from vhostpy.ring.tracker cimport track_push

from vhostpy.errors import ProtocolError

cdef enum:
    BATCH_HEAD = 12         # QueueRegionSplit
    USED_IDX = 14

    INFLIGHT = 0            # DescStateSplit: one byte, and padding
    NEXT = 6
    COUNTER = 8


cdef inline uint8_t *entry_of(const Tracker *tracker, uint16_t id) noexcept nogil:
    return tracker.region + SPLIT_HEADER + SPLIT_ENTRY * <uint32_t>id


cdef void split_track_take(Tracker *tracker, const Chain *chains, int count) noexcept nogil:
    cdef uint8_t *entry
    cdef int i
    for i in range(count):
        # pop() has checked it: an id is below the ring's size, and that not above ours.
        entry = entry_of(tracker, chains[i].id)
        write_once_u64(entry + COUNTER, tracker.counter)
        tracker.counter += 1
        store_release_u16(entry + INFLIGHT, 1)


cdef void split_track_rewind(Tracker *tracker, const Chain *chains, int count) noexcept nogil:
    cdef int i
    # The youngest first: what recovery counts as taken must have no gap.
    for i in range(count - 1, -1, -1):
        store_release_u16(entry_of(tracker, chains[i].id) + INFLIGHT, 0)


cdef void split_track_push(Tracker *tracker, const Chain *chains, int count) noexcept nogil:
    cdef int i
    for i in range(count):
        write_once_u16(entry_of(tracker, chains[i].id) + NEXT, tracker.batch_head)
        tracker.batch_head = chains[i].id
        write_once_u16(tracker.region + BATCH_HEAD, chains[i].id)
        track_push(tracker, chains[i].id, 1)


cdef void split_track_published(Tracker *tracker, uint16_t used_idx) noexcept nogil:
    cdef uint32_t i
    for i in range(tracker.pushed):
        store_release_u16(entry_of(tracker, tracker.batch[i]) + INFLIGHT, 0)
    tracker.pushed = 0
    store_release_u16(tracker.region + USED_IDX, used_idx)


# --- Control's ------------------------------------------------------------------------

cdef void split_track_begin(Tracker *tracker, const Ring *ring) noexcept:
    cdef uint32_t i
    for i in range(tracker.size):
        store_release_u16(entry_of(tracker, <uint16_t>i) + INFLIGHT, 0)
    write_once_u16(tracker.region + USED_IDX, ring.worker.used_idx)


cdef list split_recover(Tracker *tracker, Ring *ring):
    cdef uint8_t *region = tracker.region
    cdef uint8_t *entry
    cdef uint16_t used_idx = ring.worker.used_idx
    cdef uint16_t head = read_once_u16(region + BATCH_HEAD)
    cdef uint16_t count = <uint16_t>(used_idx - read_once_u16(region + USED_IDX))
    cdef uint32_t i
    # Killed after used.idx had moved, before the chains were unmarked.
    for _ in range(min(<uint32_t>count, tracker.size)):
        if head >= tracker.size:
            break
        entry = entry_of(tracker, head)
        store_release_u16(entry + INFLIGHT, 0)
        head = read_once_u16(entry + NEXT)
    store_release_u16(region + USED_IDX, used_idx)
    found = []
    for i in range(tracker.size):
        entry = entry_of(tracker, <uint16_t>i)
        if read_once_u8(entry + INFLIGHT):
            if i >= ring.control.size:      # a lie, which must not be followed
                raise ProtocolError(f"inflight: chain {i} under way in a queue of "
                                    f"{ring.control.size}")
            found.append((read_once_u64(entry + COUNTER), i))
    found.sort()
    tracker.counter = (found[len(found) - 1][0] + 1) & 0xffffffffffffffff if found else 0
    # What the killed one had taken is what it had given back and what is marked, whatever
    # a front-end remembers of a ring that it could not ask any more.
    ring.worker.last_avail = ring.worker.avail_idx = <uint16_t>(used_idx + len(found))
    ring.worker.used_behind = 0
    return [id_ for _, id_ in found]
