"""The steps of a request that one submission entry cannot carry (see `uring`).

Pieces that are left of a transfer, blocks that go through a buffer because O_DIRECT wants
them aligned, ways to clear and what the kernel said of them, zeros where nothing else writes
them. Knows no ring and no file.
"""
from libc.errno cimport EINVAL, ENODEV, ENOSYS, ENOTTY, EOPNOTSUPP
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc

from vhostpy.system.hw cimport atomic_add_i64, fence_full
from vhostpy.backends.storage.pieces cimport Position, copy_pieces, skip
from vhostpy.backends.storage.storage cimport REQUEST_UNMAP, Op

cdef enum:
    ZEROS = 65536

cdef char zeros_room[ZEROS + PAGE]
cdef char *zeros = <char *>((<uint64_t>zeros_room + PAGE - 1) & ~<uint64_t>(PAGE - 1))


cdef Detour *new_detour(const Request *request) noexcept nogil:
    cdef Detour *detour = <Detour *>calloc(1, sizeof(Detour))
    if detour != NULL:
        detour.offset = request.offset
        detour.size = request.size
        detour.iov = request.iov
        detour.count = request.iov_count
    return detour


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
    copy_bounce(request, detour, False)


cdef void copy_bounce(const Request *request, Detour *detour, bint to_guest) noexcept nogil:
    cdef Position position
    position.piece = 0
    position.at = 0
    skip(request, &position, detour.offset - request.offset)
    copy_pieces(request, &position, detour.buffer + (detour.offset - detour.start),
                bounce_part(detour), to_guest)


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


cdef bint pass_gate(Shared *shared, Detour *detour, bint partial) noexcept nogil:
    if not partial:
        if atomic_add_i64(&shared.writers, 1) > 0:
            fence_full()
            if atomic_add_i64(&shared.alone, 0) == 0:
                detour.writes = True
                return True
        atomic_add_i64(&shared.writers, -1)
        return False
    if not detour.alone:
        if atomic_add_i64(&shared.alone, 1) != 1:
            atomic_add_i64(&shared.alone, -1)
            return False
        detour.alone = True
    fence_full()
    return atomic_add_i64(&shared.writers, 0) == 0


cdef int next_way(const Shared *shared, const Request *request, int tried) noexcept nogil:
    cdef bint discard = request.op == Op.DISCARD
    if tried < DISCARD_BLOCKS and discard and shared.is_device and not shared.no_discard:
        return DISCARD_BLOCKS
    if (tried < PUNCH_HOLE and not shared.no_punch
            and (discard or request.flags & REQUEST_UNMAP)):
        return PUNCH_HOLE
    if discard:
        return 0        # only a hint
    if tried < ZERO_RANGE and not shared.no_zero_range:
        return ZERO_RANGE
    return WRITE_ZEROS


cdef bint learn(Shared *shared, int stage, int result) noexcept nogil:
    if result not in (-EOPNOTSUPP, -ENOSYS, -ENODEV, -ENOTTY, -EINVAL):
        return False
    # EINVAL: a block device that takes only whole blocks of more than 512 bytes.
    if result != -EINVAL:
        if stage == DISCARD_BLOCKS:
            shared.no_discard = True
        elif stage == PUNCH_HOLE:
            shared.no_punch = True
        else:
            shared.no_zero_range = True
    return True
