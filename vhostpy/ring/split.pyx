"""The split layout: descriptor table, avail ring, used ring; both ends.

Called once per burst by `Virtqueue` and `DriverVirtqueue`, whose contracts say what these
do. The other end is hostile: whatever lies in shared memory is read once, checked, and
only the copy is used. Source: virtio 1.3, "Split Virtqueues".
"""
from vhostpy.ring.state cimport (
    Returned, break_ring, call_driver, log_flush, next_in_order, release, take_back,
)
from vhostpy.ring.chain cimport (
    BURST, CHAIN_BAD_INDEX, CHAIN_TOO_LONG, DESCRIPTOR_SIZE, RING_BROKEN, STEPS_MAX, WALK_STOP,
    Descriptor, Walk, region_served_last, split_descriptor, take_plain, walk_begin, walk_end,
    walk_piece, walk_table,
)
from vhostpy.system.hw cimport (
    fence_full, load_acquire_u16, prefetch_read, prefetch_write, read_once_u16, read_once_u64,
    store_release_u16, unlikely, write_once_u16, write_once_u64,
)
from vhostpy._spec cimport DescriptorFlag, RingFlag
from vhostpy.memory.guest cimport Region, log_mark


cdef enum:
    # virtio 1.3, "Split Virtqueues": struct virtq_avail, virtq_used.
    RING_IDX = 2            # of avail and used alike: flags, idx, ring[], event
    RING_ENTRIES = 4
    AVAIL_ENTRY = 2
    USED_ENTRY = 8

    # Entries in a cache line.
    AVAIL_LINE = 32
    USED_LINE = 8


cdef inline bint passed_event(uint16_t event, uint16_t new, uint16_t old) noexcept nogil:
    # Did the index, on its way from `old` to `new`, write entry `event`?
    return <uint16_t>(new - event - 1) < <uint16_t>(new - old)


# ---------------------------------------------------------------------------------------
# The back-end's end

cdef int split_walk(Ring *ring, Walk *walk, Chain *chain, Descriptor descriptor) noexcept nogil:
    """Follows a chain of any shape from its first descriptor, which has been read.

    Returns 0, a ChainFault or WALK_STOP.
    """
    cdef uint32_t size = ring.control.size
    cdef uint32_t i
    cdef int result
    cdef const uint8_t *where
    for i in range(size):
        walk.steps += 1
        chain.slots = <uint16_t>(i + 1)
        if descriptor.flags & DescriptorFlag.DESC_INDIRECT:
            return walk_table(walk, descriptor, linked=True)
        result = walk_piece(walk, descriptor)
        if result or not descriptor.flags & DescriptorFlag.DESC_NEXT:
            return result
        if descriptor.next >= size:
            return CHAIN_BAD_INDEX
        where = ring.control.desc + DESCRIPTOR_SIZE * descriptor.next
        descriptor = split_descriptor(read_once_u64(where), read_once_u64(where + 8))
    return CHAIN_TOO_LONG


cdef inline void split_log_used(Ring *ring, uint32_t offset, uint32_t length) noexcept nogil:
    log_mark(ring.control.log, ring.used_log_gpa + offset, length)


cdef void split_set_used_flags(Ring *ring, uint16_t flags) noexcept nogil:
    write_once_u16(ring.control.used, flags)
    if unlikely(ring.control.log_used):
        fence_full()
        split_log_used(ring, 0, 2)


cdef void split_disarm(Ring *ring) noexcept nogil:
    # With EVENT_IDX the old avail_event stays: the driver has passed it, and comes by
    # again only after 65,536 chains.
    if ring.worker.kicks_wanted:
        ring.worker.kicks_wanted = 0
        if not ring.control.event_idx:
            split_set_used_flags(ring, RingFlag.USED_NO_NOTIFY)


