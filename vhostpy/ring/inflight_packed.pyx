"""Packed rings' chains in memory that outlives us.

A used descriptor may overwrite one that is still under way, so entries are copies of
descriptors, on a list of free ones and one list for each chain. Taking a chain and
publishing used ones are transactions: each changes what nobody looks at, then commits by
one store; what a kill leaves half done is undone, or done to its end where the driver has
seen it. `free_head` is what a transaction has come to, `old_free_head` what is committed,
and so with `used_idx`.

Source: vhost-user, "Inflight I/O tracking" ("For packed virtqueue"). The region is shared
with the front-end: recovery checks what it reads.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from vhostpy.ring.chain cimport DESCRIPTOR_SIZE
from vhostpy.system.hw cimport (
    read_once_u8, read_once_u16, read_once_u64, store_release_u16, store_release_u32,
    store_release_u64, write_once_u16, write_once_u64,
)
from vhostpy.ring.packed cimport INDEX, OWNER, available_flags, step
from vhostpy._spec cimport DescriptorFlag

from vhostpy.errors import ProtocolError

cdef enum:
    # QueueRegionPacked: uint16_t free_head, old_free_head, used_idx, old_used_idx;
    # uint8_t used_wrap_counter, old_used_wrap_counter; padding.
    FREE_HEADS = 12         # both, by one store of 4 bytes
    FREE_HEAD = 12
    OLD_FREE_HEAD = 14
    POSITIONS = 16          # all four, and padding, by one store of 8 bytes

    DESCRIPTOR_FLAGS = 14   # of pvirtq_desc

    # DescStatePacked
    INFLIGHT = 0            # one byte, and padding
    NEXT = 2                # the next of the list
    LAST = 4                # of a chain's first entry: its last entry, how many they are
    NUM = 6
    COUNTER = 8
    ID_FLAGS_LENGTH = 16    # uint16_t id, uint16_t flags, uint32_t len
    ADDR = 24


cdef inline uint8_t *entry_of(const Tracker *tracker, uint16_t entry) noexcept nogil:
    return tracker.region + PACKED_HEADER + PACKED_ENTRY * <uint32_t>entry


cdef inline uint64_t positions(uint16_t position, uint16_t old) noexcept nogil:
    return (position & INDEX | <uint64_t>(old & INDEX) << 16
            | <uint64_t>(position >> 15) << 32 | <uint64_t>(old >> 15) << 40)


cdef inline void commit_free_head(Tracker *tracker) noexcept nogil:
    store_release_u32(tracker.region + FREE_HEADS,
                      tracker.free_head | <uint32_t>tracker.free_head << 16)


cdef int packed_track_take(Tracker *tracker, const Ring *ring, uint16_t position,
                           Chain *chains, int count) noexcept nogil:
    cdef uint32_t index = position & INDEX
    cdef uint64_t rest
    cdef uint16_t at, head, last
    cdef uint8_t *entry
    cdef const uint8_t *where
    cdef int i
    for i in range(count):
        if chains[i].slots > tracker.free_count:
            return i
        head = at = last = tracker.free_head
        for _ in range(chains[i].slots):
            # Read once more: a driver that changes its descriptors meanwhile gets others
            # done in their place after a kill, checked as any are.
            where = ring.control.desc + DESCRIPTOR_SIZE * index
            rest = read_once_u64(where + 8)
            entry = entry_of(tracker, at)
            write_once_u64(entry + ADDR, read_once_u64(where))
            write_once_u64(entry + ID_FLAGS_LENGTH,
                           chains[i].id | rest >> 48 << 16 | rest << 32)
            last = at
            at = tracker.next[at]
            index += 1
            if index == ring.control.size:
                index = 0
        entry = entry_of(tracker, head)
        write_once_u64(entry + COUNTER, tracker.counter)
        write_once_u16(entry + LAST, last)
        write_once_u16(entry + NUM, chains[i].slots)
        store_release_u16(entry + INFLIGHT, 1)
        tracker.counter += 1
        tracker.last[head] = last
        tracker.free_head = at
        tracker.free_count -= chains[i].slots
        chains[i].entry = head
        # Until here the entries are on the free list, where no mark counts.
        commit_free_head(tracker)
    return count


cdef void packed_track_again(Tracker *tracker, const Ring *ring, uint16_t position,
                             Chain *chains, int count) noexcept nogil:
    cdef int i
    for i in range(count):
        chains[i].entry = tracker.again_entries[position & INDEX]
        position = step(position, chains[i].slots, ring.control.size)


cdef void release_chain(Tracker *tracker, uint16_t head) noexcept nogil:
    """Its entries come before the free ones; that is not yet committed."""
    cdef uint16_t last = tracker.last[head]
    tracker.next[last] = tracker.free_head
    write_once_u16(entry_of(tracker, last) + NEXT, tracker.free_head)
    tracker.free_head = head


cdef inline void unmark(Tracker *tracker, uint16_t head) noexcept nogil:
    store_release_u16(entry_of(tracker, head) + INFLIGHT, 0)


cdef void packed_track_rewind(Tracker *tracker, const Chain *chains, int count) noexcept nogil:
    cdef int i
    for i in range(count - 1, -1, -1):
        release_chain(tracker, chains[i].entry)
        tracker.free_count += chains[i].slots
    commit_free_head(tracker)
    for i in range(count):
        unmark(tracker, chains[i].entry)


cdef void packed_track_publishing(Tracker *tracker, const Ring *ring) noexcept nogil:
    cdef uint32_t i
    for i in range(tracker.pushed):
        release_chain(tracker, tracker.batch[i])
    store_release_u16(tracker.region + FREE_HEAD, tracker.free_head)
    # From here on recovery asks the ring whether the driver has seen it.
    store_release_u64(tracker.region + POSITIONS,
                      positions(ring.worker.used_next, ring.worker.used_idx))


cdef void packed_track_published(Tracker *tracker, const Ring *ring) noexcept nogil:
    cdef uint32_t i
    for i in range(tracker.pushed):
        unmark(tracker, tracker.batch[i])
    tracker.free_count += tracker.pushed_slots
    tracker.pushed = tracker.pushed_slots = 0
    store_release_u16(tracker.region + OLD_FREE_HEAD, tracker.free_head)
    store_release_u64(tracker.region + POSITIONS,
                      positions(ring.worker.used_idx, ring.worker.used_idx))


# --- Control's ------------------------------------------------------------------------

cdef void packed_track_begin(Tracker *tracker, const Ring *ring) noexcept:
    cdef uint32_t i
    for i in range(tracker.size):
        tracker.next[i] = <uint16_t>(i + 1)
        # Unmarked, and with the next one as its next.
        write_once_u64(entry_of(tracker, <uint16_t>i), <uint64_t>(i + 1) << 8 * NEXT)
    tracker.free_head = 0
    tracker.free_count = tracker.size
    commit_free_head(tracker)
    write_once_u64(tracker.region + POSITIONS,
                   positions(ring.worker.used_idx, ring.worker.used_idx))


cdef bint settle(Tracker *tracker, Ring *ring) except -1:
    """Commits or undoes a publish under way. Where the committed one stands is where
    the ring's used descriptors go on."""
    cdef uint64_t both = read_once_u64(tracker.region + POSITIONS)
    cdef uint16_t free_head = read_once_u16(tracker.region + FREE_HEAD)
    cdef uint16_t old_free_head = read_once_u16(tracker.region + OLD_FREE_HEAD)
    cdef uint16_t index = <uint16_t>both, old_index = <uint16_t>(both >> 16)
    cdef uint8_t wrap = <uint8_t>(both >> 32), old_wrap = <uint8_t>(both >> 40)
    cdef uint16_t position = index | <uint16_t>(wrap << 15)
    cdef uint16_t old = old_index | <uint16_t>(old_wrap << 15)
    cdef uint16_t flags
    if max(index, old_index) >= ring.control.size or wrap > 1 or old_wrap > 1:
        raise ProtocolError(f"inflight: used descriptors at {index} and {old_index} (wraps {wrap} "
                            f"and {old_wrap}) of a ring of {ring.control.size}")
    if position != old:
        flags = read_once_u64(ring.control.desc + DESCRIPTOR_SIZE * old_index + 8) >> 48
        if flags & OWNER != available_flags(old):
            old, old_free_head = position, free_head
    tracker.free_head = old_free_head
    commit_free_head(tracker)
    store_release_u64(tracker.region + POSITIONS, positions(old, old))
    ring.worker.used_next = ring.worker.used_idx = old
    return True


