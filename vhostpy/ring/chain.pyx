"""Chains that end in an indirect table, or are faulty; and scratches.

Source: virtio 1.3, "Indirect Descriptors" (split), "Indirect Flag: Scatter-Gather
Support" (packed).
"""
from libc.stdlib cimport free
from vhostpy.system.hw cimport aligned_alloc, read_once_u8, read_once_u64
from vhostpy.memory.guest cimport TRANSLATE_FAULT

# A burst of them is 2 KiB, and no two lines of it hold one.
assert sizeof(Chain) == 32

cdef enum:
    # A chain "longer than the Queue Size" is forbidden, yet Linux builds such indirect
    # tables on small queues; up to here (UIO_MAXIOV) we take them too.
    INDIRECT_MAX = 1024


cdef int scratch_make(Scratch *scratch) except -1:
    scratch.used, scratch.limit = 0, SCRATCH_SEGMENTS
    scratch.steps = scratch.bytes_used = 0
    # In one piece; the bytes are pages that most scratches never touch.
    scratch.segments = <Segment *>aligned_alloc(
        64, SCRATCH_SEGMENTS * sizeof(Segment) + SCRATCH_BYTES)
    if scratch.segments == NULL:
        raise MemoryError
    scratch.bytes = <uint8_t *>&scratch.segments[SCRATCH_SEGMENTS]
    return 0


cdef void scratch_free(Scratch *scratch) noexcept nogil:
    free(scratch.segments)


cdef int load_from_table(Ring *ring, uint64_t gpa, uint64_t *words) noexcept nogil:
    # A descriptor of an indirect table, which lies anywhere: it may itself be cut by
    # regions. Exactly its own 16 bytes are copied, each once.
    cdef uint8_t *whole = translate_whole(ring.control.map, gpa, DESCRIPTOR_SIZE,
                                          &ring.worker.hint)
    cdef Segment pieces[DESCRIPTOR_SIZE]
    cdef uint8_t *copy = <uint8_t *>words
    cdef int count, i
    cdef uint32_t at = 0, j
    if whole != NULL:
        words[0] = read_once_u64(whole)
        words[1] = read_once_u64(whole + 8)
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
    return 0


cdef int walk_table(Walk *walk, Descriptor descriptor, bint linked) noexcept nogil:
    cdef Ring *ring = walk.ring
    cdef uint64_t table = descriptor.gpa
    cdef uint32_t entries = descriptor.length // DESCRIPTOR_SIZE
    cdef uint32_t index = 0
    cdef uint64_t words[2]
    cdef int result
    # WRITE is ignored here, as the standard wants it.
    if (not ring.control.indirect or descriptor.flags & DescriptorFlag.DESC_NEXT
            or entries == 0 or descriptor.length % DESCRIPTOR_SIZE):
        return CHAIN_BAD_INDIRECT
    if entries > max(ring.control.size, <uint32_t>INDIRECT_MAX):
        return CHAIN_TOO_LONG
    for _ in range(entries):
        walk.steps += 1
        result = load_from_table(ring, table + <uint64_t>DESCRIPTOR_SIZE * index, words)
        if result < 0:
            return CHAIN_UNMAPPED if result == TRANSLATE_FAULT else WALK_STOP
        if not linked:
            # One after the other; only WRITE means anything.
            result = walk_piece(walk, packed_descriptor(words[0], words[1]))
            if result:
                return result
            index += 1
            continue
        descriptor = split_descriptor(words[0], words[1])
        if descriptor.flags & DescriptorFlag.DESC_INDIRECT:
            return CHAIN_BAD_INDIRECT
        result = walk_piece(walk, descriptor)
        if result or not descriptor.flags & DescriptorFlag.DESC_NEXT:
            return result
        index = descriptor.next
        if index >= entries:
            return CHAIN_BAD_INDEX
    return CHAIN_TOO_LONG if linked else 0


cdef void walk_past(Walk *walk, Descriptor piece) noexcept nogil:
    cdef uint64_t last = piece.gpa + piece.length - 1
    if piece.flags & DescriptorFlag.DESC_WRITE:
        walk.status_gpa = last
        # An empty one has no last byte, and the byte before may be of data.
        walk.has_status = piece.length > 0 and last >= piece.gpa


cdef int walk_fault(Walk *walk, Descriptor piece, int fault) noexcept nogil:
    cdef const Segment *last = walk.out + walk.count - 1
    if not walk.ring.control.ends_in_status:
        return fault
    walk.fault = fault
    walk.has_status = walk.writing and walk.count > walk.readable
    if walk.has_status:
        walk.status_gpa = last.gpa + last.length - 1
    walk_past(walk, piece)
    return 0


cdef int walk_failed(Walk *walk, int result, Chain *chain) noexcept nogil:
    cdef Descriptor none
    cdef int got
    chain.readable = chain.writable = 0
    chain.readable_bytes = chain.writable_bytes = 0
    if result == WALK_STOP:
        return WALK_STOP
    if result == 0 and walk.fault == CHAIN_OK:
        # "longer than 2^32 bytes in total"
        none.gpa = none.length = none.flags = none.next = 0
        result = walk_fault(walk, none, CHAIN_TOO_LONG)
    chain.fault = walk.fault if walk.fault else result
    chain.walked = <uint16_t>min(walk.steps - walk.begun, <uint32_t>0xffff)
    chain.segments = NULL
    if result or not walk.has_status:
        return 0            # its end was not reached, or no byte of it can be a status
    got = translate(walk.ring.control.map, walk.status_gpa, 1, walk.out, walk.room,
                    &walk.ring.worker.hint)
    if got == TRANSLATE_FAULT:
        return 0
    if got <= 0:
        return WALK_STOP
    chain.segments = walk.out
    return 1
