"""Virtqueues: bursts of chains, between the driver's memory and ours.

`Virtqueue` is the back-end's end of a ring, `DriverVirtqueue` the driver's: mirror images,
so that each can be read, and tested, against the other. Only this module knows a ring's
layout; a class's methods choose the layout once per burst and call its functions
(`split_*`), which know no Python. It knows bytes and addresses; it knows no device, no
message, and nothing of what is in a buffer.

The other end is hostile: whatever lies in shared memory is read once, checked, and only
the copy is used. Source: virtio 1.3, "Split Virtqueues".
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from vhostpy._hw cimport (
    fence_full, likely, load_acquire_u16, load_acquire_u32, prefetch_read, read_once_u8,
    read_once_u16, read_once_u32, read_once_u64, store_release_u16, store_release_u32,
    unlikely, write_once_u16, write_once_u64,
)
from vhostpy.notify cimport ask_for_a_look, signal_eventfd
from vhostpy._spec cimport DescriptorFlag, Feature, Limit, RingFlag
from vhostpy.memory cimport (
    TRANSLATE_FAULT, TRANSLATE_FULL, DirtyLog, GuestMemory, LogMap, MemoryMap, Segment,
    log_mark, translate, translate_whole,
)

from typing import NamedTuple

from vhostpy.errors import GuestError, ProtocolError


cdef extern from *:
    """
    #include <stdlib.h>
    _Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
                   "rings are read in place: virtio is little-endian, and so must we be");
    """
    void *aligned_alloc(size_t alignment, size_t size) nogil


cdef enum:
    # virtio 1.3, "Split Virtqueues": struct virtq_desc, virtq_avail, virtq_used.
    DESCRIPTOR_SIZE = 16
    RING_IDX = 2            # of avail and used alike: flags, idx, ring[], event
    RING_ENTRIES = 4
    AVAIL_ENTRY = 2
    USED_ENTRY = 8

    # Descriptors are prefetched this many chains ahead (4-5 cycles a packet at 64 B).
    AHEAD = 16
    # A chain "longer than the Queue Size" is forbidden, yet Linux builds such indirect
    # tables on small queues; up to here (UIO_MAXIOV) we take them too.
    INDIRECT_MAX = 1024
    # Where guest memory was written, until the dirty log is marked.
    LOGGED_RANGES = 128
    # One pop() stops after so many descriptors: a burst of loops costs microseconds.
    STEPS_MAX = 4096

    # Results of walking a chain, besides a count of segments.
    WALK_STOP = -1          # no room, or a miss: the chain is not taken


cdef struct WorkerSide:
    # Written by the worker that works on the ring.
    uint16_t last_avail     # the next chain to take
    uint16_t avail_idx      # the driver's avail.idx when it was last loaded
    uint16_t used_next      # the next used entry to write
    uint16_t used_idx       # what used.idx says
    uint16_t signalled      # used_idx at the last decision about a call
    uint8_t signalled_valid  # False: the driver may have missed something, so call
    uint8_t kicks_wanted
    uint32_t hint           # for translate()
    uint32_t logged         # ranges collected
    uint32_t broken
    uint64_t calls          # written to call_fd
    uint64_t deaf           # call_fd blocks: it is not written to any more
    uint64_t padding[3]

cdef struct ControlSide:
    # Written by control while the ring is held.
    uint8_t *desc
    uint8_t *avail
    uint8_t *used
    const MemoryMap *map
    const LogMap *log       # NULL: not logged
    uint64_t used_log_gpa
    uint32_t live
    int call_fd
    uint32_t size
    uint8_t event_idx
    uint8_t indirect
    uint8_t log_used        # the used ring is logged, at used_log_gpa
    uint8_t unused

cdef struct LoggedRange:
    uint64_t gpa
    uint64_t length

cdef struct Ring:
    WorkerSide worker       # one cache line each
    ControlSide control
    LoggedRange ranges[LOGGED_RANGES]

# Our own invariant; sizeof is a constant, so this costs nothing but says it early.
assert sizeof(WorkerSide) == 64 and sizeof(ControlSide) == 64

cdef struct Descriptor:
    uint64_t gpa
    uint32_t length
    uint16_t flags
    uint16_t next


# virtio 1.3, "Split Virtqueues": of descriptor table, avail and used ring.
ALIGNMENTS = (16, 2, 4)


def sizes_of(size: int, features: int) -> tuple[int, int, int]:
    """Bytes of the descriptor table, the avail and the used ring of a split virtqueue.

    Source: virtio 1.3, "Split Virtqueues"; the event fields exist only with EVENT_IDX.
    """
    event = 2 if features >> Feature.EVENT_IDX & 1 else 0
    return (
        DESCRIPTOR_SIZE * size,
        RING_ENTRIES + AVAIL_ENTRY * size + event,
        RING_ENTRIES + USED_ENTRY * size + event,
    )


def _check_size(size: int, features: int) -> None:
    if features >> Feature.RING_PACKED & 1:
        raise ProtocolError("a packed ring, which is not offered")
    if not 0 < size <= Limit.QUEUE_SIZE_MAX or size & (size - 1):
        raise ProtocolError(
            f"ring of {size} entries: a power of two up to {int(Limit.QUEUE_SIZE_MAX)} is needed"
        )


# ---------------------------------------------------------------------------------------
# Shared by both ends

cdef inline bint passed_event(uint16_t event, uint16_t new, uint16_t old) noexcept nogil:
    # Did the index, on its way from `old` to `new`, write entry `event`?
    return <uint16_t>(new - event - 1) < <uint16_t>(new - old)


cdef inline Descriptor decode(uint64_t gpa, uint64_t rest) noexcept nogil:
    cdef Descriptor descriptor
    descriptor.gpa = gpa
    descriptor.length = <uint32_t>rest
    descriptor.flags = <uint16_t>(rest >> 32)
    descriptor.next = <uint16_t>(rest >> 48)
    return descriptor


cdef inline Descriptor load_descriptor(const uint8_t *where) noexcept nogil:
    # Two loads, each once: what was checked is what is used.
    return decode(read_once_u64(where), read_once_u64(where + 8))


# ---------------------------------------------------------------------------------------
# The back-end's end: what no layout changes

cdef void log_flush(Ring *ring) noexcept nogil:
    # The stores come first, or the front-end may copy the page between the bit and them.
    cdef uint32_t i
    if ring.worker.logged:
        fence_full()
        for i in range(ring.worker.logged):
            log_mark(ring.control.log, ring.ranges[i].gpa, ring.ranges[i].length)
        ring.worker.logged = 0


cdef void log_collect(Ring *ring, uint64_t gpa, uint64_t length) noexcept nogil:
    cdef LoggedRange *last
    if ring.worker.logged:
        last = &ring.ranges[ring.worker.logged - 1]
        if last.gpa + last.length == gpa:
            last.length += length
            return
        if ring.worker.logged == LOGGED_RANGES:
            log_flush(ring)
    ring.ranges[ring.worker.logged].gpa = gpa
    ring.ranges[ring.worker.logged].length = length
    ring.worker.logged += 1


cdef void call_driver(Ring *ring) noexcept nogil:
    # Whoever received the fd has made it O_NONBLOCK: a hostile counter is full, and the
    # write fails. Any failure is the other end's own: it is the one who hears nothing.
    if ring.control.call_fd >= 0 and not ring.worker.deaf:
        ring.worker.calls += 1
        if unlikely(not signal_eventfd(ring.control.call_fd)):
            ring.worker.deaf = 1
            ask_for_a_look()


cdef void break_ring(Ring *ring) noexcept nogil:
    ring.worker.broken = 1
    ask_for_a_look()


# ---------------------------------------------------------------------------------------
# The back-end's end of a split ring

cdef int load_from_table(Ring *ring, uint64_t gpa, Descriptor *out) noexcept nogil:
    # A descriptor of an indirect table, which lies anywhere: it may itself be cut by
    # regions. Exactly its own 16 bytes are copied.
    cdef uint8_t *whole = translate_whole(ring.control.map, gpa, DESCRIPTOR_SIZE,
                                          &ring.worker.hint)
    cdef Segment pieces[DESCRIPTOR_SIZE]
    cdef uint64_t words[2]
    cdef uint8_t *copy = <uint8_t *>words
    cdef int count, i
    cdef uint32_t at = 0, j
    if whole != NULL:
        out[0] = load_descriptor(whole)
        return 0
    count = translate(ring.control.map, gpa, DESCRIPTOR_SIZE, pieces, DESCRIPTOR_SIZE,
                      &ring.worker.hint)
    if count <= 0:
        return count if count < 0 else TRANSLATE_FAULT
    for i in range(count):
        for j in range(pieces[i].length):
            if at < DESCRIPTOR_SIZE:
                copy[at] = read_once_u8(pieces[i].hva + j)
                at += 1
    out[0] = decode(words[0], words[1])
    return 0


cdef int split_walk(Ring *ring, Descriptor descriptor, Chain *chain, Segment *out, int room,
                    bint whole_scratch, uint32_t *steps) noexcept nogil:
    """Follows a chain of any shape from its first descriptor, which has been read.

    Returns the segments that it took of `room` (0 with chain.fault set: nothing of the
    chain can be used), or WALK_STOP.
    """
    cdef const MemoryMap *map = ring.control.map
    cdef uint32_t limit = ring.control.size      # descriptors that this table may give
    cdef uint32_t entries = limit                # in this table
    cdef uint32_t taken = 1                      # of this table
    cdef uint64_t table = 0                      # guest address of an indirect one
    cdef uint64_t readable_bytes = 0, writable_bytes = 0
    cdef int readable = 0, count = 0, got
    cdef bint indirect = False, writing = False
    cdef uint16_t index
    chain.readable = chain.writable = 0
    chain.readable_bytes = chain.writable_bytes = 0
    while True:
        steps[0] += 1
        if descriptor.flags & DescriptorFlag.DESC_INDIRECT:
            # WRITE is ignored here, as the standard wants it.
            if (indirect or not ring.control.indirect
                    or descriptor.flags & DescriptorFlag.DESC_NEXT
                    or descriptor.length == 0 or descriptor.length % DESCRIPTOR_SIZE):
                chain.fault = CHAIN_BAD_INDIRECT
                return 0
            indirect = True
            table = descriptor.gpa
            entries = descriptor.length // DESCRIPTOR_SIZE
            limit = max(ring.control.size, <uint32_t>INDIRECT_MAX)
            taken = 0
            if entries > limit:
                chain.fault = CHAIN_TOO_LONG
                return 0
            index = 0
        else:
            if descriptor.length == 0:
                chain.fault = CHAIN_ZERO_LENGTH
                return 0
            if descriptor.flags & DescriptorFlag.DESC_WRITE:
                if not writing:
                    writing = True
                    readable = count
                writable_bytes += descriptor.length
            elif writing:
                chain.fault = CHAIN_BAD_ORDER
                return 0
            else:
                readable_bytes += descriptor.length
            got = translate(map, descriptor.gpa, descriptor.length, out + count,
                            room - count, &ring.worker.hint)
            if got <= 0:
                if got == TRANSLATE_FAULT:
                    chain.fault = CHAIN_UNMAPPED
                    return 0
                if got == TRANSLATE_FULL and whole_scratch:
                    chain.fault = CHAIN_TOO_MANY_SEGMENTS
                    return 0
                return WALK_STOP
            count += got
            if not descriptor.flags & DescriptorFlag.DESC_NEXT:
                break
            index = descriptor.next
        if index >= entries:
            chain.fault = CHAIN_BAD_INDEX
            return 0
        taken += 1
        if taken > limit:
            chain.fault = CHAIN_TOO_LONG
            return 0
        if not indirect:
            descriptor = load_descriptor(ring.control.desc + DESCRIPTOR_SIZE * index)
        else:
            got = load_from_table(ring, table + <uint64_t>DESCRIPTOR_SIZE * index, &descriptor)
            if got < 0:
                if got == TRANSLATE_FAULT:
                    chain.fault = CHAIN_UNMAPPED
                    return 0
                return WALK_STOP
    if (readable_bytes + writable_bytes) >> 32:
        chain.fault = CHAIN_TOO_LONG     # "longer than 2^32 bytes in total"
        return 0
    if not writing:
        readable = count
    chain.readable = readable
    chain.writable = count - readable
    chain.readable_bytes = readable_bytes
    chain.writable_bytes = writable_bytes
    return count


cdef inline void split_log_used(Ring *ring, uint32_t offset, uint32_t length) noexcept nogil:
    log_mark(ring.control.log, ring.control.used_log_gpa + offset, length)


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
    if ready == 0:
        return 0
    if unlikely(ready > ring.control.size):
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
    cdef const MemoryMap *map = ring.control.map
    cdef uint32_t size = ring.control.size
    cdef uint32_t mask = size - 1
    cdef uint32_t last = ring.worker.last_avail
    cdef Segment *segment = scratch.segments + scratch.used
    cdef int room = <int>(scratch.limit - scratch.used)
    cdef int ready = <uint16_t>(ring.worker.avail_idx - ring.worker.last_avail)
    cdef int i, got
    cdef uint32_t steps = 0
    cdef uint16_t head
    cdef uint64_t gpa, rest
    cdef const uint8_t *where
    cdef uint8_t *hva
    cdef Chain *chain
    if unlikely(ring.worker.broken):
        return RING_BROKEN
    if ready == 0:
        ready = split_look(ring)
        if ready <= 0:
            return ready
    ready = min(ready, limit)
    for i in range(min(ready, <int>AHEAD)):
        head = read_once_u16(entries + AVAIL_ENTRY * (last + i & mask))
        prefetch_read(desc + DESCRIPTOR_SIZE * (head & mask))
    i = 0
    while i < ready:
        if i + AHEAD < ready:
            head = read_once_u16(entries + AVAIL_ENTRY * (last + i + AHEAD & mask))
            prefetch_read(desc + DESCRIPTOR_SIZE * (head & mask))
        head = read_once_u16(entries + AVAIL_ENTRY * (last + i & mask))
        if unlikely(head >= size):
            break_ring(ring)             # nothing that could be given back
            break
        # Masked against speculation: the check above decides too late for that.
        where = desc + DESCRIPTOR_SIZE * (head & mask)
        gpa = read_once_u64(where)
        rest = read_once_u64(where + 8)
        chain = &chains[i]
        chain.segments = segment
        chain.id = head
        chain.slots = 1
        chain.fault = CHAIN_OK
        if likely(not <uint16_t>(rest >> 32)
                  & (DescriptorFlag.DESC_NEXT | DescriptorFlag.DESC_INDIRECT)
                  and <uint32_t>rest != 0 and room > 0):
            hva = translate_whole(map, gpa, <uint32_t>rest, &ring.worker.hint)
            if likely(hva != NULL):
                segment.hva = hva
                segment.gpa = gpa
                segment.length = <uint32_t>rest
                if <uint16_t>(rest >> 32) & DescriptorFlag.DESC_WRITE:
                    chain.readable = 0
                    chain.writable = 1
                    chain.readable_bytes = 0
                    chain.writable_bytes = <uint32_t>rest
                else:
                    prefetch_read(hva)   # 5-10 cycles a packet at 64 B
                    chain.readable = 1
                    chain.writable = 0
                    chain.readable_bytes = <uint32_t>rest
                    chain.writable_bytes = 0
                segment += 1
                room -= 1
                i += 1
                continue
        got = split_walk(ring, decode(gpa, rest), chain, segment, room,
                         segment == scratch.segments, &steps)
        if got < 0:
            break
        segment += got
        room -= got
        i += 1
        if steps >= STEPS_MAX:
            break
    ring.worker.last_avail = <uint16_t>(last + i)
    scratch.used = <uint32_t>(segment - scratch.segments)
    if unlikely(ring.worker.broken) and i == 0:
        return RING_BROKEN
    return i


cdef void split_push(Ring *ring, const Chain *chains, const uint32_t *written,
                     int count) noexcept nogil:
    # Entries are 8 bytes at 4 modulo 8, one store each: the driver looks only after
    # used.idx has moved. Compared first, since a line that did not change stays in the
    # driver's cache (2-6 cycles a packet, up to 42 where it rewrites headers).
    cdef uint8_t *entries = ring.control.used + RING_ENTRIES
    cdef uint32_t mask = ring.control.size - 1
    cdef uint16_t at = ring.worker.used_next
    cdef uint64_t entry
    cdef uint8_t *where
    cdef int i
    for i in range(count):
        entry = chains[i].id
        if written != NULL:
            entry |= <uint64_t>written[i] << 32
        where = entries + USED_ENTRY * (at & mask)
        if read_once_u64(where) != entry:
            write_once_u64(where, entry)
        at += 1
    ring.worker.used_next = at


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

class Taken(NamedTuple):
    """A chain that `take` returned: guest addresses and lengths of its pieces."""

    id: int
    readable: list
    writable: list
    fault: int


cdef object taken_of(const Chain *chain):
    cdef int i
    pieces = [(chain.segments[i].gpa, chain.segments[i].length)
              for i in range(chain.readable + chain.writable)]
    return Taken(chain.id, pieces[:chain.readable], pieces[chain.readable:],
                 ChainFault(chain.fault))


@cython.final
cdef class Virtqueue:
    """The back-end's end of one virtqueue.

    The workers' while `live`, else control's: all that changes it from Python wants it
    held, and workers quiescent since. `call_fd` stays its giver's, who has made it
    O_NONBLOCK: calling the driver must never block a worker.
    """

    def __cinit__(self, GuestMemory memory not None, object size, object features, *,
                  object desc_uva, object avail_uva, object used_uva, object base=0,
                  int call_fd=-1, DirtyLog log=None, object used_log_gpa=None):
        _check_size(size, features)
        self.ring = <Ring *>aligned_alloc(64, (sizeof(Ring) + 63) & ~63)
        if self.ring == NULL:
            raise MemoryError
        memset(self.ring, 0, sizeof(Ring))
        self.ring.control.size = size
        self.features = features
        self.ring.control.event_idx = features >> Feature.EVENT_IDX & 1
        self.ring.control.indirect = features >> Feature.INDIRECT_DESC & 1
        self.ring.control.call_fd = call_fd
        self._place(memory, (desc_uva, avail_uva, used_uva))
        self.set_log(log, used_log_gpa)
        self.base = base

    def __dealloc__(self):
        free(self.ring)

    # Workers' side. ----------------------------------------------------------------------

    cdef bint is_live(self) noexcept nogil:
        # Pairs with set_live(): what control changed before is seen.
        return load_acquire_u32(&self.ring.control.live)

    cdef int pop(self, Chain *chains, int limit, Scratch *scratch) noexcept nogil:
        cdef int count = split_pop(self.ring, chains, limit, scratch)
        if count > 0:
            self.inflight += count
        return count

    cdef void rewind(self, const Chain *chains, int count) noexcept nogil:
        self.ring.worker.last_avail = <uint16_t>(self.ring.worker.last_avail - count)
        self.inflight -= count

    cdef void push(self, const Chain *chains, const uint32_t *written, int count) noexcept nogil:
        split_push(self.ring, chains, written, count)
        self.inflight -= count

    cdef void publish(self) noexcept nogil:
        split_publish(self.ring)

    cdef uint32_t unpublished(self) noexcept nogil:
        return <uint16_t>(self.ring.worker.used_next - self.ring.worker.used_idx)

    cdef void log_written(self, const Segment *segments, int count) noexcept nogil:
        cdef int i
        if self.ring.control.log != NULL:
            for i in range(count):
                log_collect(self.ring, segments[i].gpa, segments[i].length)

    cdef bint logging(self) noexcept nogil:
        return self.ring.control.log != NULL

    cdef uint32_t size(self) noexcept nogil:
        return self.ring.control.size

    cdef bint arm(self) noexcept nogil:
        return split_arm(self.ring)

    cdef void disarm(self) noexcept nogil:
        split_disarm(self.ring)

    # Control's side. ---------------------------------------------------------------------

    @property
    def live(self) -> bool:
        return self.is_live()

    def set_live(self, bint live) -> None:
        """Gives the ring to the workers, or asks for it back (wait for quiescence then)."""
        store_release_u32(&self.ring.control.live, live)

    @property
    def base(self) -> int:
        """Index of the next chain to take; setting it starts the ring anew from there.

        Used entries go on where the driver's own used.idx stands. A lie there, or a base
        that does not fit it, harms only the driver: indexes are masked.
        """
        return self.ring.worker.last_avail

    @base.setter
    def base(self, value):
        cdef WorkerSide *worker = &self.ring.worker
        self._want_held()
        if not 0 <= value <= 0xffff:
            raise ProtocolError(f"vring base {value}: beyond 65535")
        worker.last_avail = worker.avail_idx = value
        worker.used_next = worker.used_idx = read_once_u16(self.ring.control.used + RING_IDX)
        worker.signalled_valid = 0
        worker.kicks_wanted = 1
        worker.broken = 0
        self.inflight = 0

    def __getattr__(self, name):
        # At C level `size` is a method, which hides it from a property of that name.
        if name == "size":
            return self.ring.control.size
        raise AttributeError(f"Virtqueue has no {name!r}")

    @property
    def broken(self) -> bool:
        """The driver's indexes made no sense; so it stays until `base` is set."""
        return self.ring.worker.broken != 0

    @property
    def deaf(self) -> bool:
        """The call fd blocks whoever writes to it: the driver is called no more."""
        return self.ring.worker.deaf != 0

    @property
    def used_index(self) -> int:
        return self.ring.worker.used_idx

    @property
    def calls(self) -> int:
        """Used buffer notifications sent so far."""
        return self.ring.worker.calls

    def remap(self, GuestMemory memory not None) -> None:
        """The same ring in a new generation of guest memory."""
        self._want_held()
        self._place(memory, self.uvas)

    def set_addresses(self, *, desc_uva: int, avail_uva: int, used_uva: int) -> None:
        """A new place for the ring's three parts; indexes go on."""
        self._want_held()
        self._place(self.memory, (desc_uva, avail_uva, used_uva))

    def set_log(self, DirtyLog log, used_log_gpa) -> None:
        """Logs writes to guest memory from now on, those to the used ring at
        `used_log_gpa`; None: not at all."""
        cdef uint64_t gpa = 0
        self._want_held()
        if used_log_gpa is not None:
            length = sizes_of(self.ring.control.size, self.features)[2]
            if not 0 <= used_log_gpa <= (1 << 64) - length:
                raise ProtocolError(
                    f"used ring logged at {used_log_gpa:#x}: {length} bytes go beyond 2**64"
                )
            gpa = used_log_gpa
        if self.ring.control.log != NULL:
            log_flush(self.ring)
        self.ring.worker.logged = 0
        self.log = log
        self.ring.control.log = &log.map if log is not None else NULL
        self.ring.control.used_log_gpa = gpa
        self.ring.control.log_used = log is not None and used_log_gpa is not None

    def set_call(self, int fd) -> None:
        """A new fd to call the driver by, or -1. It is signalled once: a call may have
        gone to the old one while nobody listened."""
        self._want_held()
        self.ring.control.call_fd = fd
        self.ring.worker.deaf = 0
        self.notify()

    def notify(self) -> None:
        """Calls the driver, whether it asked for it or not."""
        with nogil:
            call_driver(self.ring)

    def _want_held(self):
        if self.is_live():
            raise RuntimeError("the virtqueue is live: set_live(False), then wait for the workers")

    def _place(self, GuestMemory memory, uvas):
        # Changes nothing unless all three parts are where they may be.
        cdef uint64_t uva, length
        cdef uint8_t *parts[3]
        cdef int i
        names = ("descriptor table", "avail ring", "used ring")
        lengths = sizes_of(self.ring.control.size, self.features)
        for i in range(3):
            if not 0 <= uvas[i] < 1 << 64:
                raise ProtocolError(f"{names[i]} at {uvas[i]:#x}: beyond 2**64")
            uva, length = uvas[i], lengths[i]
            parts[i] = memory.hva_of_uva(uva, length)
            if parts[i] == NULL:
                raise ProtocolError(
                    f"{names[i]}: {length} bytes at {uva:#x} are not in one memory region"
                )
            # Ours too: a region's offset in its file need not be aligned.
            if uva % ALIGNMENTS[i] or <uint64_t>parts[i] % ALIGNMENTS[i]:
                raise ProtocolError(f"{names[i]} at {uva:#x}: not aligned to {ALIGNMENTS[i]}")
        self.ring.control.desc, self.ring.control.avail = parts[0], parts[1]
        self.ring.control.used = parts[2]
        self.ring.control.map = &memory.map
        self.ring.worker.hint = 0
        self.ring.worker.signalled_valid = 0
        self.memory = memory
        self.uvas = tuple(uvas)

    # Doors, for tests, `check` and devices written in Python. ------------------------------

    def take(self, int limit=BURST) -> list:
        """Available chains, in order; raises GuestError where the ring is broken."""
        cdef Chain chains[BURST]
        cdef Scratch scratch
        cdef int count, i
        if not 0 <= limit <= BURST:
            raise ValueError(f"limit {limit}: 0 to {BURST}")
        scratch.used, scratch.limit = 0, SCRATCH_SEGMENTS
        scratch.segments = <Segment *>malloc(SCRATCH_SEGMENTS * sizeof(Segment))
        if scratch.segments == NULL:
            raise MemoryError
        try:
            with nogil:
                count = self.pop(chains, limit, &scratch)
            if count < 0:
                raise GuestError("the ring is broken: its indexes jumped")
            return [taken_of(&chains[i]) for i in range(count)]
        finally:
            free(scratch.segments)

    def put_back(self, int count) -> None:
        """Un-takes the youngest `count` chains."""
        if not 0 <= count <= self.inflight:
            raise ValueError(f"{count} chains to put back, {self.inflight} are out")
        self.rewind(NULL, count)

    def give(self, items, *, bint publish=True) -> None:
        """Gives chains back: (taken or id, bytes written) pairs."""
        cdef Chain chain
        cdef uint32_t written
        for item, count in items:
            memset(&chain, 0, sizeof(chain))
            chain.id = item if isinstance(item, int) else item.id
            chain.slots = 1
            written = count
            self.push(&chain, &written, 1)
        if publish:
            self.publish_pushed()

    def publish_pushed(self) -> None:
        """What give() held back becomes visible."""
        with nogil:
            self.publish()

    def read(self, taken) -> bytes:
        """What the driver put into the chain's readable pieces."""
        return b"".join([self.memory.read(gpa, length) for gpa, length in taken.readable])

    def write(self, taken, data: bytes) -> int:
        """Fills the chain's writable pieces; how much went in."""
        cdef Segment segment
        done = 0
        for gpa, length in taken.writable:
            piece = data[done:done + length]
            if piece:
                self.memory.write(gpa, piece)
                segment.hva, segment.gpa, segment.length = NULL, gpa, len(piece)
                self.log_written(&segment, 1)
                done += len(piece)
        return done

    def want_kicks(self) -> bool:
        """`arm`: True when chains are there already."""
        return self.arm()

    def refuse_kicks(self) -> None:
        self.disarm()