cdef list packed_recover(Tracker *tracker, Ring *ring):
    cdef uint8_t *seen = <uint8_t *>calloc(tracker.size, 1)
    if seen == NULL:
        raise MemoryError
    try:
        settle(tracker, ring)
        chains = find_chains(tracker, ring, seen)
    finally:
        free(seen)
    hide_unpublished(ring)
    return chains


cdef list find_chains(Tracker *tracker, Ring *ring, uint8_t *seen):
    """Each entry is free or part of one chain, or the region lies."""
    cdef uint32_t size = tracker.size, count = 0, i
    cdef uint16_t at = tracker.free_head, head
    tracker.free_count = 0
    while at < size and not seen[at]:
        seen[at] = 1
        unmark(tracker, at)
        tracker.next[at] = read_once_u16(entry_of(tracker, at) + NEXT)
        tracker.free_count += 1
        at = tracker.next[at]
    found = []
    for i in range(size):
        if not seen[i] and read_once_u8(entry_of(tracker, <uint16_t>i) + INFLIGHT):
            found.append((read_once_u64(entry_of(tracker, <uint16_t>i) + COUNTER), i))
    found.sort()
    tracker.counter = (found[len(found) - 1][0] + 1) & 0xffffffffffffffff if found else 0
    chains = []
    for _, first in found:
        head = at = first
        entries = []
        for _ in range(read_once_u16(entry_of(tracker, head) + NUM)):
            if at >= size or seen[at]:
                raise ProtocolError(f"inflight: the chain of entry {head} meets entry {at}, which "
                                    "is not its own")
            seen[at] = 1
            entries.append(at)
            tracker.last[head] = at
            tracker.next[at] = read_once_u16(entry_of(tracker, at) + NEXT)
            at = tracker.next[at]
        if entries:
            chains.append(entries)
            count += <uint32_t>len(entries)
    if count > ring.control.size or count + tracker.free_count != size:
        raise ProtocolError(
            f"inflight: {count} descriptors under way and {tracker.free_count} free entries, "
            f"expected {size} together, and a ring has {ring.control.size}")
    # A used descriptor takes as many slots as its chain had, so what lies between is theirs.
    ring.worker.last_avail = step(ring.worker.used_idx, count, ring.control.size)
    return chains


