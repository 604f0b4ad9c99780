"""A disk in a file or on a block device, by io_uring.

A channel is a ring of its own. submit() writes submission entries, poll() hands them to
the kernel, all in one system call, and takes what is complete out of the ring, which needs
none. Where the kernel lets us (6.1), it does completion work only when we ask for it, on
the worker's own time. The worker that polls first is the ring's only submitter.

Guest memory is never registered: pinned pages and a balloon lose data silently.

What one entry cannot carry takes a `Detour`: transfers that came back short, O_DIRECT
with a range or buffers that are not aligned, zeros where nothing else writes them. For
SECURE_ERASE io_uring has no command: threads of `file` do these, one ioctl each.
"""
cimport cython
from libc.errno cimport EAGAIN, EINTR, EIO, ENOMEM, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.types cimport off_t
from posix.uio cimport iovec, preadv, pwritev
from posix.unistd cimport close

from vhostpy.system.hw cimport (
    aligned_alloc, atomic_add_i64, fence_full, likely, read_once_u32, unlikely,
)
from vhostpy.system.linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE,
    eventfd, fstatfs, statfs_t,
)
from vhostpy.backends.storage.uring_steps cimport (
    BOUNCE, BOUNCE_BYTES, CONTINUE, DISCARD_BLOCKS, MERGE, PAGE, PUNCH_HOLE, WRITE_ZEROS,
    Detour, Shared, bounce_part, copy_bounce, fill_bounce, learn, new_detour, next_bounce,
    next_way, pass_gate, point_at_zeros, step,
)
from vhostpy.backends.storage.liburing cimport (
    IORING_FSYNC_DATASYNC, IORING_OP_URING_CMD, IORING_SETUP_R_DISABLED, IORING_SQ_CQ_OVERFLOW,
    IORING_SQ_TASKRUN, IOSQE_ASYNC, IOSQE_FIXED_FILE, io_uring, io_uring_cq_advance,
    io_uring_cq_eventfd_toggle, io_uring_cq_ready, io_uring_cqe, io_uring_enable_rings,
    io_uring_get_sqe, io_uring_params, io_uring_peek_batch_cqe, io_uring_prep_fallocate,
    io_uring_prep_fsync, io_uring_prep_read, io_uring_prep_readv, io_uring_prep_rw,
    io_uring_prep_write, io_uring_prep_writev, io_uring_queue_exit, io_uring_queue_init_params,
    io_uring_register_eventfd, io_uring_register_files, io_uring_sq_ready, io_uring_sqe,
    io_uring_submit_and_get_events,
)
from vhostpy.backends.storage.storage cimport Channel, Op, Request, Storage
from vhostpy.backends.storage.uring_setup cimport setup_flags
from vhostpy.backends.storage.file cimport FileChannel, FileStorage

import os

from vhostpy.backends.storage.uring_setup import choose_setup
from vhostpy.backends.storage.image import open_image
from vhostpy.errors import ConfigError

cdef extern from "<linux/magic.h>" nogil:
    long TMPFS_MAGIC, RAMFS_MAGIC

cdef enum:
    FLYING = 256            # requests that a channel takes at a time; entries of its ring
    REAP = 64
    IOV_MAX = 1024          # limits.h: iovecs that one call takes
    PIECE_MAX = 0x7ffff000  # bytes that the kernel moves in one call
    BOUNCES = 16            # a channel's, so that a guest can't make us take much memory
    STEP_BYTES = 512 << 10  # copied by one poll: about 50 us
    SECTOR = 512
    BLOCK_DISCARD = 0x1200  # linux/blkdev.h: BLOCK_URING_CMD_DISCARD, since 6.12


cdef bint is_in_memory(int fd):
    cdef statfs_t system
    return fstatfs(fd, &system) == 0 and system.f_type in (TMPFS_MAGIC, RAMFS_MAGIC)