cdef bint split_arm(Ring *ring) noexcept nogil:
    cdef uint32_t event = RING_ENTRIES + USED_ENTRY * ring.control.size
    if ring.worker.broken:
        return False
    ring.worker.kicks_wanted = 1
    if ring.control.event_idx:
        write_once_u16(ring.control.used + event, ring.worker.last_avail)
    else:
        write_once_u16(ring.control.used, 0)
    # Pairs with the driver's fence between storing avail.idx and reading what we wrote.
    fence_full()
    if unlikely(ring.control.log_used):
        split_log_used(ring, event if ring.control.event_idx else 0, 2)
    return load_acquire_u16(ring.control.avail + RING_IDX) != ring.worker.last_avail


cdef int split_look(Ring *ring) noexcept nogil:
    """Loads avail.idx: the count of chains that wait, or RING_BROKEN."""
    # Pairs with the driver's release store of avail.idx.
    cdef uint16_t index = load_acquire_u16(ring.control.avail + RING_IDX)
    cdef uint16_t ready = <uint16_t>(index - ring.worker.last_avail)
    cdef uint32_t out
    if ready == 0:
        return 0
    # Chains, each of which takes a descriptor or more: those that were taken and that the
    # driver has not seen come back are none that it can offer.
    out = <uint16_t>(ring.worker.last_avail - ring.worker.used_idx - ring.worker.used_behind)
    if unlikely(out + ready > ring.control.size):
        break_ring(ring)
        return RING_BROKEN
    ring.worker.avail_idx = index
    # Whoever takes chains without having been woken needs no kicks: a receive queue is
    # never armed, and a system call a refill is what its driver would pay.
    split_disarm(ring)
    return ready


cdef int split_pop(Ring *ring, Chain *chains, int limit, Scratch *scratch) noexcept nogil:
    cdef const uint8_t *desc = ring.control.desc
    cdef const uint8_t *entries = ring.control.avail + RING_ENTRIES
    cdef uint32_t size = ring.control.size
    cdef uint32_t mask = size - 1
    cdef uint32_t last = ring.worker.last_avail
    cdef Segment *segment = scratch.segments + scratch.used
    cdef Segment *end = scratch.segments + scratch.limit
    cdef uint32_t lead = ring.control.lead
    cdef Region region
    cdef int ready = <uint16_t>(ring.worker.avail_idx - ring.worker.last_avail)
    cdef int i, got
    cdef uint16_t heads[BURST]
    cdef uint16_t head
    cdef uint64_t gpa, rest
    cdef const uint8_t *where
    cdef Walk walk
    if unlikely(ring.worker.broken):
        return RING_BROKEN
    if ready == 0:
        ready = split_look(ring)
        if ready <= 0:
            return ready
    ready = min(ready, limit)
    # All of the burst's descriptors are under way before the first is used: 4-5 cycles a
    # packet at 64 B, and as many again against a window of 16 where ids are not in order.
    for i in range(ready):
        heads[i] = read_once_u16(entries + AVAIL_ENTRY * (last + i & mask))
        prefetch_read(desc + DESCRIPTOR_SIZE * (heads[i] & mask))
    walk.steps = 0
    i = 0
    while True:
        # No call in this loop: all that it needs stays in registers.
        region = region_served_last(ring)
        while i < ready:
            head = heads[i]
            if unlikely(head >= size):
                break
            # Masked against speculation: the check above decides too late for that.
            where = desc + DESCRIPTOR_SIZE * (head & mask)
            gpa = read_once_u64(where)
            rest = read_once_u64(where + 8)
            if unlikely(rest >> 32 & (DescriptorFlag.DESC_NEXT | DescriptorFlag.DESC_INDIRECT)
                        or segment == end
                        or not take_plain(&chains[i], segment, &region, gpa, <uint32_t>rest, head,
                                          rest >> 32 & DescriptorFlag.DESC_WRITE, lead)):
                break
            segment += 1
            i += 1
        if i >= ready:
            break
        if unlikely(head >= size):
            break_ring(ring)             # nothing that could be given back
            break
        walk_begin(&walk, ring, &chains[i], head, segment, scratch)
        got = walk_end(&walk, split_walk(ring, &walk, &chains[i], split_descriptor(gpa, rest)),
                       &chains[i])
        if got == WALK_STOP:
            break
        segment += got
        i += 1
        if walk.steps >= STEPS_MAX:
            break
    ring.worker.last_avail = <uint16_t>(last + i)
    scratch.steps += walk.steps
    scratch.used = <uint32_t>(segment - scratch.segments)
    if unlikely(ring.worker.broken) and i == 0:
        return RING_BROKEN
    return i


