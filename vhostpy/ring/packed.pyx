"""The packed layout: one ring of descriptors that both ends write; both ends.

A descriptor tells by two of its flags whose it is: they are compared with a wrap counter
that each end turns over at the end of the ring. Whoever writes a burst writes the flags of
its first descriptor last: that is all the other end looks at, and it then sees the burst.

Called once per burst by `Virtqueue` and `DriverVirtqueue`, whose contracts say what these
do. The other end is hostile: whatever lies in shared memory is read once, checked, and
only the copy is used. Rings have any size: positions are compared, never masked or divided.
Source: virtio 1.3, "Packed Virtqueues".
"""
from vhostpy.ring.chain cimport (
    CHAIN_BAD_INDIRECT, DESCRIPTOR_SIZE, RING_BROKEN, STEPS_MAX, WALK_STOP, Descriptor, Walk,
    packed_descriptor, region_served_last, take_plain, walk_begin, walk_end, walk_piece,
    walk_table,
)
from vhostpy.ring.state cimport (
    Returned, break_ring, call_driver, log_flush, next_in_order, release, take_back,
)
from vhostpy.system.hw cimport (
    fence_full, likely, load_acquire_u64, prefetch_read, prefetch_write, read_once_u32,
    read_once_u64, store_release_u64, unlikely, write_once_u16, write_once_u32, write_once_u64,
)
from vhostpy._spec cimport DescriptorFlag, EventFlag
from vhostpy.memory.guest cimport Region, log_mark


cdef enum:
    # virtio 1.3, "Event Suppression Structure Format": position, then flags.
    EVENT_FLAGS = 2
    EVENT_SIZE = 4

    # Descriptors are prefetched this many ahead, past the ring's end too: with another core
    # as the driver 1.7 to 3.3 cycles a chain less, with 24 ahead 0.6 to 1.3 more again.
    AHEAD = 8
    # The driver fetches them to write: what comes back is soon made available again.
    DRIVER_AHEAD = 16
    DESCRIPTORS_A_LINE = 4

    # A result of packed_walk(): nobody can tell where the next chain starts.
    WALK_BROKEN = -2


cdef inline uint16_t used_flags(uint16_t position) noexcept nogil:
    return OWNER if position & WRAP else 0


cdef inline uint16_t step_back(uint16_t position, uint32_t slots, uint32_t size) noexcept nogil:
    cdef uint32_t index = position & INDEX
    slots = min(slots, size)
    if index >= slots:
        return <uint16_t>((position & WRAP) | (index - slots))
    return <uint16_t>((position & WRAP ^ WRAP) | (index + size - slots))


cdef inline bint event_wanted(const uint8_t *suppression, bint event_idx, bint valid,
                              uint16_t old, uint16_t new, uint32_t size) noexcept nogil:
    """Does the other end want to hear of what was written from `old` to `new`?

    Not `valid`: from before `old`, nobody knows since when.
    """
    cdef uint32_t event = read_once_u32(suppression)
    cdef uint16_t flags = <uint16_t>(event >> 16) & 3
    if flags != EventFlag.EVENT_DESC or not event_idx or not valid:
        return flags != EventFlag.EVENT_DISABLE
    return (packed_distance(old, <uint16_t>event, size)
            < packed_distance(old, new, size))


# ---------------------------------------------------------------------------------------
# The back-end's end

cdef void packed_start(Ring *ring, uint32_t base) noexcept nogil:
    # A front-end that says nothing of used descriptors (DPDK's virtio-user) has none out.
    ring.worker.last_avail = <uint16_t>base
    ring.worker.used_next = <uint16_t>(base >> 16) if base >> 16 else <uint16_t>base
    ring.worker.used_idx = ring.worker.used_next