# ---------------------------------------------------------------------------------------
# The driver's end of a split ring

cdef struct DriverRing:
    uint8_t *desc
    uint8_t *avail
    uint8_t *used
    uint16_t *links         # by descriptor: the next of its chain, or of the free ones
    uint16_t *counts        # by head: descriptors that the device has; 0: none
    uint32_t size
    uint32_t free_count
    uint16_t free_head
    uint16_t avail_next     # the next avail entry to write
    uint16_t avail_idx      # what avail.idx says
    uint16_t last_used      # the next used entry to read
    uint16_t used_idx       # the device's used.idx when it was last loaded
    uint8_t event_idx
    uint8_t broken
    int kick_fd


cdef inline void store_descriptor(uint8_t *where, uint64_t gpa, uint32_t length,
                                  uint16_t flags, uint16_t next) noexcept nogil:
    write_once_u64(where, gpa)
    write_once_u64(where + 8, length | <uint64_t>flags << 32 | <uint64_t>next << 48)


cdef inline void split_offer(DriverRing *ring, uint16_t head, int count) noexcept nogil:
    # Makes a chain of `count` free descriptors, the first is `head`, an avail entry.
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
    for i in range(count):
        flags = DescriptorFlag.DESC_WRITE if i >= readable else 0
        if i + 1 < count:
            flags |= DescriptorFlag.DESC_NEXT
        store_descriptor(ring.desc + DESCRIPTOR_SIZE * at, pieces[i].gpa, pieces[i].length,
                         flags, ring.links[at] if i + 1 < count else 0)
        at = ring.links[at]
    ring.free_head = at
    split_offer(ring, head, count)
    return head


