"""Waking a worker in time."""
from libc.stdint cimport int64_t

cdef int open_timer() except -1
# An fd that set_timer() makes readable; close() it.
cdef void set_timer(int fd, int64_t wait_ns) noexcept nogil
# In `wait_ns` > 0; instead of what was set before.
