"""What each end of a virtqueue keeps: its own state, in cache lines by who writes it.

`Ring` is the back-end's end, `DriverRing` the driver's; split or packed, both look like
this. How a ring lies in shared memory is known to `split` and `packed`.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.memory.guest cimport LogMap, MemoryMap
from vhostpy.system.calls cimport CallCosts

cdef enum:
    # Where guest memory was written, until the dirty log is marked.
    LOGGED_RANGES = 128

    # Why a ring is broken.
    BROKEN_INDEXES = 1
    BROKEN_BUFFERS = 2      # what nobody can use of it has cost too much
    BROKEN_CHAIN = 16       # and the ChainFault, if any, of a chain that could not be answered

# A position in a split ring is an index that runs freely; in a packed ring, and in all that
# names one, the index in bits 0-14 and its wrap counter in bit 15.

cdef struct WorkerSide:
    # Written by the worker that works on the ring.
    uint16_t last_avail     # position of the next chain to take
    uint16_t avail_idx      # split: the driver's avail.idx when it was last loaded
    uint16_t used_next      # position of the next used entry to write
    uint16_t used_idx       # up to where the driver sees used entries; split: used.idx
    uint16_t signalled      # used_idx at the last decision about a call
    uint8_t signalled_valid  # False: the driver may have missed something, so call
    uint8_t kicks_wanted
    uint32_t hint           # for translate()
    uint32_t logged         # ranges collected
    uint32_t broken         # why, or 0
    uint64_t calls          # written to call_fd
    uint64_t first          # packed: what publish() writes at used_idx, after all others
    uint64_t deaf           # call_fd blocks: it is not written to any more
    uint32_t *kept          # packed: where publish() stores its position, or NULL
    uint16_t used_behind    # split: how far `base` contradicted used.idx when the ring started
    uint16_t dear_calls     # to this call_fd, one after the other
    uint16_t padding[2]

cdef struct ControlSide:
    # Written by control while the ring is held.
    uint8_t *desc
    uint8_t *avail          # packed: the driver's event suppression
    uint8_t *used           # packed: ours
    const MemoryMap *map
    const LogMap *log       # NULL: not logged
    uint32_t live
    int call_fd
    uint32_t size
    uint8_t packed
    uint8_t in_order
    uint8_t event_idx
    uint8_t indirect
    uint8_t log_used        # what we write to the ring is logged, at the addresses below
    uint8_t lead            # of each chain: not read by the device, so prefetch what follows
    uint8_t ends_in_status  # a chain's last writable byte says how it went, and must
    uint8_t call_is_socket  # a Unix socket, or else an eventfd
    uint8_t unused[4]

cdef struct LoggedRange:
    uint64_t gpa
    uint64_t length

cdef struct Ring:
    WorkerSide worker       # one cache line each
    ControlSide control
    uint64_t desc_log_gpa   # packed
    uint64_t used_log_gpa
    CallCosts *costs        # of all rings behind its socket
    LoggedRange ranges[LOGGED_RANGES]

cdef struct DriverRing:
    uint8_t *desc
    uint8_t *avail
    uint8_t *used
    uint16_t *links         # by id: the next free one, or the next of its chain
    uint16_t *counts        # by id of a chain: descriptors that the device has; 0: none
    uint32_t *rooms         # the same: writable bytes, kept for IN_ORDER
    uint32_t size
    uint32_t free_count     # descriptors, and ids: a chain takes as many of both
    uint16_t free_head
    uint16_t free_tail
    uint16_t avail_next     # position of the next avail entry to write
    uint16_t avail_idx      # up to where the device sees them; split: avail.idx
    uint16_t last_used      # position of the next used entry to read
    uint16_t used_idx       # split: the device's used.idx when it was last loaded
    uint64_t first          # packed: what publish() writes at avail_idx, after all others
    uint8_t packed
    uint8_t in_order
    uint8_t event_idx
    uint8_t fifo            # free ids are used again in the order in which they came back
    uint8_t broken
    # IN_ORDER: a used entry stands for all chains from the oldest to the one that it names.
    uint8_t in_batch
    uint16_t oldest
    uint16_t batch_end
    uint32_t batch_length
    int kick_fd

cdef struct UsedEntry:
    uint32_t id             # what add_chain() returned
    uint32_t length         # bytes that the device says it wrote

cdef void log_flush(Ring *ring) noexcept nogil
# Marks what was collected. The stores come first, or the front-end may copy the page
# between the bit and them.
cdef void log_collect(Ring *ring, uint64_t gpa, uint64_t length) noexcept nogil
# Guest memory was written there: to be marked by the next log_flush().
cdef void call_driver(Ring *ring) noexcept nogil
cdef void break_ring(Ring *ring) noexcept nogil
# What the driver says of its ring makes no sense: nothing more is taken from it.
cdef void break_ring_for(Ring *ring, uint32_t why) noexcept nogil
# The same, for another reason.


cdef struct Returned:
    # Ids that come back in one burst, linked in the order in which they are to be used again.
    uint16_t first
    uint16_t last
    uint32_t count


cdef inline void take_back(uint16_t *links, uint16_t *counts, bint fifo, Returned *returned,
                           uint16_t head) noexcept nogil:
    """A chain is the driver's again. `links`, `counts` and `fifo` are its ring's."""
    cdef uint16_t tail = head
    cdef uint32_t count = counts[head]
    for _ in range(1, count):
        tail = links[tail]
    counts[head] = 0
    if returned.count == 0:
        returned.first, returned.last = head, tail
    elif fifo:
        links[returned.last] = head
        returned.last = tail
    else:
        links[tail] = returned.first
        returned.first = head
    returned.count += count


cdef inline void release(DriverRing *ring, const Returned *returned) noexcept nogil:
    """They are free: used next, while they are hot in caches, or last."""
    if returned.count == 0:
        return
    if ring.free_count == 0:
        ring.free_head = returned.first
        ring.free_tail = returned.last
    elif ring.fifo:
        ring.links[ring.free_tail] = returned.first
        ring.free_tail = returned.last
    else:
        ring.links[returned.last] = ring.free_head
        ring.free_head = returned.first
    ring.free_count += returned.count


cdef inline void next_in_order(DriverRing *ring, uint32_t *id, uint32_t *length) noexcept nogil:
    """The next chain that came back by the used entry of `id`, which ends a batch.

    virtio 1.3, "In-order use of descriptors": those that it skips are used completely.
    Their ids follow each other, since none came back out of order.
    """
    cdef uint32_t step = ring.counts[ring.oldest]
    if not ring.in_batch:
        ring.in_batch = 1
        ring.batch_end = <uint16_t>id[0]
        ring.batch_length = length[0]
    id[0] = ring.oldest
    if ring.oldest == ring.batch_end:
        ring.in_batch = 0
        length[0] = ring.batch_length
    else:
        length[0] = ring.rooms[ring.oldest]
    step += ring.oldest
    ring.oldest = <uint16_t>(step if step < ring.size else step - ring.size)
