"""Chains of descriptors: what they are, and how one is followed and checked.

The checks are the same for both layouts and written once, here; a layout knows only
where the next descriptor of a chain lies. Inline is what runs for each packet.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.ring.state cimport Ring
from vhostpy.system.hw cimport likely, prefetch_read, unlikely
from vhostpy._spec cimport DescriptorFlag
from vhostpy.memory.guest cimport (
    TRANSLATE_FAULT, TRANSLATE_FULL, Region, Segment, translate, translate_whole,
)

cdef enum:
    BURST = 64             # chains moved by one call, at most
    SCRATCH_SEGMENTS = 4096
    SCRATCH_BYTES = 65536  # headers of 500 segments

    # A result of pop(): the ring itself cannot be trusted any more (avail.idx jumped).
    RING_BROKEN = -1

    # virtio 1.3, "The Virtqueue Descriptor Table": struct virtq_desc, pvirtq_desc.
    DESCRIPTOR_SIZE = 16

    # One pop() stops after so many descriptors: a burst of loops costs microseconds.
    STEPS_MAX = 4096

    # A result of walking a chain, besides 0 and a ChainFault: no room, or a miss; the
    # chain is not taken.
    WALK_STOP = -1

# Why a chain is unusable; such a chain comes out of pop() with no segments that are counted.
# Its owner counts it under this name, and gives it back unused, answers or refuses it.
cpdef enum ChainFault:
    CHAIN_OK = 0
    CHAIN_BAD_INDEX = 1          # head or next beyond the queue's size
    CHAIN_TOO_LONG = 2           # a loop, or more descriptors than the queue has
    CHAIN_ZERO_LENGTH = 3
    CHAIN_UNMAPPED = 4
    CHAIN_BAD_INDIRECT = 5       # nested, with NEXT, empty, not a multiple of 16, not negotiated
    CHAIN_BAD_ORDER = 6          # readable after writable
    CHAIN_TOO_MANY_SEGMENTS = 7  # more pieces than a scratch holds
    CHAIN_FAULTS = 8

cdef struct Chain:
    # Readable ones first, then writable ones; in the scratch. Of a faulty one, where a status
    # byte ends the ring's chains: that byte, or NULL where nobody can tell where it is.
    Segment *segments
    uint16_t readable      # count of segments
    uint16_t writable
    uint16_t id            # what used entries name: head index (split), buffer id (packed)
    uint16_t slots         # descriptors it takes in the ring: an indirect table is one
    uint32_t readable_bytes
    uint32_t writable_bytes
    uint32_t fault         # ChainFault
    uint16_t entry         # packed, where chains outlive us: the first one of its record
    uint16_t walked        # of one with a fault: descriptors looked at, 65,535 at most

cdef extern from *:
    """
    /* The words of a Chain with one segment and one slot, from `readable` to `slots`. */
    #define VHOSTPY_ONE_READABLE 0x0001000000000001ull
    #define VHOSTPY_ONE_WRITABLE 0x0001000000010000ull
    """
    uint64_t ONE_READABLE "VHOSTPY_ONE_READABLE"
    uint64_t ONE_WRITABLE "VHOSTPY_ONE_WRITABLE"

cdef struct Scratch:
    # Segments of the chains that are out, and what is made in a turn and lies in no guest:
    # headers that were rewritten. The poll that starts a turn sets `used`, `steps` and
    # `bytes_used` to 0.
    Segment *segments
    uint8_t *bytes
    uint32_t used
    uint32_t limit
    uint32_t bytes_used    # of SCRATCH_BYTES
    uint32_t steps         # descriptors that pop() walked since it was set to 0

cdef int scratch_make(Scratch *scratch) except -1
cdef void scratch_free(Scratch *scratch) noexcept nogil

cdef inline bint is_one_writable(const Chain *chain) noexcept nogil:
    """One writable segment and no readable one: `segments` is where it is."""
    return (<const uint32_t *>&chain.readable)[0] == <uint32_t>ONE_WRITABLE


cdef struct Descriptor:
    uint64_t gpa
    uint32_t length
    uint16_t flags
    uint16_t next          # split; packed: the buffer id

cdef struct Walk:
    # A chain while it is followed.
    Ring *ring
    Segment *out           # its segments go there
    int room               # for so many
    bint whole_scratch     # there never is more room
    int count              # segments so far
    int readable           # of them, once `writing`
    bint writing
    uint64_t readable_bytes
    uint64_t writable_bytes
    uint32_t steps         # descriptors looked at, by this pop()
    uint32_t begun         # of them, when this chain began
    int fault              # of a chain that is followed on, to its status byte
    uint64_t status_gpa    # of that: the last byte of its last writable descriptor so far
    bint has_status


cdef inline Descriptor split_descriptor(uint64_t gpa, uint64_t rest) noexcept nogil:
    cdef Descriptor descriptor
    descriptor.gpa = gpa
    descriptor.length = <uint32_t>rest
    descriptor.flags = <uint16_t>(rest >> 32)
    descriptor.next = <uint16_t>(rest >> 48)
    return descriptor


cdef inline Descriptor packed_descriptor(uint64_t gpa, uint64_t rest) noexcept nogil:
    cdef Descriptor descriptor
    descriptor.gpa = gpa
    descriptor.length = <uint32_t>rest
    descriptor.next = <uint16_t>(rest >> 32)
    descriptor.flags = <uint16_t>(rest >> 48)
    return descriptor


cdef inline Region region_served_last(const Ring *ring) noexcept nogil:
    """A copy: registers, where the ring's own would be loaded again for each chain."""
    cdef Region region
    if likely(ring.worker.hint < ring.control.map.count):
        return ring.control.map.regions[ring.worker.hint]
    region.gpa = region.size = 0
    region.hva = NULL
    return region


