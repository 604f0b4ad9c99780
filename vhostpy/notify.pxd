"""Signals to eventfds that somebody else holds too: none waits for long."""

cdef bint signal_eventfd(int fd) noexcept nogil
# Adds one. False: it would have waited, and was interrupted; do not try again.

cdef void ask_for_a_look() noexcept nogil
# Wakes control: a ring broke, or its call fd blocks.

cdef void start_watchdog() noexcept nogil
# Once a process; again after a fork.

cdef int interrupt_number() noexcept nogil
# The signal that stops a system call which waits. Threads must not block it.