cdef int packed_walk(Ring *ring, Walk *walk, Chain *chain, Descriptor descriptor,
                     uint32_t index, uint32_t room) noexcept nogil:
    """Follows a chain of any shape from its first descriptor, which has been read.

    Returns 0, a ChainFault, WALK_STOP, or WALK_BROKEN where it passes `room` slots. A faulty
    chain is followed to its end as well: only its last descriptor has the id, and the next
    chain starts behind it.
    """
    cdef uint32_t size = ring.control.size
    cdef uint32_t slots = 1
    cdef int result = 0
    cdef const uint8_t *where
    while True:
        walk.steps += 1
        if result == 0:
            if not descriptor.flags & DescriptorFlag.DESC_INDIRECT:
                result = walk_piece(walk, descriptor)
            elif slots > 1:
                result = CHAIN_BAD_INDIRECT      # "each list only of a given type"
            else:
                result = walk_table(walk, descriptor, linked=False)
            if result == WALK_STOP:
                return WALK_STOP
        if not descriptor.flags & DescriptorFlag.DESC_NEXT:
            break
        if slots == room:
            return WALK_BROKEN
        slots += 1
        index += 1
        if index == size:
            index = 0
        where = ring.control.desc + DESCRIPTOR_SIZE * index
        descriptor = packed_descriptor(read_once_u64(where), read_once_u64(where + 8))
    chain.id = descriptor.next
    chain.slots = <uint16_t>slots
    return result


cdef inline bint is_available(const Ring *ring, uint16_t position) noexcept nogil:
    cdef uint64_t rest = load_acquire_u64(ring.control.desc
                                          + DESCRIPTOR_SIZE * (position & INDEX) + 8)
    return rest >> 48 & OWNER == available_flags(position)


cdef int packed_pop(Ring *ring, Chain *chains, int limit, Scratch *scratch) noexcept nogil:
    cdef const uint8_t *desc = ring.control.desc
    cdef uint32_t size = ring.control.size
    cdef uint32_t index = ring.worker.last_avail & INDEX
    cdef uint16_t available = available_flags(ring.worker.last_avail)
    cdef Segment *segment = scratch.segments + scratch.used
    cdef Segment *end = scratch.segments + scratch.limit
    cdef uint32_t lead = ring.control.lead
    cdef uint32_t room = packed_room(ring)
    cdef Region region
    cdef int i = 0, got
    cdef uint64_t gpa, rest
    cdef const uint8_t *where
    cdef Chain *chain
    cdef Walk walk
    if unlikely(ring.worker.broken):
        return RING_BROKEN
    if unlikely(room == 0):
        if not is_available(ring, ring.worker.last_avail):
            return 0
        break_ring(ring)             # a slot that it has not got back yet
        return RING_BROKEN
    limit = min(limit, <int>room)
    walk.steps = 0
    while True:
        # No call in this loop: all that it needs stays in registers.
        region = region_served_last(ring)
        while i < limit:
            where = desc + DESCRIPTOR_SIZE * index
            # Pairs with the driver's release store of its burst's first flags. Length, id and
            # flags come by one load, so that they belong together.
            rest = load_acquire_u64(where + 8)
            if rest >> 48 & OWNER != available:
                limit = i
                break
            gpa = read_once_u64(where)
            prefetch_read(where + DESCRIPTOR_SIZE * AHEAD)
            if unlikely(rest >> 48 & (DescriptorFlag.DESC_NEXT | DescriptorFlag.DESC_INDIRECT)
                        or segment == end
                        or not take_plain(&chains[i], segment, &region, gpa, <uint32_t>rest,
                                          <uint16_t>(rest >> 32),
                                          rest >> 48 & DescriptorFlag.DESC_WRITE, lead)):
                break
            segment += 1
            i += 1
            index += 1
            if index == size:
                index = 0
                available ^= OWNER
        if i >= limit:
            break
        chain = &chains[i]
        walk_begin(&walk, ring, chain, <uint16_t>(rest >> 32), segment, scratch)
        got = packed_walk(ring, &walk, chain, packed_descriptor(gpa, rest), index, room - i)
        if unlikely(got == WALK_BROKEN):
            break_ring(ring)
            break
        got = walk_end(&walk, got, chain)
        if got == WALK_STOP:
            break
        segment += got
        i += 1
        # From here on `room` is one for each chain so far, and what is left for others.
        room -= chain.slots - 1
        limit = min(limit, <int>room)
        index += chain.slots
        if index >= size:
            index -= size
            available ^= OWNER
        if unlikely(walk.steps >= STEPS_MAX):
            break
    scratch.steps += walk.steps
    if i == 0:
        return RING_BROKEN if ring.worker.broken else 0
    ring.worker.last_avail = <uint16_t>(
        index | (WRAP if available == DescriptorFlag.DESC_AVAIL else 0))
    scratch.used = <uint32_t>(segment - scratch.segments)
    # Whoever takes chains without having been woken needs no kicks: a receive queue is
    # never armed, and a system call a refill is what its driver would pay.
    packed_disarm(ring)
    return i


