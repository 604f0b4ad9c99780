"""Timers that a worker's epoll can wait for; its own timeout has milliseconds."""
from libc.errno cimport errno
from libc.stdint cimport int64_t
from libc.string cimport memset
from posix.time cimport itimerspec

import os

cdef extern from "<sys/timerfd.h>" nogil:
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new, itimerspec *old)
    int TFD_CLOEXEC, TFD_NONBLOCK, CLOCK_MONOTONIC


cdef int open_timer() except -1:
    cdef int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    return fd


cdef void set_timer(int fd, int64_t wait_ns) noexcept nogil:
    cdef itimerspec when
    memset(&when, 0, sizeof(when))
    when.it_value.tv_sec = wait_ns // 1_000_000_000
    when.it_value.tv_nsec = wait_ns % 1_000_000_000
    timerfd_settime(fd, 0, &when, NULL)