@cython.final
cdef class UringStorage(Storage):
    """The file or block device at `path`, all of it.

    `alignment`: for tests, what O_DIRECT is said to want.
    """
    cdef object image
    cdef Shared *shared
    cdef FileStorage erasing    # its threads, once a queue needs them; None: not for this image
    cdef int setup
    cdef int channels           # open ones

    def __init__(self, path: str, read_only: bool = False, block_size: int = 512,
                 direct: bool = False, share_rw: bool = False, raw: bool = False, *,
                 alignment: int = 0, setup: int | None = None) -> None:
        if self.shared != NULL:
            raise TypeError("made already")
        chosen = choose_setup()
        self.setup = chosen if setup is None else max(chosen, setup)
        self.image = image = open_image(path, read_only=read_only, direct=direct,
                                        block_size=max(block_size, alignment),
                                        share_rw=share_rw, raw=raw)
        self.shared = <Shared *>calloc(1, sizeof(Shared))
        if self.shared == NULL:
            image.close()
            raise MemoryError
        self.shared.is_device = image.is_device
        self.shared.direct = direct
        self.shared.fd = image.fd
        self.shared.in_memory = not direct and is_in_memory(image.fd)
        self.shared.offset_alignment = max(image.offset_alignment, <int>alignment)
        self.shared.memory_alignment = max(image.memory_alignment, <int>alignment)
        self.shared.gated = self.shared.offset_alignment > SECTOR
        self.size_bytes = image.size_bytes
        self.block_size = image.block_size
        self.read_only = read_only
        self.can_discard = self.can_write_zeroes = not read_only
        if image.is_device and not read_only:
            self.erasing = FileStorage(path, image=image)
            self.can_secure_erase = self.erasing.can_secure_erase
            self.erase_alignment = self.erasing.erase_alignment
        self.name = image.name + (" (O_DIRECT)" if direct else "")

    def __dealloc__(self):
        free(self.shared)

    def channel(self) -> UringChannel:
        if self.image.fd < 0:
            raise ValueError(f"{self.name}: closed")
        return UringChannel(self)

    def actual_bytes(self) -> int:
        return self.image.actual_bytes()

    def close(self) -> None:
        """Closes the file; a request that hangs in the kernel keeps it open. Idempotent."""
        if self.erasing is None or self.erasing.stop():
            # The kernel takes rings apart later, and they have the file too.
            self.image.close(idle=self.channels == 0)


