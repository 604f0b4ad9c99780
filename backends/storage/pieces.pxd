"""Between a buffer of ours and the pieces of guest memory that a request stands on."""
from libc.stdint cimport int32_t, uint64_t
from libc.string cimport memcpy
from vhostpy.backends.storage.storage cimport Request

cdef struct Position:
    # Of a byte in a request's pieces. Behind the last one: the end of the last piece, or
    # the start of one that is not there.
    int32_t piece
    uint64_t at            # bytes, in that piece


cdef inline void skip(const Request *request, Position *position, uint64_t size) noexcept nogil:
    # Moves on; the pieces have so many bytes left.
    cdef uint64_t left
    while size > 0:
        left = request.iov[position.piece].iov_len - position.at
        if size < left:
            position.at += size
            return
        size -= left
        position.piece += 1
        position.at = 0


cdef inline void copy_pieces(const Request *request, Position *position, void *buffer,
                             uint64_t size, bint to_guest) noexcept nogil:
    # Copies `size` bytes from there on, to or from `buffer`, and moves on.
    cdef char *ours = <char *>buffer
    cdef char *guest
    cdef uint64_t length
    while size > 0:
        length = min(request.iov[position.piece].iov_len - position.at, size)
        guest = <char *>request.iov[position.piece].iov_base + position.at
        if to_guest:
            memcpy(guest, ours, length)
        else:
            memcpy(ours, guest, length)
        ours += length
        size -= length
        position.at += length
        if position.at == request.iov[position.piece].iov_len:
            position.piece += 1
            position.at = 0