cdef inline void split_put_used(uint8_t *where, uint64_t entry) noexcept nogil:
    # Entries are 8 bytes at 4 modulo 8, one store each: the driver looks only after
    # used.idx has moved. Compared first, since a line that did not change stays in the
    # driver's cache (2-6 cycles a packet, up to 42 where it rewrites headers).
    if read_once_u64(where) != entry:
        write_once_u64(where, entry)


cdef void split_push(Ring *ring, const Chain *chains, const uint32_t *written,
                     int count) noexcept nogil:
    cdef uint8_t *entries = ring.control.used + RING_ENTRIES
    cdef uint32_t mask = ring.control.size - 1
    cdef uint32_t at = ring.worker.used_next
    cdef int i
    if ring.control.in_order and written == NULL and count > 0:
        # One entry tells of all: virtio 1.3, "In-order use of descriptors".
        write_once_u64(entries + USED_ENTRY * (at & mask), chains[count - 1].id)
        ring.worker.used_next = <uint16_t>(at + count)
        return
    if written == NULL:
        for i in range(count):
            split_put_used(entries + USED_ENTRY * (at + i & mask), chains[i].id)
    else:
        for i in range(count):
            split_put_used(entries + USED_ENTRY * (at + i & mask),
                           chains[i].id | <uint64_t>written[i] << 32)
    ring.worker.used_next = <uint16_t>(at + count)


cdef void split_log_entries(Ring *ring, uint16_t first, uint16_t count) noexcept nogil:
    cdef uint32_t size = ring.control.size
    cdef uint32_t start = first & (size - 1)
    cdef uint32_t head = min(<uint32_t>count, size - start)
    split_log_used(ring, RING_IDX, 2)
    split_log_used(ring, RING_ENTRIES + USED_ENTRY * start, USED_ENTRY * head)
    if count > head:
        split_log_used(ring, RING_ENTRIES, USED_ENTRY * (min(<uint32_t>count, size) - head))


cdef bint split_wants_call(Ring *ring) noexcept nogil:
    cdef uint16_t new = ring.worker.used_idx
    cdef uint16_t old = ring.worker.signalled
    cdef bint valid = ring.worker.signalled_valid
    if not ring.control.event_idx:
        return not read_once_u16(ring.control.avail) & RingFlag.AVAIL_NO_INTERRUPT
    ring.worker.signalled = new
    ring.worker.signalled_valid = 1
    return not valid or passed_event(
        read_once_u16(ring.control.avail + RING_ENTRIES + AVAIL_ENTRY * ring.control.size),
        new, old)


cdef void split_publish(Ring *ring) noexcept nogil:
    cdef uint16_t old = ring.worker.used_idx
    cdef uint16_t new = ring.worker.used_next
    if old == new:
        return
    if unlikely(ring.control.log != NULL):
        log_flush(ring)
    # Pairs with the driver's acquire load of used.idx.
    store_release_u16(ring.control.used + RING_IDX, new)
    ring.worker.used_idx = new
    # Pairs with the driver's fence between storing used_event or avail.flags and its
    # last look at used.idx; and orders the log's bits behind what they speak of.
    fence_full()
    if unlikely(ring.control.log_used):
        split_log_entries(ring, old, <uint16_t>(new - old))
    if split_wants_call(ring):
        call_driver(ring)


# ---------------------------------------------------------------------------------------
# The driver's end

cdef inline void store_descriptor(uint8_t *where, uint64_t gpa, uint32_t length,
                                  uint16_t flags, uint16_t next) noexcept nogil:
    write_once_u64(where, gpa)
    write_once_u64(where + 8, length | <uint64_t>flags << 32 | <uint64_t>next << 48)


