"""A disk in a file or on a block device, by a pool of threads."""
from libc.stdint cimport uint32_t, uint64_t

from vhostpy.backends.storage.completions cimport DoneChannel, pthread_mutex_t
from vhostpy.backends.storage.storage cimport Request, Storage

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass

# What threads share: plain C, so that a thread that hangs can outlive its objects.
cdef struct Pool:
    pthread_mutex_t lock
    pthread_cond_t wanted
    Request *first
    Request **last
    uint32_t waiting        # threads
    uint32_t stopping
    int fd
    int flush_error         # sticky: the kernel reports a lost write only once
    bint is_device
    bint no_discard         # BLKDISCARD's answer, found out by trying
    bint no_punch           # fallocate's answers, found out by trying
    bint no_zero_range
    uint64_t failed_flushes

cdef class FileStorage(Storage):
    cdef object image
    cdef Pool *pool
    cdef bint stopped
    cdef list threads
    cdef object lock
    cdef bint stop(self)
    # Ends the threads; False: one hangs, and the file has to stay open. Idempotent.

cdef class FileChannel(DoneChannel):
    cdef FileStorage storage        # its threads, and so the pool, outlive the channel
    cdef Pool *pool
