"""A disk in a file or on a block device, by a pool of threads.

The way that works everywhere: each request is a preadv, pwritev, fdatasync or fallocate
that may block its thread. Workers never wait: they put requests into one queue, and each
channel has a list of those that are done.
"""
cimport cython
from libc.errno cimport EINTR, EINVAL, EIO, ENODEV, ENOSYS, ENOTTY, EOPNOTSUPP, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.signal cimport sigfillset, sigset_t
from posix.types cimport off_t
from posix.uio cimport iovec, preadv, pwritev
from posix.unistd cimport fdatasync

from vhostpy.system.linux cimport (
    FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, SIG_SETMASK, pthread_self,
    pthread_setname_np, pthread_sigmask,
)
from vhostpy.backends.storage.completions cimport (
    Done, DoneChannel, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock, put_done,
)
from vhostpy.backends.storage.storage cimport REQUEST_UNMAP, Op, Request, Storage

import logging
import threading

from vhostpy.backends.storage.image import Image, open_image

cdef extern from "<pthread.h>" nogil:
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int, int, off_t, off_t)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int, unsigned long, ...)

cdef extern from "<linux/fs.h>" nogil:
    unsigned long BLKDISCARD, BLKSECDISCARD, BLKSSZGET

cdef enum:
    THREADS = 8             # requests that the kernel has at a time
    IOV_MAX = 1024          # limits.h: iovecs that one call takes
    ZEROS = 65536
    ZERO_PIECES = 16
    JOIN_S = 2

cdef char zeros[ZEROS]      # C zeroes it; only ever read

log = logging.getLogger("vhostpy")


# --- What a thread does -----------------------------------------------------------------

cdef int transfer(int fd, Request *request) noexcept nogil:
    """All of a READ or WRITE; transfers may come short, and lists be too long."""
    cdef iovec *iov = request.iov
    cdef int32_t left = request.iov_count
    cdef uint64_t offset = request.offset, size = request.size
    cdef iovec cut          # as *iov was before we moved its start
    cdef bint is_cut = False
    cdef ssize_t got
    cdef size_t taken
    cdef int result = 0
    while size > 0:
        if request.op == Op.READ:
            got = preadv(fd, iov, min(left, <int32_t>IOV_MAX), <off_t>offset)
        else:
            got = pwritev(fd, iov, min(left, <int32_t>IOV_MAX), <off_t>offset)
        if got < 0:
            if errno == EINTR:
                continue
            result = -errno
            break
        if got == 0:        # the file has become shorter
            result = -EIO
            break
        offset += <uint64_t>got
        size -= <uint64_t>got
        taken = <size_t>got
        while left > 0 and taken >= iov.iov_len:
            taken -= iov.iov_len
            if is_cut:
                iov[0] = cut
                is_cut = False
            iov += 1
            left -= 1
        if taken > 0:
            if not is_cut:
                cut = iov[0]
                is_cut = True
            iov.iov_base = <char *>iov.iov_base + taken
            iov.iov_len -= taken
    if is_cut:
        iov[0] = cut
    return result


cdef int write_zeros(int fd, uint64_t offset, uint64_t size) noexcept nogil:
    cdef iovec iov[ZERO_PIECES]
    cdef Request request
    cdef int i, result
    request.op = Op.WRITE
    request.iov = iov
    while size > 0:
        request.offset = offset
        request.size = request.iov_count = 0
        for i in range(ZERO_PIECES):
            if size == 0:
                break
            iov[i].iov_base = zeros
            iov[i].iov_len = min(size, <uint64_t>ZEROS)
            size -= iov[i].iov_len
            request.size += iov[i].iov_len
            request.iov_count += 1
        offset += request.size
        result = transfer(fd, &request)
        if result < 0:
            return result
    return 0


cdef int allocate(int fd, int mode, uint64_t offset, uint64_t size) noexcept nogil:
    cdef int result
    while True:
        result = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, <off_t>offset, <off_t>size)
        if result == 0:
            return 0
        if errno != EINTR:
            return -errno