cdef inline void split_offer(DriverRing *ring, uint16_t head, uint16_t next,
                             int count) noexcept nogil:
    # Makes a chain of `count` free descriptors, from `head` to before `next`, an avail entry.
    ring.free_head = next
    ring.counts[head] = count
    ring.free_count -= count
    write_once_u16(ring.avail + RING_ENTRIES + AVAIL_ENTRY * (ring.avail_next & (ring.size - 1)),
                   head)
    ring.avail_next += 1


cdef int split_add(DriverRing *ring, const Segment *pieces, int readable,
                   int writable) noexcept nogil:
    cdef int count = readable + writable, i
    cdef uint16_t head = ring.free_head, at = head, flags
    if count <= 0 or <uint32_t>count > ring.free_count:
        return -1
    ring.rooms[head] = 0
    for i in range(count):
        flags = DescriptorFlag.DESC_WRITE if i >= readable else 0
        if i >= readable:
            ring.rooms[head] += pieces[i].length
        if i + 1 < count:
            flags |= DescriptorFlag.DESC_NEXT
        store_descriptor(ring.desc + DESCRIPTOR_SIZE * at, pieces[i].gpa, pieces[i].length,
                         flags, ring.links[at] if i + 1 < count else 0)
        at = ring.links[at]
    split_offer(ring, head, at, count)
    return head


cdef int split_add_table(DriverRing *ring, uint64_t gpa, uint32_t length,
                         uint32_t writable) noexcept nogil:
    cdef uint16_t head = ring.free_head
    if ring.free_count == 0:
        return -1
    store_descriptor(ring.desc + DESCRIPTOR_SIZE * head, gpa, length,
                     DescriptorFlag.DESC_INDIRECT, 0)
    ring.rooms[head] = writable
    split_offer(ring, head, ring.links[head], 1)
    return head