@cython.final
cdef class UringChannel(Channel):
    cdef UringStorage storage
    cdef Shared *shared
    cdef FileChannel erasing    # for SECURE_ERASE, or None; calls by our completion_fd
    cdef io_uring ring
    cdef bint is_open
    cdef bint is_enabled
    cdef int flying             # requests that we have
    cdef int erases             # of them, those that `erasing` has
    cdef int bounces            # of them, those that use a buffer
    # To be copied by us; done without the kernel; not startable now; to go on with another entry.
    cdef Request *copies
    cdef Request **copies_last
    cdef Request *ready
    cdef Request *waiting
    cdef Request **waiting_last
    cdef Request *again

    def __cinit__(self, UringStorage storage not None):
        cdef io_uring_params params
        cdef int fd = storage.image.fd
        cdef int result
        self.storage = storage
        self.shared = storage.shared
        self.waiting_last = &self.waiting
        self.copies_last = &self.copies
        memset(&params, 0, sizeof(params))
        params.flags = setup_flags(storage.setup)
        result = io_uring_queue_init_params(FLYING, &self.ring, &params)
        if result == -ENOMEM:
            raise ConfigError(f"{storage.name}: no memory for a ring of io_uring",
                              hint="raise the limit of locked memory (ulimit -l)")
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        self.is_open = True
        self.is_enabled = not params.flags & IORING_SETUP_R_DISABLED
        if storage.can_secure_erase:
            self.erasing = storage.erasing.channel()
            self.completion_fd = os.dup(self.erasing.completion_fd)
        else:
            self.completion_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.completion_fd < 0:
            raise OSError(errno, os.strerror(errno))
        result = io_uring_register_files(&self.ring, &fd, 1)
        if result == 0:
            result = io_uring_register_eventfd(&self.ring, self.completion_fd)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        io_uring_cq_eventfd_toggle(&self.ring, False)
        storage.channels += 1

    def __dealloc__(self):
        # What hangs in the kernel leaves the ring behind.
        if self.is_open and self.flying == 0:
            io_uring_queue_exit(&self.ring)
        if self.completion_fd >= 0:
            close(self.completion_fd)

    def close(self) -> None:
        if self.is_open and self.flying == 0:
            self.is_open = False
            self.storage.channels -= 1
            if self.erasing is not None:
                self.erasing.close()
            io_uring_queue_exit(&self.ring)
            close(self.completion_fd)
            self.completion_fd = -1

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        cdef int i, taken = min(count, FLYING - self.flying)
        for i in range(taken):
            if likely(burst[i].op <= Op.WRITE and not self.shared.direct and burst[i].size > 0):
                burst[i].home = NULL
                if self.shared.in_memory and burst[i].size <= STEP_BYTES:
                    burst[i].next = NULL
                    self.copies_last[0] = burst[i]
                    self.copies_last = &burst[i].next
                else:
                    self.prepare(burst[i], False)
            else:
                self.start(burst[i])
        self.flying += taken
        return taken

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        cdef io_uring_cqe *entries[REAP]
        cdef Request *request
        cdef int count = 0
        cdef unsigned int i, found
        if unlikely(self.waiting != NULL):
            self.start_waiting()
        while unlikely(self.again != NULL):
            request = self.again
            self.again = request.next
            self.prepare(request, True)
        while unlikely(self.ready != NULL) and count < limit:
            done[count] = self.ready
            self.ready = self.ready.next
            count += 1
        if self.copies != NULL:
            count = self.copy(done, count, limit)
        if unlikely(self.erases > 0) and count < limit:
            count = self.take_erased(done, count, limit)
        if io_uring_sq_ready(&self.ring) > 0:
            self.enter()
        if self.flying > count and count < limit:
            found = io_uring_peek_batch_cqe(
                &self.ring, entries, <unsigned int>min(limit - count, <int>REAP))
            for i in range(found):
                request = <Request *>entries[i].user_data
                if likely(request.home == NULL and entries[i].res == <int64_t>request.size):
                    request.result = 0
                elif not self.came_back(request, entries[i].res):
                    continue
                done[count] = request
                count += 1
            if found > 0:
                io_uring_cq_advance(&self.ring, found)
        self.flying -= count
        return count

    cdef int copy(self, Request **done, int count, int limit) noexcept nogil:
        """Transfers that the worker does itself; returns what `count` is then."""
        cdef Request *request
        cdef int64_t budget = STEP_BYTES
        cdef ssize_t got
        while self.copies != NULL and count < limit and budget > 0:
            request = self.copies
            self.copies = request.next
            budget -= <int64_t>request.size
            if request.op == Op.READ:
                got = preadv(self.shared.fd, request.iov, min(request.iov_count, <int32_t>IOV_MAX),
                             <off_t>request.offset)
            else:
                got = pwritev(self.shared.fd, request.iov, min(request.iov_count, <int32_t>IOV_MAX),
                              <off_t>request.offset)
            if likely(got == <int64_t>request.size):
                request.result = 0
            elif not self.came_back(request, <int32_t>got if got >= 0 else -errno):
                continue
            done[count] = request
            count += 1
        if self.copies == NULL:
            self.copies_last = &self.copies
        return count

    cdef int take_erased(self, Request **done, int count, int limit) noexcept nogil:
        cdef int found = self.erasing.poll(done + count, limit - count)
        self.erases -= found
        if self.shared.gated:
            atomic_add_i64(&self.shared.writers, -found)
        return count + found

    cdef bint arm(self) noexcept nogil:
        if (self.copies != NULL or self.ready != NULL or self.again != NULL or self.waiting != NULL
                or io_uring_sq_ready(&self.ring) > 0):
            return True
        if self.flying == 0:
            return False
        if unlikely(self.erases > 0) and self.erasing.arm():
            return True
        io_uring_cq_eventfd_toggle(&self.ring, True)
        fence_full()    # either the kernel sees the flag, or we see what it has done
        return (io_uring_cq_ready(&self.ring) > 0 or
                (read_once_u32(self.ring.sq.kflags)
                 & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) != 0)

    cdef void disarm(self) noexcept nogil:
        if unlikely(self.erases > 0):
            self.erasing.disarm()
        io_uring_cq_eventfd_toggle(&self.ring, False)

    cdef void enter(self) noexcept nogil:
        """All entries to the kernel. What it does not take now it takes at the next poll."""
        if unlikely(not self.is_enabled):
            self.is_enabled = True
            io_uring_enable_rings(&self.ring)
        io_uring_submit_and_get_events(&self.ring)

    # One request: start, entry, what came back ---------------------------------------------

    cdef void start(self, Request *request) noexcept nogil:
        """What is not a plain transfer, and every request where O_DIRECT wants alignment."""
        cdef Shared *shared = self.shared
        request.home = NULL
        if request.op == Op.FLUSH:
            if shared.flush_error == 0:
                self.prepare(request, False)
            else:
                self.end_here(request, shared.flush_error)
        elif request.size == 0:
            self.end_here(request, 0)
        elif self.waiting != NULL or not self.start_now(request):
            request.next = NULL
            self.waiting_last[0] = request
            self.waiting_last = &request.next

    cdef void start_waiting(self) noexcept nogil:
        cdef Request *request
        while self.waiting != NULL:
            request = self.waiting
            # start_now() links it elsewhere.
            self.waiting = request.next
            if not self.start_now(request):
                self.waiting = request
                break
        if self.waiting == NULL:
            self.waiting_last = &self.waiting

    cdef bint start_now(self, Request *request) noexcept nogil:
        """False: it has to wait for another one; `home` may hold what it has by then."""
        cdef Shared *shared = self.shared
        cdef Detour *detour = <Detour *>request.home
        cdef bint partial = False
        cdef bint aligned = True
        cdef Detour passed
        if request.op == Op.SECURE_ERASE:
            if shared.gated and not pass_gate(shared, &passed, False):
                return False
            self.erases += self.erasing.submit(&request, 1)
            return True
        if request.op <= Op.WRITE:
            partial = ((request.offset | request.size) & (shared.offset_alignment - 1)) != 0
            aligned = not partial and self.is_aligned(request)
            if not aligned and (self.bounces >= BOUNCES and (detour == NULL or not detour.bounces)):
                return False
        if aligned and not shared.gated and request.op <= Op.WRITE:
            self.prepare(request, False)
            return True
        if detour == NULL:
            detour = new_detour(request)
            if detour == NULL:
                self.end_here(request, -ENOMEM)
                return True
            request.home = detour
            if not aligned:
                detour.bounces = True
                self.bounces += 1
                detour.buffer = <uint8_t *>aligned_alloc(PAGE, BOUNCE_BYTES)
                if detour.buffer == NULL:
                    self.leave(request)
                    self.end_here(request, -ENOMEM)
                    return True
        if shared.gated and request.op != Op.READ and not pass_gate(shared, detour, partial):
            return False
        if request.op > Op.WRITE:
            detour.stage = next_way(shared, request, 0)
            if detour.stage == 0:
                self.leave(request)
                self.end_here(request, 0)
                return True
        elif not aligned:
            next_bounce(request, detour, shared.offset_alignment)
        self.prepare(request, False)
        return True

    cdef bint is_aligned(self, const Request *request) noexcept nogil:
        cdef uint64_t bits = 0
        cdef int i
        for i in range(request.iov_count):
            bits |= <uint64_t>request.iov[i].iov_base | request.iov[i].iov_len
        return (bits & (self.shared.memory_alignment - 1)) == 0

    cdef void prepare(self, Request *request, bint forced) noexcept nogil:
        """Writes the entry; there is one for each request that we take.

        `forced`: the kernel did not do all of it at once, so a thread of its shall.
        """
        cdef io_uring_sqe *entry = io_uring_get_sqe(&self.ring)
        cdef Detour *detour = <Detour *>request.home
        cdef iovec *iov = request.iov
        cdef int32_t count = request.iov_count
        cdef uint64_t offset = request.offset
        cdef bint reads = request.op == Op.READ
        if request.op == Op.FLUSH:
            io_uring_prep_fsync(entry, 0, IORING_FSYNC_DATASYNC)
        elif unlikely(detour != NULL and detour.stage >= DISCARD_BLOCKS
                      and detour.stage < WRITE_ZEROS):
            if detour.stage == DISCARD_BLOCKS:
                io_uring_prep_rw(IORING_OP_URING_CMD, entry, 0, <void *>detour.offset, 0,
                                 BLOCK_DISCARD)
                entry.addr3 = detour.size
            else:
                io_uring_prep_fallocate(
                    entry, 0, FALLOC_FL_KEEP_SIZE | (
                        FALLOC_FL_PUNCH_HOLE if detour.stage == PUNCH_HOLE
                        else FALLOC_FL_ZERO_RANGE),
                    detour.offset, detour.size)
        else:
            if unlikely(detour != NULL):
                offset = detour.offset
                iov = detour.iov
                count = detour.count
                if detour.stage == WRITE_ZEROS:
                    iov = detour.pieces
                    count = point_at_zeros(detour)
                elif detour.stage != CONTINUE:
                    iov = detour.pieces
                    iov.iov_base = detour.buffer + detour.moved
                    iov.iov_len = detour.length - detour.moved
                    offset = detour.start + detour.moved
                    count = 1
                    reads = reads or detour.stage == MERGE
            if count == 1:
                if reads:
                    io_uring_prep_read(entry, 0, iov.iov_base,
                                       <unsigned int>min(iov.iov_len, <size_t>PIECE_MAX), offset)
                else:
                    io_uring_prep_write(entry, 0, iov.iov_base,
                                        <unsigned int>min(iov.iov_len, <size_t>PIECE_MAX), offset)
            elif reads:
                io_uring_prep_readv(entry, 0, iov, min(count, <int32_t>IOV_MAX), offset)
            else:
                io_uring_prep_writev(entry, 0, iov, min(count, <int32_t>IOV_MAX), offset)
        entry.flags = IOSQE_FIXED_FILE | (IOSQE_ASYNC if unlikely(forced) else 0)
        entry.user_data = <uint64_t>request

    cdef bint came_back(self, Request *request, int32_t got) noexcept nogil:
        """An entry is done; False: the request goes on with another."""
        cdef Shared *shared = self.shared
        cdef Detour *detour = <Detour *>request.home
        if got == -EAGAIN or got == -EINTR:
            return self.go_on(request)
        if request.op == Op.FLUSH:
            if got < 0:
                # Dirty pages may be dropped after the first failure: a later success
                # would be a lie about them.
                shared.flush_error = got
            request.result = shared.flush_error
            return True
        if detour != NULL and DISCARD_BLOCKS <= detour.stage < WRITE_ZEROS:
            if not learn(shared, detour.stage, got):
                return self.end(request, got)
            detour.stage = next_way(shared, request, detour.stage)
            return self.end(request, 0) if detour.stage == 0 else self.go_on(request)
        if shared.direct and got > 0:
            got -= got % <int32_t>shared.offset_alignment
        if got <= 0:        # 0: the file has become shorter
            return self.end(request, got if got < 0 else -EIO)
        if detour == NULL:
            detour = new_detour(request)
            if detour == NULL:
                return self.end(request, -ENOMEM)
            request.home = detour
        if detour.stage == CONTINUE:
            step(detour, min(<uint64_t>got, detour.size))
        elif detour.stage == WRITE_ZEROS:
            got = min(<uint64_t>got, detour.size)
            detour.offset += <uint64_t>got
            detour.size -= <uint64_t>got
        elif not self.bounced(request, detour, <uint64_t>got):
            return self.go_on(request)
        return self.end(request, 0) if detour.size == 0 else self.go_on(request)

    cdef bint bounced(self, Request *request, Detour *detour, uint64_t got) noexcept nogil:
        """Some of the buffer was moved; False: there is more to do with it as it is."""
        cdef uint64_t part
        detour.moved += got
        if detour.moved < detour.length:
            return False
        if detour.stage == MERGE:
            fill_bounce(request, detour)
            detour.stage = BOUNCE
            detour.moved = 0
            return False
        part = bounce_part(detour)
        if request.op == Op.READ:
            copy_bounce(request, detour, True)
        detour.offset += part
        detour.size -= part
        if detour.size > 0:
            next_bounce(request, detour, self.shared.offset_alignment)
        return True

    cdef bint go_on(self, Request *request) noexcept nogil:
        request.next = self.again
        self.again = request
        return False

    cdef bint end(self, Request *request, int result) noexcept nogil:
        request.result = result
        self.leave(request)
        return True

    cdef void end_here(self, Request *request, int result) noexcept nogil:
        request.result = result
        request.next = self.ready
        self.ready = request

    cdef void leave(self, Request *request) noexcept nogil:
        """Gives back all that the request had, and its list as it was."""
        cdef Detour *detour = <Detour *>request.home
        if detour == NULL:
            return
        request.home = NULL
        if detour.cut_at != NULL:
            detour.cut_at[0] = detour.cut
        if detour.writes:
            atomic_add_i64(&self.shared.writers, -1)
        if detour.alone:
            atomic_add_i64(&self.shared.alone, -1)
        if detour.bounces:
            self.bounces -= 1
            free(detour.buffer)
        free(detour)