cdef int split_add_table(DriverRing *ring, uint64_t gpa, uint32_t length) noexcept nogil:
    cdef uint16_t head = ring.free_head
    if ring.free_count == 0:
        return -1
    store_descriptor(ring.desc + DESCRIPTOR_SIZE * head, gpa, length,
                     DescriptorFlag.DESC_INDIRECT, 0)
    ring.free_head = ring.links[head]
    split_offer(ring, head, 1)
    return head


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
    cdef uint32_t mask = ring.size - 1, head, i
    cdef uint16_t tail
    cdef uint64_t entry
    cdef int count = 0
    if ring.broken:
        return RING_BROKEN
    if ready == 0:
        # Pairs with the device's release store of used.idx.
        ring.used_idx = load_acquire_u16(ring.used + RING_IDX)
        ready = <uint16_t>(ring.used_idx - ring.last_used)
        if ready > ring.size:
            ring.broken = 1
            return RING_BROKEN
    while count < min(<int>ready, limit):
        entry = read_once_u64(ring.used + RING_ENTRIES + USED_ENTRY * (ring.last_used & mask))
        head = <uint32_t>entry
        if head >= ring.size or ring.counts[head] == 0:
            ring.broken = 1      # a chain that the device does not have
            return count if count else RING_BROKEN
        tail = head
        for i in range(ring.counts[head] - 1):
            tail = ring.links[tail]
        ring.links[tail] = ring.free_head
        ring.free_head = head
        ring.free_count += ring.counts[head]
        ring.counts[head] = 0
        out[count].id = head
        out[count].length = <uint32_t>(entry >> 32)
        ring.last_used += 1
        count += 1
    return count