cdef uint32_t slots_of(const Chain *chains, int count) noexcept nogil:
    cdef uint32_t slots = 0
    cdef int i
    for i in range(count):
        slots += chains[i].slots
    return slots


cdef void packed_rewind(Ring *ring, const Chain *chains, int count) noexcept nogil:
    ring.worker.last_avail = step_back(ring.worker.last_avail, slots_of(chains, count),
                                       ring.control.size)


cdef inline void put_used(Ring *ring, uint16_t position, uint64_t entry) noexcept nogil:
    if position == ring.worker.used_idx:
        ring.worker.first = entry
    else:
        write_once_u64(ring.control.desc + DESCRIPTOR_SIZE * (position & INDEX) + 8, entry)


cdef void packed_push(Ring *ring, const Chain *chains, const uint32_t *written,
                      int count) noexcept nogil:
    cdef uint32_t size = ring.control.size
    cdef uint16_t position = ring.worker.used_next
    cdef uint64_t entry
    cdef int i
    if ring.control.in_order and written == NULL and count > 0:
        # One descriptor tells of all: virtio 1.3, "In-order use of descriptors".
        put_used(ring, position,
                 <uint64_t>chains[count - 1].id << 32 | <uint64_t>used_flags(position) << 48)
        ring.worker.used_next = step(position, slots_of(chains, count), size)
        return
    for i in range(count):
        entry = <uint64_t>chains[i].id << 32 | <uint64_t>used_flags(position) << 48
        if written != NULL and written[i]:
            entry |= written[i] | <uint64_t>DescriptorFlag.DESC_WRITE << 48
        put_used(ring, position, entry)
        position = step(position, chains[i].slots, size)
    ring.worker.used_next = position


cdef void packed_log_used(Ring *ring, uint16_t first, uint32_t slots) noexcept nogil:
    cdef uint32_t size = ring.control.size
    cdef uint32_t start = first & INDEX
    cdef uint32_t head = min(slots, size - start)
    log_mark(ring.control.log, ring.desc_log_gpa + DESCRIPTOR_SIZE * start,
             DESCRIPTOR_SIZE * head)
    if slots > head:
        log_mark(ring.control.log, ring.desc_log_gpa, DESCRIPTOR_SIZE * (min(slots, size) - head))


cdef void packed_publish(Ring *ring) noexcept nogil:
    cdef uint32_t size = ring.control.size
    cdef uint16_t old = ring.worker.used_idx
    cdef uint16_t new = ring.worker.used_next
    cdef bint valid = ring.worker.signalled_valid
    if old == new:
        return
    if unlikely(ring.control.log != NULL):
        log_flush(ring)
    if ring.worker.kept != NULL:
        # Before the driver can see it, and with where it came from: whenever a kill comes, the
        # ring tells which of the two it is at.
        write_once_u32(ring.worker.kept, <uint32_t>old << 16 | new)
    # Pairs with the driver's acquire load of the flags of the next used descriptor.
    store_release_u64(ring.control.desc + DESCRIPTOR_SIZE * (old & INDEX) + 8,
                      ring.worker.first)
    ring.worker.used_idx = new
    # Pairs with the driver's fence between storing its event suppression and its last
    # look at the flags; and orders the log's bits behind what they speak of.
    fence_full()
    if unlikely(ring.control.log_used):
        packed_log_used(ring, old, packed_distance(old, new, size))
    ring.worker.signalled_valid = 1
    if event_wanted(ring.control.avail, ring.control.event_idx, valid, old, new, size):
        call_driver(ring)


