"""Signals to fds that somebody else holds too: none waits for long."""

cdef enum:
    BLOCKS = 0              # it would have waited, and was interrupted; do not try again
    SIGNALLED = 1
    NOT_TAKEN = 2           # it was full, and so is readable, or nobody hears it

cdef int signal_eventfd(int fd) noexcept nogil
# Adds one.

cdef int signal_socket(int fd) noexcept nogil
# Sends a Unix socket the eight bytes that an eventfd would give its reader. Never BLOCKS.

cdef void sound_bell() noexcept nogil
# Wakes control: a ring broke, or its call fd blocks.

cdef void start_watchdog() noexcept nogil
# Once a process; again after a fork.

cdef void interrupt_thread(long tid) noexcept nogil
# A system call that the thread waits in returns EINTR.

cdef void only_faults_and_interrupts() noexcept nogil
# For a thread that touches guest memory: all other signals are the main thread's.