cdef inline bint unsupported(int result) noexcept nogil:
    # EINVAL: a block device that takes only whole blocks of more than 512 bytes.
    return result in (-EOPNOTSUPP, -ENOSYS, -ENODEV, -ENOTTY, -EINVAL)


cdef int clear(Pool *pool, Request *request) noexcept nogil:
    """DISCARD and WRITE_ZEROES."""
    cdef int result
    cdef uint64_t where[2]
    if request.size == 0:
        return 0
    if request.op == Op.DISCARD and pool.is_device and not pool.no_discard:
        where[0], where[1] = request.offset, request.size
        result = -errno if ioctl(pool.fd, BLKDISCARD, where) < 0 else 0
        if not unsupported(result):
            return result
        pool.no_discard = result != -EINVAL
    if request.op == Op.DISCARD or request.flags & REQUEST_UNMAP:
        if not pool.no_punch:
            result = allocate(pool.fd, FALLOC_FL_PUNCH_HOLE, request.offset, request.size)
            if not unsupported(result):
                return result
            if result != -EINVAL:
                pool.no_punch = True
        if request.op == Op.DISCARD:
            return 0        # only a hint
    if not pool.no_zero_range:
        result = allocate(pool.fd, FALLOC_FL_ZERO_RANGE, request.offset, request.size)
        if not unsupported(result):
            return result
        if result != -EINVAL:
            pool.no_zero_range = True
    return write_zeros(pool.fd, request.offset, request.size)


cdef int secure_erase(Pool *pool, Request *request) noexcept nogil:
    cdef uint64_t where[2]
    where[0], where[1] = request.offset, request.size
    if request.size == 0:
        return 0
    return -errno if ioctl(pool.fd, BLKSECDISCARD, where) < 0 else 0


cdef uint32_t erases_by(int fd):
    """What a block device wants BLKSECDISCARD's ranges aligned to, bytes; 0: it erases none."""
    cdef uint64_t where[2]
    cdef int block = 0
    # Asked with a range that none would take.
    where[0] = where[1] = 1
    if ioctl(fd, BLKSECDISCARD, where) == 0 or errno != EINVAL or ioctl(fd, BLKSSZGET, &block) < 0:
        return 0
    return <uint32_t>block


cdef int flush(Pool *pool) noexcept nogil:
    if pool.flush_error == 0:
        while fdatasync(pool.fd) < 0:
            if errno != EINTR:
                # Dirty pages may be dropped after the first failure: a later success
                # would be a lie about them.
                pool.flush_error = -errno
                break
    return pool.flush_error


cdef int carry_out(Pool *pool, Request *request) noexcept nogil:
    if request.op == Op.READ or request.op == Op.WRITE:
        return transfer(pool.fd, request)
    if request.op == Op.FLUSH:
        return flush(pool)
    if request.op == Op.SECURE_ERASE:
        return secure_erase(pool, request)
    return clear(pool, request)


cdef void serve(Pool *pool) noexcept nogil:
    cdef Request *request
    cdef Done *home
    while True:
        pthread_mutex_lock(&pool.lock)
        while pool.first == NULL and not pool.stopping:
            pool.waiting += 1
            pthread_cond_wait(&pool.wanted, &pool.lock)
            pool.waiting -= 1
        request = pool.first
        if request != NULL:
            pool.first = request.next
            if pool.first == NULL:
                pool.last = &pool.first
        pthread_mutex_unlock(&pool.lock)
        if request == NULL:
            return
        home = <Done *>request.home
        request.result = carry_out(pool, request)
        put_done(home, request)


def run(uint64_t pool, int number):
    """A thread of the pool; holds no object, only the pool, which close() frees behind it."""
    cdef sigset_t mask
    name = f"vhostpy-io{number}".encode()
    cdef const char *text = name
    with nogil:
        sigfillset(&mask)       # signals are the main thread's; faults here are EFAULT
        pthread_sigmask(SIG_SETMASK, &mask, NULL)
        pthread_setname_np(pthread_self(), text)
        serve(<Pool *>pool)


