"""What a disk's device and a storage say to each other: ranges, bytes, iovecs.

Speaks of no virtio: other device types stand on the same interface.
"""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from posix.uio cimport iovec

cpdef enum Op:
    READ = 0
    WRITE = 1
    FLUSH = 2              # all writes completed before are on stable storage after it
    DISCARD = 3            # contents become undefined
    WRITE_ZEROES = 4
    SECURE_ERASE = 5       # no copy is left where it was stored; durable when it is done

cdef enum:
    REQUEST_UNMAP = 1      # write-zeroes may deallocate

cdef struct Request:
    # Owned by the caller, from submit() until poll() hands it back.
    uint64_t offset        # bytes
    uint64_t size          # bytes; for READ and WRITE the sum of the iovecs
    # Guest memory; stays mapped while the request is under way. The list comes back as
    # it was, whatever a storage does to it in between.
    iovec *iov
    int32_t iov_count
    int32_t op             # Op
    int32_t flags
    int32_t result         # 0, or a negative errno: set before it is handed back
    void *owner            # the caller's
    Request *next          # the storage's, while it has the request
    void *home             # the storage's, likewise

cdef class Storage:
    # What a disk is made of. Ranges are checked by the caller against `size_bytes`.
    cdef readonly object name            # for people: 'file disk.img', 'null 1T', ...
    cdef readonly uint64_t size_bytes
    cdef readonly uint32_t block_size    # smallest write that is not read-modify-write, bytes
    cdef readonly bint read_only
    cdef readonly bint can_discard
    cdef readonly bint can_write_zeroes
    cdef readonly bint can_secure_erase
    cdef readonly uint32_t erase_alignment   # of SECURE_ERASE, bytes; 0: that of a block

cdef class Channel:
    # One user's queue into a storage: used by one worker, never shared. Asynchronous:
    # completions come by poll(), in any order, also when submit() could finish at once.
    cdef int submit(self, Request **burst, int count) noexcept nogil
    # Starts requests, in order; returns how many it took (a full queue takes fewer).
    cdef int poll(self, Request **done, int limit) noexcept nogil
    # Completed requests, up to `limit`.
    cdef bint arm(self) noexcept nogil
    # Before sleeping: completion_fd becomes readable when there is something to poll.
    # True: there is already.
    cdef void disarm(self) noexcept nogil
    cdef readonly int completion_fd      # -1: requests complete within submit()