cdef inline bint take_plain(Chain *chain, Segment *out, const Region *region, uint64_t gpa,
                            uint32_t length, uint16_t id, bint writable,
                            uint32_t lead) noexcept nogil:
    """The usual chain: one descriptor, all of it in the region that served last.

    False: walk it.
    """
    cdef uint64_t offset = gpa - region.gpa     # huge when below
    cdef uint8_t *hva
    # A length of 0 is huge by then.
    if unlikely(offset >= region.size or <uint64_t>length - 1 >= region.size - offset):
        return False
    hva = region.hva + offset
    out.hva = hva
    out.gpa = gpa
    out.length = length
    chain.segments = out
    chain.fault = CHAIN_OK
    # Counts, id and slots by one store, bytes by another.
    if writable:
        # The line of a header, which is compared before it is written: shared it does.
        prefetch_read(hva)
        (<uint64_t *>&chain.readable)[0] = ONE_WRITABLE | <uint64_t>id << 32
        (<uint64_t *>&chain.readable_bytes)[0] = <uint64_t>length << 32
    else:
        # 5-10 cycles a packet at 64 B; the header's line instead of the frame's: 50 more.
        prefetch_read(hva + lead)
        (<uint64_t *>&chain.readable)[0] = ONE_READABLE | <uint64_t>id << 32
        (<uint64_t *>&chain.readable_bytes)[0] = length
    return True


cdef inline void walk_begin(Walk *walk, Ring *ring, Chain *chain, uint16_t id, Segment *out,
                            const Scratch *scratch) noexcept nogil:
    chain.segments = out
    chain.id = id
    chain.slots = 1
    chain.fault = CHAIN_OK
    walk.ring = ring
    walk.out = out
    walk.room = <int>(scratch.segments + scratch.limit - out)
    walk.whole_scratch = out == scratch.segments
    walk.count = walk.readable = 0
    walk.begun = walk.steps
    walk.writing = False
    walk.readable_bytes = walk.writable_bytes = 0
    walk.fault = CHAIN_OK


cdef int walk_fault(Walk *walk, Descriptor piece, int fault) noexcept nogil
# This buffer cannot be used. Returns the fault; 0 where a status byte ends the ring's chains,
# which is looked for behind it.
cdef void walk_past(Walk *walk, Descriptor piece) noexcept nogil
# A buffer behind that.

cdef inline int walk_piece(Walk *walk, Descriptor piece) noexcept nogil:
    """Adds one buffer to the chain. Returns 0, a ChainFault or WALK_STOP."""
    cdef Segment *out = walk.out + walk.count
    cdef uint8_t *hva
    cdef int got
    if unlikely(walk.fault):
        walk_past(walk, piece)
        return 0
    if piece.length == 0:
        return walk_fault(walk, piece, CHAIN_ZERO_LENGTH)
    if piece.flags & DescriptorFlag.DESC_WRITE:
        if not walk.writing:
            walk.writing = True
            walk.readable = walk.count
        walk.writable_bytes += piece.length
    elif walk.writing:
        return walk_fault(walk, piece, CHAIN_BAD_ORDER)
    else:
        walk.readable_bytes += piece.length
    hva = translate_whole(walk.ring.control.map, piece.gpa, piece.length,
                          &walk.ring.worker.hint)
    if hva != NULL and walk.count < walk.room:
        out.hva = hva
        out.gpa = piece.gpa
        out.length = piece.length
        walk.count += 1
        return 0
    got = translate(walk.ring.control.map, piece.gpa, piece.length, out,
                    walk.room - walk.count, &walk.ring.worker.hint)
    if got <= 0:
        if got == TRANSLATE_FAULT:
            return walk_fault(walk, piece, CHAIN_UNMAPPED)
        if got == TRANSLATE_FULL and walk.whole_scratch:
            return walk_fault(walk, piece, CHAIN_TOO_MANY_SEGMENTS)
        return WALK_STOP
    walk.count += got
    return 0


cdef int walk_table(Walk *walk, Descriptor descriptor, bint linked) noexcept nogil
# Adds the buffers of an indirect table, by which a chain ends: by their `next` where they
# are `linked` (split), else one after the other (packed). 0, a ChainFault or WALK_STOP.

cdef int walk_failed(Walk *walk, int result, Chain *chain) noexcept nogil
# walk_end() of a chain that nobody can use.

cdef inline int walk_end(Walk *walk, int result, Chain *chain) noexcept nogil:
    """Makes the chain of what was walked, with this result; its segments, or WALK_STOP.

    Of a faulty chain `fault` is set, and nothing of it can be used but its status byte.
    """
    if unlikely(result or walk.fault or (walk.readable_bytes + walk.writable_bytes) >> 32):
        return walk_failed(walk, result, chain)
    if not walk.writing:
        walk.readable = walk.count
    chain.readable = walk.readable
    chain.writable = walk.count - walk.readable
    chain.readable_bytes = <uint32_t>walk.readable_bytes
    chain.writable_bytes = <uint32_t>walk.writable_bytes
    return walk.count
