"""The steps of a request that one submission entry cannot carry (see `uring`).

Pieces that are left of a transfer, blocks that go through a buffer because O_DIRECT wants
them aligned, zeros where nothing else writes them. Knows no ring and no file.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from vhostpy.backends.storage._storage cimport Op

cdef enum:
    ZEROS = 65536

cdef char zeros_room[ZEROS + PAGE]
cdef char *zeros = <char *>((<uint64_t>zeros_room + PAGE - 1) & ~<uint64_t>(PAGE - 1))


cdef void step(Detour *detour, uint64_t got) noexcept nogil:
    detour.offset += got
    detour.size -= got
    while detour.count > 0 and got >= detour.iov.iov_len:
        got -= detour.iov.iov_len
        if detour.cut_at != NULL:
            detour.cut_at[0] = detour.cut
            detour.cut_at = NULL
        detour.iov += 1
        detour.count -= 1
    if got > 0:
        if detour.cut_at == NULL:
            detour.cut_at = detour.iov
            detour.cut = detour.iov[0]
        detour.iov.iov_base = <char *>detour.iov.iov_base + got
        detour.iov.iov_len -= got


cdef void copy_part(const Request *request, uint64_t at, uint8_t *buffer, uint64_t length,
                    bint from_buffer) noexcept nogil:
    cdef int i = 0
    cdef uint64_t piece
    cdef uint8_t *guest
    while length > 0 and i < request.iov_count:
        if at >= request.iov[i].iov_len:
            at -= request.iov[i].iov_len
            i += 1
            continue
        piece = min(length, request.iov[i].iov_len - at)
        guest = <uint8_t *>request.iov[i].iov_base + at
        if from_buffer:
            memcpy(guest, buffer, piece)
        else:
            memcpy(buffer, guest, piece)
        buffer += piece
        length -= piece
        at += piece


cdef void next_bounce(const Request *request, Detour *detour, uint32_t alignment) noexcept nogil:
    cdef uint64_t mask = ~<uint64_t>(alignment - 1)
    cdef uint64_t end
    detour.start = detour.offset & mask
    end = min((detour.offset + detour.size + alignment - 1) & mask,
              detour.start + BOUNCE_BYTES)
    detour.length = end - detour.start
    detour.moved = 0
    detour.stage = BOUNCE
    if request.op == Op.WRITE:
        if detour.start < detour.offset or detour.offset + detour.size < end:
            detour.stage = MERGE
        else:
            fill_bounce(request, detour)


cdef void fill_bounce(const Request *request, Detour *detour) noexcept nogil:
    copy_part(request, detour.offset - request.offset,
              detour.buffer + (detour.offset - detour.start), bounce_part(detour), False)


cdef int32_t point_at_zeros(Detour *detour) noexcept nogil:
    cdef uint64_t left = detour.size
    cdef int32_t i
    for i in range(ZERO_PIECES):
        detour.pieces[i].iov_base = zeros
        detour.pieces[i].iov_len = min(left, <uint64_t>ZEROS)
        left -= detour.pieces[i].iov_len
        if left == 0:
            return i + 1
    return ZERO_PIECES
