"""A frame of any pieces, written to any number of chains: the way of frames that
`write_whole` is not for."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from vhostpy.vswitch.port cimport SNAPSHOT, Frame
from vhostpy._ring cimport Chain, Virtqueue
from vhostpy.backends.net.copy cimport Cursor, copy_to, store_header
from vhostpy.memory.guest cimport Segment


cdef void spread(const Frame *frame, uint32_t header_size, const Chain *chains,
                 uint32_t *written, int count) noexcept nogil:
    cdef uint8_t header[12]
    cdef Cursor cursor
    cdef uint32_t left = header_size + frame.length
    cdef uint32_t skip = min(frame.length, <uint32_t>SNAPSHOT)
    cdef uint32_t rest = frame.length - skip, step
    cdef const Segment *segment = frame.segments
    cdef int i
    cursor.chain = chains
    cursor.segment = chains.readable
    cursor.offset = 0
    memset(header, 0, sizeof(header))
    store_header(header, &frame.header, header_size == 12, <uint16_t>count)
    copy_to(&cursor, header, header_size)
    # The snapshot, not what its bytes have become in the sender's memory.
    copy_to(&cursor, frame.head, skip)
    while rest:
        if skip < segment.length:
            step = min(segment.length - skip, rest)
            copy_to(&cursor, segment.hva + skip, step)
            rest -= step
            skip = 0
        else:
            skip -= segment.length
        segment += 1
    for i in range(count):
        step = min(left, chains[i].writable_bytes)
        written[i] = step
        left -= step


cdef void log_spread(Virtqueue virtqueue, const Chain *chains, const uint32_t *written,
                     int count) noexcept nogil:
    cdef const Chain *chain
    cdef Segment segment
    cdef uint32_t left
    cdef int i, j
    for i in range(count):
        chain = &chains[i]
        left = written[i]
        for j in range(<int>chain.readable, <int>chain.readable + <int>chain.writable):
            if left == 0:
                break
            segment = chain.segments[j]
            segment.length = min(segment.length, left)
            left -= segment.length
            virtqueue.log_written(&segment, 1)
