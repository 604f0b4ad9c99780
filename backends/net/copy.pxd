"""Moves the bytes of frames: snapshots out of a guest's memory, copies into another's.

Inline, since all of it runs per frame. Decides nothing, and checks nothing: lengths and
segments were checked by the caller.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from vhostpy.system.hw cimport (
    copy_once_16, likely, prefetch_read, prefetch_write, read_once_u16, read_once_u32,
    read_once_u64, write_once_u16, write_once_u32, write_once_u64,
)
from vhostpy.vswitch.port cimport SNAPSHOT, Frame, NetHeader
from vhostpy._ring cimport Chain
from vhostpy.memory.guest cimport Segment

cdef enum:
    LINE = 64              # bytes in a cache line
    # So much of the frames to come is fetched while one is copied, out of the sender's cache
    # and out of the receiver's: 1500 B 668 -> 516 cycles, 64 B in two lines 130 -> 123.
    BYTES_AHEAD = 64 * LINE

cdef struct Cursor:
    # Where the next byte goes: in the writable segments of consecutive chains.
    const Chain *chain
    int segment
    uint32_t offset


cdef inline void store_header(uint8_t *to, const NetHeader *header, bint long_form,
                              uint16_t buffers) noexcept nogil:
    # Compared first: a line that holds the right bytes already, as it does when buffers
    # are used again, need not be fetched for writing (9 to 59 cycles a packet at 64 B).
    cdef uint64_t first = (<const uint64_t *>header)[0]
    cdef uint32_t second = header.csum_offset | <uint32_t>buffers << 16
    if read_once_u64(to) != first:
        write_once_u64(to, first)
    if long_form:
        if read_once_u32(to + 8) != second:
            write_once_u32(to + 8, second)
    elif read_once_u16(to + 8) != header.csum_offset:
        write_once_u16(to + 8, header.csum_offset)


cdef inline void fetch(const Frame *frame, uint8_t *to) noexcept nogil:
    """Prefetches what a copy of a frame in one piece will touch; its first line is here."""
    cdef const uint8_t *source = frame.segments.hva
    cdef uint32_t last = frame.length - 1
    cdef uint32_t offset = LINE
    prefetch_write(to)
    if last > LINE:
        last = min(last, <uint32_t>BYTES_AHEAD - 1)
        while offset < last:
            prefetch_read(source + offset)
            prefetch_write(to + offset)
            offset += LINE
    prefetch_read(source + last)
    prefetch_write(to + last)


cdef inline void copy_rest(uint8_t *to, const uint8_t *source, uint32_t length) noexcept nogil:
    # What follows the snapshot. Bytes 32..63 by themselves: the bulk then starts on a
    # cache line wherever the frame does (1500 B: 527 -> 387..422 cycles).
    if length >= 32:
        memcpy(to, source, 32)
        to += 32
        source += 32
        length -= 32
    if length:               # none of a frame of 64 bytes
        memcpy(to, source, length)


cdef inline void write_whole(uint8_t *to, const Frame *frame, uint32_t header_size) noexcept nogil:
    """A frame in one piece, at least as long as the snapshot, to one piece."""
    cdef const uint8_t *source = frame.segments.hva
    store_header(to, &frame.header, header_size == 12, 1)
    to += header_size
    memcpy(to, frame.head, SNAPSHOT)
    copy_rest(to + SNAPSHOT, source + SNAPSHOT, frame.length - SNAPSHOT)


cdef inline void copy_to(Cursor *cursor, const uint8_t *source, uint32_t length) noexcept nogil:
    """Spreads bytes over the segments; their room was counted before."""
    cdef const Segment *segment
    cdef uint32_t step
    while length:
        if cursor.segment == <int>cursor.chain.readable + <int>cursor.chain.writable:
            cursor.chain += 1
            cursor.segment = cursor.chain.readable
            cursor.offset = 0
        segment = &cursor.chain.segments[cursor.segment]
        step = min(length, segment.length - cursor.offset)
        memcpy(segment.hva + cursor.offset, source, step)
        source += step
        length -= step
        cursor.offset += step
        if cursor.offset == segment.length:
            cursor.segment += 1
            cursor.offset = 0


cdef inline void gather(uint8_t *to, const Segment *segments, uint32_t length) noexcept nogil:
    """The first bytes of a frame that lie in several pieces."""
    cdef uint32_t step
    while length:
        step = min(length, segments.length)
        memcpy(to, segments.hva, step)
        to += step
        length -= step
        segments += 1


cdef inline void snapshot_whole(Frame *frame, const uint8_t *start) noexcept nogil:
    # Loads that the compiler can't repeat: decisions look at the copy only.
    copy_once_16(frame.head, start)
    copy_once_16(frame.head + 16, start + 16)


cdef inline void take_snapshot(Frame *frame) noexcept nogil:
    if likely(frame.segments[0].length >= SNAPSHOT):
        snapshot_whole(frame, frame.segments[0].hva)
    else:
        memset(frame.head, 0, SNAPSHOT)
        gather(frame.head, frame.segments, min(frame.length, <uint32_t>SNAPSHOT))
