"""A request of virtio-blk under way, its numbers, and how its pieces are read.

Source: virtio 1.3, "Block Device / Device Operation".
"""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.uio cimport iovec
from vhostpy.system.hw cimport read_once_u8, read_once_u32
from vhostpy._ring cimport Chain
from vhostpy.memory.guest cimport Segment
from vhostpy.backends.storage.storage cimport Request

cdef enum:
    # Type and status of a request.
    T_IN = 0
    T_OUT = 1
    T_FLUSH = 4
    T_GET_ID = 8
    T_DISCARD = 11
    T_WRITE_ZEROES = 13
    T_SECURE_ERASE = 14

    S_OK = 0
    S_IOERR = 1
    S_UNSUPP = 2
    UNDER_WAY = 255         # ours: the storage has it

    HEADER = 16             # struct virtio_blk_req up to its data
    SECTOR = 512
    IOV_FIRST = 8

cdef struct Slot:
    Request request
    Chain chain             # only what push() reads
    void *memory            # GuestMemory of when it started; counted in its `references`
    uint8_t *status
    uint64_t status_gpa
    iovec *iov
    uint64_t *gpas          # of each iovec
    uint64_t taken_at       # ticks() of the poll that took it
    Request *parts          # a discard of several ranges, instead of `request`
    int32_t room            # iovecs that `iov` and `gpas` hold
    int32_t pending         # requests that the storage has not given back
    int32_t result
    int32_t op
    uint8_t flushed


cdef inline void copy_once(uint8_t *out, const uint8_t *hva, uint32_t length) noexcept nogil:
    # Each byte of the guest's is read once; the compiler may not read it again.
    cdef uint32_t i = 0
    if not <uint64_t>hva & 3:
        while i + 4 <= length:
            (<uint32_t *>(out + i))[0] = read_once_u32(hva + i)
            i += 4
    while i < length:
        out[i] = read_once_u8(hva + i)
        i += 1


cdef inline int gather(Segment *segments, int count, void *out,
                       uint32_t length) noexcept nogil:
    """Moves `length` bytes off the front of `segments`, however they are split.

    There are as many. Returns how many segments are used up; the next one is cut.
    """
    cdef uint8_t *at = <uint8_t *>out
    cdef uint32_t piece
    cdef int i = 0
    while length > 0 and i < count:
        piece = min(length, segments[i].length)
        copy_once(at, segments[i].hva, piece)
        at += piece
        length -= piece
        if piece < segments[i].length:
            segments[i].hva += piece
            segments[i].gpa += piece
            segments[i].length -= piece
            break
        i += 1
    return i


cdef inline bint reserve(Slot *slot, int count) noexcept nogil:
    """Room for `count` iovecs. Grows a few times in a slot's life, then never."""
    cdef int room = max(slot.room, <int32_t>IOV_FIRST)
    if count <= slot.room:
        return True
    while room < count:
        room *= 2
    free(slot.iov)
    free(slot.gpas)
    slot.iov = <iovec *>malloc(room * sizeof(iovec))
    slot.gpas = <uint64_t *>malloc(room * sizeof(uint64_t))
    slot.room = room
    if slot.iov == NULL or slot.gpas == NULL:
        free(slot.iov)
        free(slot.gpas)
        slot.iov = NULL
        slot.gpas = NULL
        slot.room = 0
        return False
    return True
