"""Which io_uring this kernel has, and how a channel's ring is set up for it."""
from libc.errno cimport EINVAL
from libc.string cimport memset

from vhostpy.backends.storage.liburing cimport (
    IORING_OP_FALLOCATE, IORING_OP_FSYNC, IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE,
    IORING_OP_WRITEV, IORING_SETUP_COOP_TASKRUN, IORING_SETUP_DEFER_TASKRUN,
    IORING_SETUP_R_DISABLED, IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_SUBMIT_ALL,
    IORING_SETUP_TASKRUN_FLAG, io_uring, io_uring_free_probe, io_uring_get_probe_ring,
    io_uring_opcode_supported, io_uring_params, io_uring_probe, io_uring_queue_exit,
    io_uring_queue_init_params,
)

import os

from vhostpy.errors import VhostpyError


class UringUnavailable(VhostpyError):
    """This kernel, or its configuration, has no io_uring for us."""


cdef enum:
    SETUPS_COUNT = 3

cdef unsigned int[SETUPS_COUNT] SETUPS
# In the order of preference: 6.1, 5.19, older. With DEFER_TASKRUN the thread that enables
# the ring is the only one that may use it: the worker does that with its first poll.
SETUPS[0] = (IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG
             | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_R_DISABLED)
SETUPS[1] = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL
SETUPS[2] = 0


def choose_setup() -> int:
    """Which of the setups this kernel has. Raises UringUnavailable."""
    cdef io_uring ring
    cdef io_uring_params params
    cdef io_uring_probe *probe
    cdef int result = 0
    cdef int i
    for i in range(SETUPS_COUNT):
        memset(&params, 0, sizeof(params))
        params.flags = SETUPS[i]
        result = io_uring_queue_init_params(2, &ring, &params)
        if result == 0:
            break
        if result != -EINVAL:
            raise UringUnavailable(os.strerror(-result))
    else:
        raise UringUnavailable(os.strerror(-result))
    probe = io_uring_get_probe_ring(&ring)
    good = probe != NULL and all(io_uring_opcode_supported(probe, op) for op in (
        IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC,
        IORING_OP_FALLOCATE))
    if probe != NULL:
        io_uring_free_probe(probe)
    io_uring_queue_exit(&ring)
    if not good:
        raise UringUnavailable("the kernel is too old, 5.6 is needed")
    return i


cdef unsigned int setup_flags(int setup) noexcept nogil:
    return SETUPS[setup]