cdef int split_reserve(DriverRing *ring, uint16_t *ids, int limit) noexcept nogil:
    cdef uint8_t *entries = ring.avail + RING_ENTRIES
    cdef uint8_t *desc = ring.desc
    cdef const uint16_t *links = ring.links
    cdef uint16_t id = ring.free_head
    cdef int i
    limit = min(limit, <int>ring.free_count)
    # The device has read these lines: all are fetched at once, not one after the other.
    for i in range(limit):
        ids[i] = id
        prefetch_write(desc + DESCRIPTOR_SIZE * id)
        id = links[id]
    for i in range(limit // AVAIL_LINE + 1):
        prefetch_write(entries
                       + AVAIL_ENTRY * (ring.avail_next + i * AVAIL_LINE & (ring.size - 1)))
    return limit


cdef void split_add_burst(DriverRing *ring, const uint16_t *ids, const Segment *pieces,
                          int count, bint writable) noexcept nogil:
    cdef uint8_t *entries = ring.avail + RING_ENTRIES
    cdef uint8_t *desc = ring.desc
    cdef uint16_t *counts = ring.counts
    cdef uint32_t *rooms = ring.rooms
    cdef uint32_t mask = ring.size - 1, next = ring.avail_next
    cdef uint16_t flags = DescriptorFlag.DESC_WRITE if writable else 0
    cdef int i
    if count == 0:
        return
    for i in range(count):
        store_descriptor(desc + DESCRIPTOR_SIZE * ids[i], pieces[i].gpa, pieces[i].length,
                         flags, 0)
        write_once_u16(entries + AVAIL_ENTRY * (next + i & mask), ids[i])
        counts[ids[i]] = 1
    if ring.in_order:
        for i in range(count):
            rooms[ids[i]] = pieces[i].length if writable else 0
    ring.free_head = ring.links[ids[count - 1]]
    ring.free_count -= count
    ring.avail_next = <uint16_t>(next + count)


cdef bint split_driver_publish(DriverRing *ring) noexcept nogil:
    cdef uint16_t old = ring.avail_idx, new = ring.avail_next
    if old == new:
        return False
    # Pairs with the device's acquire load of avail.idx.
    store_release_u16(ring.avail + RING_IDX, new)
    ring.avail_idx = new
    # Pairs with the device's fence between asking for kicks and its last look at avail.idx.
    fence_full()
    if ring.event_idx:
        return passed_event(
            read_once_u16(ring.used + RING_ENTRIES + USED_ENTRY * ring.size), new, old)
    return not read_once_u16(ring.used) & RingFlag.USED_NO_NOTIFY


cdef int split_collect(DriverRing *ring, UsedEntry *out, int limit) noexcept nogil:
    cdef uint16_t ready = <uint16_t>(ring.used_idx - ring.last_used)
    cdef const uint8_t *entries = ring.used + RING_ENTRIES
    cdef uint16_t *links = ring.links
    cdef uint16_t *counts = ring.counts
    cdef uint32_t size = ring.size, mask = size - 1, at = ring.last_used, id = 0, length = 0
    cdef bint in_order = ring.in_order, fifo = ring.fifo
    cdef uint64_t entry
    cdef Returned returned
    cdef int count = 0, i
    if ring.broken:
        return RING_BROKEN
    returned.first = returned.last = 0
    returned.count = 0
    if ready == 0:
        # Pairs with the device's release store of used.idx.
        ring.used_idx = load_acquire_u16(ring.used + RING_IDX)
        ready = <uint16_t>(ring.used_idx - ring.last_used)
        if ready > ring.size:
            ring.broken = 1
            return RING_BROKEN
    limit = min(limit, <int>ready)
    for i in range(limit // USED_LINE):
        prefetch_read(entries + USED_ENTRY * (at + i * USED_LINE & mask))
    while count < limit:
        if not in_order or not ring.in_batch:
            entry = read_once_u64(entries + USED_ENTRY * (at + count & mask))
            id = <uint32_t>entry
            length = <uint32_t>(entry >> 32)
            if unlikely(id >= size or counts[id] == 0):
                ring.broken = 1      # a chain that the device does not have
                break
        if in_order:
            next_in_order(ring, &id, &length)
        take_back(links, counts, fifo, &returned, <uint16_t>id)
        out[count].id = id
        out[count].length = length
        count += 1
    ring.last_used = <uint16_t>(at + count)
    release(ring, &returned)
    return RING_BROKEN if count == 0 and ring.broken else count


cdef bint split_driver_arm(DriverRing *ring) noexcept nogil:
    if ring.event_idx:
        write_once_u16(ring.avail + RING_ENTRIES + AVAIL_ENTRY * ring.size, ring.last_used)
    else:
        write_once_u16(ring.avail, 0)
    # Pairs with the device's fence between storing used.idx and reading what we wrote.
    fence_full()
    return load_acquire_u16(ring.used + RING_IDX) != ring.last_used


cdef void split_driver_disarm(DriverRing *ring) noexcept nogil:
    # With EVENT_IDX the old used_event stays behind.
    if not ring.event_idx:
        write_once_u16(ring.avail, RingFlag.AVAIL_NO_INTERRUPT)


cdef void split_driver_start(DriverRing *ring, uint16_t base) noexcept nogil:
    ring.avail_next = ring.avail_idx = ring.last_used = ring.used_idx = base
    write_once_u16(ring.used + RING_IDX, base)
    write_once_u16(ring.avail + RING_IDX, base)


cdef void split_start(Ring *ring, uint16_t base) noexcept nogil:
    ring.worker.last_avail = ring.worker.avail_idx = base
    ring.worker.used_next = ring.worker.used_idx = read_once_u16(ring.control.used + RING_IDX)
    # Up to a ring's size these are another back-end's requests under way.
    ring.worker.used_behind = <uint16_t>(base - ring.worker.used_idx)
    if ring.worker.used_behind <= ring.control.size:
        ring.worker.used_behind = 0


cdef bint split_contradicts(const Ring *ring) noexcept nogil:
    # Between what the driver has back and what it offers: ahead of used.idx are another
    # back-end's requests under way. Where these two make no sense, the base is all there is.
    cdef uint16_t used = ring.worker.used_idx
    cdef uint16_t offered = load_acquire_u16(ring.control.avail + RING_IDX)
    offered -= used
    return offered <= ring.control.size and <uint16_t>(ring.worker.last_avail - used) > offered