cdef bint split_driver_arm(DriverRing *ring) noexcept nogil:
    if ring.event_idx:
        write_once_u16(ring.avail + RING_ENTRIES + AVAIL_ENTRY * ring.size, ring.last_used)
    else:
        write_once_u16(ring.avail, 0)
    # Pairs with the device's fence between storing used.idx and reading what we wrote.
    fence_full()
    return load_acquire_u16(ring.used + RING_IDX) != ring.last_used


cdef uint8_t *whole_of(GuestMemory memory, uint64_t gpa, uint64_t length) except NULL:
    cdef Segment segment
    cdef uint32_t hint = 0
    if translate(&memory.map, gpa, length, &segment, 1, &hint) != 1:
        raise ValueError(f"{length} bytes at {gpa:#x} are not in one piece of memory")
    return segment.hva


@cython.final
cdef class DriverVirtqueue:
    """The driver's end of one virtqueue, which it lays out anew in `memory`.

    Serves `load`, `check` and the tests. It trusts the back-end as little as that trusts it.
    """

    def __cinit__(self, GuestMemory memory not None, object size, object features, *,
                  object desc_gpa, object avail_gpa, object used_gpa, object base=0,
                  int kick_fd=-1):
        cdef DriverRing *ring
        cdef uint32_t i
        _check_size(size, features)
        self.ring = ring = <DriverRing *>calloc(1, sizeof(DriverRing))
        if ring == NULL:
            raise MemoryError
        ring.size = ring.free_count = size
        ring.links = <uint16_t *>calloc(ring.size, sizeof(uint16_t))
        ring.counts = <uint16_t *>calloc(ring.size, sizeof(uint16_t))
        if ring.links == NULL or ring.counts == NULL:
            raise MemoryError
        self.memory = memory
        self.features = features
        ring.event_idx = features >> Feature.EVENT_IDX & 1
        ring.kick_fd = kick_fd
        lengths = sizes_of(size, features)
        for gpa, length, alignment in zip(
            (desc_gpa, avail_gpa, used_gpa), lengths, ALIGNMENTS, strict=True
        ):
            if gpa % alignment:
                raise ValueError(f"ring part at {gpa:#x}: not aligned to {alignment}")
            memory.write(gpa, bytes(length))
        ring.desc = whole_of(memory, desc_gpa, lengths[0])
        ring.avail = whole_of(memory, avail_gpa, lengths[1])
        ring.used = whole_of(memory, used_gpa, lengths[2])
        for i in range(ring.size):
            ring.links[i] = <uint16_t>(i + 1)
        ring.avail_next = ring.avail_idx = ring.last_used = ring.used_idx = base
        write_once_u16(ring.used + RING_IDX, ring.used_idx)
        write_once_u16(ring.avail + RING_IDX, ring.avail_idx)
        split_driver_arm(ring)

    def __dealloc__(self):
        if self.ring != NULL:
            free(self.ring.links)
            free(self.ring.counts)
            free(self.ring)

    cdef int add_chain(self, const Segment *pieces, int readable, int writable) noexcept nogil:
        return split_add(self.ring, pieces, readable, writable)

    cdef int add_table(self, uint64_t gpa, uint32_t length) noexcept nogil:
        return split_add_table(self.ring, gpa, length)

    cdef bint publish(self) noexcept nogil:
        return split_driver_publish(self.ring)

    cdef int collect(self, UsedEntry *out, int limit) noexcept nogil:
        return split_collect(self.ring, out, limit)

    # Doors. ------------------------------------------------------------------------------

    @staticmethod
    def ring_bytes(size: int) -> tuple[int, int, int]:
        """Bytes of the three parts, whatever will be negotiated."""
        return sizes_of(size, 1 << Feature.EVENT_IDX)

    @property
    def size(self) -> int:
        return self.ring.size

    @property
    def free(self) -> int:
        """Free descriptors."""
        return self.ring.free_count

    @property
    def base(self) -> int:
        """The next avail index."""
        return self.ring.avail_next

    def add(self, readable, writable, indirect_gpa=None) -> int:
        """Adds a chain of (GPA, length) pieces, by an indirect table there if asked; its id.

        The device sees it at the next kick(). Raises BufferError where the ring is full.
        """
        cdef Segment *pieces
        cdef int count = len(readable) + len(writable), i, head
        if count == 0:
            raise ValueError("a chain without a piece")
        if indirect_gpa is not None:
            table = b"".join([
                gpa.to_bytes(8, "little") + length.to_bytes(4, "little")
                + ((DescriptorFlag.DESC_NEXT if i + 1 < count else 0)
                   | (DescriptorFlag.DESC_WRITE if i >= len(readable) else 0)
                   ).to_bytes(2, "little")
                + ((i + 1) % count).to_bytes(2, "little")
                for i, (gpa, length) in enumerate([*readable, *writable])
            ])
            self.memory.write(indirect_gpa, table)
            head = self.add_table(indirect_gpa, len(table))
        else:
            pieces = <Segment *>calloc(count, sizeof(Segment))
            if pieces == NULL:
                raise MemoryError
            try:
                for i, (gpa, length) in enumerate([*readable, *writable]):
                    pieces[i].gpa, pieces[i].length = gpa, length
                head = self.add_chain(pieces, len(readable), len(writable))
            finally:
                free(pieces)
        if head < 0:
            raise BufferError(f"a chain of {count}, {self.ring.free_count} descriptors are free")
        return head

    def kick(self, *, bint force=False) -> bool:
        """Publishes what was added; kicks if the device asks for it, and says whether."""
        cdef bint wanted = self.publish() or force
        if wanted and self.ring.kick_fd >= 0:
            with nogil:
                signal_eventfd(self.ring.kick_fd)
        return wanted

    def used(self) -> list:
        """(id, bytes written) of chains that came back; ProtocolError if the back-end lies."""
        cdef UsedEntry out[BURST]
        cdef int count = BURST, i
        result = []
        while count == BURST:
            with nogil:
                count = self.collect(out, BURST)
            for i in range(count):
                result.append((out[i].id, out[i].length))
        if count < 0 and not result:
            raise ProtocolError(f"used entry {self.ring.last_used}: not a chain that is out")
        return result

    def arm(self) -> bool:
        """Asks for calls; True when used chains are there already."""
        return split_driver_arm(self.ring)

    def disarm(self) -> None:
        """Wants no calls; with EVENT_IDX the old used_event stays behind."""
        if not self.ring.event_idx:
            write_once_u16(self.ring.avail, RingFlag.AVAIL_NO_INTERRUPT)