cdef void hide_unpublished(Ring *ring) noexcept:
    """Used descriptors that a kill has left behind the first of a burst that the driver was
    not yet to see: with the next one published it would take them for used."""
    cdef uint16_t position = ring.worker.used_idx
    cdef uint8_t *flags_at
    while position != ring.worker.last_avail:
        flags_at = ring.control.desc + DESCRIPTOR_SIZE * (position & INDEX) + DESCRIPTOR_FLAGS
        if read_once_u16(flags_at) & OWNER != available_flags(position):
            write_once_u16(flags_at, available_flags(position))
        position = step(position, 1, ring.control.size)


cdef void packed_put_again(Tracker *tracker, uint16_t slot, uint16_t entry, bint more) noexcept:
    cdef uint64_t rest = read_once_u64(entry_of(tracker, entry) + ID_FLAGS_LENGTH)
    cdef uint16_t flags = <uint16_t>(rest >> 16) & (
        DescriptorFlag.DESC_WRITE | DescriptorFlag.DESC_INDIRECT)
    if more:
        flags |= DescriptorFlag.DESC_NEXT
    # Available in a ring's first round.
    flags |= DescriptorFlag.DESC_AVAIL
    write_once_u64(tracker.again + DESCRIPTOR_SIZE * slot,
                   read_once_u64(entry_of(tracker, entry) + ADDR))
    write_once_u64(tracker.again + DESCRIPTOR_SIZE * slot + 8,
                   rest >> 32 | (rest & 0xffff) << 32 | <uint64_t>flags << 48)