cdef inline void set_events(uint8_t *suppression, bint event_idx,
                            uint16_t position) noexcept nogil:
    # One store: the other end reads both fields at once.
    if event_idx:
        write_once_u32(suppression, position | <uint32_t>EventFlag.EVENT_DESC << 16)
    else:
        write_once_u16(suppression + EVENT_FLAGS, EventFlag.EVENT_ENABLE)


cdef void packed_disarm(Ring *ring) noexcept nogil:
    if ring.worker.kicks_wanted:
        ring.worker.kicks_wanted = 0
        write_once_u16(ring.control.used + EVENT_FLAGS, EventFlag.EVENT_DISABLE)
        if unlikely(ring.control.log_used):
            fence_full()
            log_mark(ring.control.log, ring.used_log_gpa, EVENT_SIZE)


cdef bint packed_arm(Ring *ring) noexcept nogil:
    cdef uint16_t last = ring.worker.last_avail
    if ring.worker.broken:
        return False
    ring.worker.kicks_wanted = 1
    set_events(ring.control.used, ring.control.event_idx, last)
    # Pairs with the driver's fence between storing flags and reading what we wrote.
    fence_full()
    if unlikely(ring.control.log_used):
        log_mark(ring.control.log, ring.used_log_gpa, EVENT_SIZE)
    return is_available(ring, last)


# ---------------------------------------------------------------------------------------
# The driver's end

cdef void packed_driver_start(DriverRing *ring, uint32_t base) noexcept nogil:
    ring.avail_next = ring.avail_idx = <uint16_t>base
    ring.last_used = <uint16_t>(base >> 16)


cdef inline void put_available(DriverRing *ring, uint16_t position, uint64_t gpa,
                               uint32_t length, uint16_t id, uint16_t flags) noexcept nogil:
    cdef uint8_t *where = ring.desc + DESCRIPTOR_SIZE * (position & INDEX)
    cdef uint64_t rest = (length | <uint64_t>id << 32
                          | <uint64_t>(flags | available_flags(position)) << 48)
    write_once_u64(where, gpa)
    if position == ring.avail_idx:
        ring.first = rest
    else:
        write_once_u64(where + 8, rest)


cdef inline void take_ids(DriverRing *ring, int count, uint32_t room) noexcept nogil:
    # The first is the chain's; the others rest as long.
    cdef uint16_t id = ring.free_head
    ring.counts[id] = count
    ring.rooms[id] = room
    for _ in range(count):
        id = ring.links[id]
    ring.free_head = id
    ring.free_count -= count


cdef int packed_add(DriverRing *ring, const Segment *pieces, int readable,
                    int writable) noexcept nogil:
    cdef int count = readable + writable, i
    cdef uint16_t id = ring.free_head, position = ring.avail_next, flags
    cdef uint32_t room = 0
    if count <= 0 or <uint32_t>count > ring.free_count:
        return -1
    for i in range(count):
        flags = DescriptorFlag.DESC_WRITE if i >= readable else 0
        if i >= readable:
            room += pieces[i].length
        if i + 1 < count:
            flags |= DescriptorFlag.DESC_NEXT
        put_available(ring, position, pieces[i].gpa, pieces[i].length, id, flags)
        position = step_one(position, ring.size)
    ring.avail_next = position
    take_ids(ring, count, room)
    return id


cdef int packed_add_table(DriverRing *ring, uint64_t gpa, uint32_t length,
                          uint32_t writable) noexcept nogil:
    cdef uint16_t id = ring.free_head
    if ring.free_count == 0:
        return -1
    put_available(ring, ring.avail_next, gpa, length, id, DescriptorFlag.DESC_INDIRECT)
    ring.avail_next = step_one(ring.avail_next, ring.size)
    take_ids(ring, 1, writable)
    return id