# --- Storage and channel -----------------------------------------------------------------

@cython.final
cdef class FileStorage(Storage):
    """The file or block device at `path`, all of it.

    `image`: it is open already, and stays so; whoever opened it calls stop().
    """

    def __cinit__(self):
        self.threads = []
        self.lock = threading.Lock()

    def __init__(self, path: str, read_only: bool = False, block_size: int = 512,
                 share_rw: bool = False, raw: bool = False, *,
                 image: Image | None = None) -> None:
        if self.pool != NULL:
            raise TypeError("made already")
        self.image = image = image or open_image(
            path, read_only=read_only, block_size=block_size, share_rw=share_rw, raw=raw)
        self.pool = <Pool *>calloc(1, sizeof(Pool))
        if self.pool == NULL:
            self.image.close()
            raise MemoryError
        pthread_mutex_init(&self.pool.lock, NULL)
        pthread_cond_init(&self.pool.wanted, NULL)
        self.pool.last = &self.pool.first
        self.pool.fd = self.image.fd
        self.pool.is_device = self.image.is_device
        self.size_bytes = self.image.size_bytes
        self.block_size = self.image.block_size
        self.read_only = read_only
        self.can_discard = self.can_write_zeroes = not read_only
        if image.is_device and not read_only:
            self.erase_alignment = erases_by(image.fd)
            self.can_secure_erase = self.erase_alignment > 0
        self.name = self.image.name

    def channel(self) -> FileChannel:
        if self.pool == NULL:
            raise ValueError(f"{self.name}: closed")
        self.start_threads()
        return FileChannel(self)

    def actual_bytes(self) -> int:
        return self.image.actual_bytes()

    def start_threads(self):
        # With the first channel: a disk that nobody opened has none.
        with self.lock:
            for number in range(len(self.threads), THREADS):
                thread = threading.Thread(target=run, args=(<uint64_t>self.pool, number),
                                          daemon=True)
                thread.start()
                self.threads.append(thread)

    def close(self) -> None:
        """Ends the threads once they have done what is queued; idempotent.

        One that hangs in the kernel is left behind, with the file still open.
        """
        if self.stop():
            self.image.close()

    cdef bint stop(self):
        cdef Pool *pool = self.pool
        if pool == NULL:
            return self.stopped
        self.pool = NULL
        pthread_mutex_lock(&pool.lock)
        pool.stopping = 1
        pthread_cond_broadcast(&pool.wanted)
        pthread_mutex_unlock(&pool.lock)
        with self.lock:
            for thread in self.threads:
                thread.join(JOIN_S)
            stuck = sum(thread.is_alive() for thread in self.threads)
            self.threads.clear()
        if stuck:
            log.error("%s: %d requests hang in the kernel; the file stays open", self.name, stuck)
            return False
        pthread_cond_destroy(&pool.wanted)
        pthread_mutex_destroy(&pool.lock)
        free(pool)
        self.stopped = True
        return True


@cython.final
cdef class FileChannel(DoneChannel):
    def __cinit__(self, FileStorage storage not None):
        self.storage = storage
        self.pool = storage.pool

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        cdef Pool *pool = self.pool
        cdef int i
        cdef uint32_t wake
        for i in range(count):
            burst[i].home = self.done
            burst[i].next = burst[i + 1] if i + 1 < count else NULL
        if count == 0:
            return 0
        pthread_mutex_lock(&pool.lock)
        pool.last[0] = burst[0]
        pool.last = &burst[count - 1].next
        wake = min(pool.waiting, <uint32_t>count)
        pthread_mutex_unlock(&pool.lock)
        while wake > 0:
            pthread_cond_signal(&pool.wanted)
            wake -= 1
        return count