cdef int packed_reserve(DriverRing *ring, uint16_t *ids, int limit) noexcept nogil:
    cdef const uint16_t *links = ring.links
    cdef uint16_t id = ring.free_head
    cdef int i
    limit = min(limit, <int>ring.free_count)
    for i in range(limit):
        ids[i] = id
        id = links[id]
    # The device has written these lines: all are fetched at once, not one after the other.
    for i in range((limit + DESCRIPTORS_A_LINE - 1) // DESCRIPTORS_A_LINE):
        prefetch_write(ring.desc + DESCRIPTOR_SIZE * (
            step(ring.avail_next, i * DESCRIPTORS_A_LINE, ring.size) & INDEX))
    return limit


cdef void packed_add_burst(DriverRing *ring, const uint16_t *ids, const Segment *pieces,
                           int count, bint writable) noexcept nogil:
    cdef uint16_t *counts = ring.counts
    cdef uint32_t *rooms = ring.rooms
    cdef uint32_t size = ring.size
    cdef uint16_t position = ring.avail_next
    cdef uint16_t flags = DescriptorFlag.DESC_WRITE if writable else 0
    cdef int i
    if count == 0:
        return
    for i in range(count):
        put_available(ring, position, pieces[i].gpa, pieces[i].length, ids[i], flags)
        position = step_one(position, size)
        counts[ids[i]] = 1
    if ring.in_order:
        for i in range(count):
            rooms[ids[i]] = pieces[i].length if writable else 0
    ring.free_head = ring.links[ids[count - 1]]
    ring.free_count -= count
    ring.avail_next = position


cdef bint packed_driver_publish(DriverRing *ring) noexcept nogil:
    cdef uint16_t old = ring.avail_idx, new = ring.avail_next
    if old == new:
        return False
    # Pairs with the device's acquire load of the flags of the next available descriptor.
    store_release_u64(ring.desc + DESCRIPTOR_SIZE * (old & INDEX) + 8, ring.first)
    ring.avail_idx = new
    # Pairs with the device's fence between asking for kicks and its last look at the flags.
    fence_full()
    return event_wanted(ring.used, ring.event_idx, True, old, new, ring.size)


cdef inline bint is_used(DriverRing *ring, uint16_t position, uint64_t *rest) noexcept nogil:
    # Pairs with the device's release store of its burst's first flags. Where the device has
    # nothing, an old descriptor can look like a used one.
    rest[0] = load_acquire_u64(ring.desc + DESCRIPTOR_SIZE * (position & INDEX) + 8)
    return (<uint16_t>(rest[0] >> 48) & OWNER == used_flags(position)
            and position != ring.avail_idx)


cdef int packed_collect(DriverRing *ring, UsedEntry *out, int limit) noexcept nogil:
    cdef uint64_t rest
    cdef uint32_t id = 0, length = 0, slots
    cdef uint16_t position = ring.last_used
    cdef Returned returned
    cdef int count = 0
    if ring.broken:
        return RING_BROKEN
    returned.count = 0
    while count < limit:
        if not ring.in_batch:
            if not is_used(ring, position, &rest):
                break
            prefetch_write(ring.desc + DESCRIPTOR_SIZE * ((position & INDEX) + DRIVER_AHEAD))
            id = <uint16_t>(rest >> 32)
            length = 0               # "reserved for used descriptors without WRITE"
            if <uint16_t>(rest >> 48) & DescriptorFlag.DESC_WRITE:
                length = <uint32_t>rest
            if id >= ring.size or ring.counts[id] == 0:
                ring.broken = 1      # a chain that the device does not have
                break
        if ring.in_order:
            next_in_order(ring, &id, &length)
        # A branch, not a sum: else where the next one lies is known only when this one is here.
        slots = ring.counts[id]
        if likely(slots == 1):
            position = step_one(position, ring.size)
        else:
            position = step(position, slots, ring.size)
        take_back(ring.links, ring.counts, ring.fifo, &returned, <uint16_t>id)
        out[count].id = id
        out[count].length = length
        count += 1
    ring.last_used = position
    release(ring, &returned)
    return RING_BROKEN if count == 0 and ring.broken else count


cdef bint packed_driver_arm(DriverRing *ring) noexcept nogil:
    cdef uint64_t rest
    set_events(ring.avail, ring.event_idx, ring.last_used)
    # Pairs with the device's fence between storing flags and reading what we wrote.
    fence_full()
    return is_used(ring, ring.last_used, &rest)


cdef void packed_driver_disarm(DriverRing *ring) noexcept nogil:
    write_once_u16(ring.avail + EVENT_FLAGS, EventFlag.EVENT_DISABLE)
