"""Worker threads: poll loops without the GIL, adaptive sleep, quiescence.

A worker knows things that can be polled; it knows no device, ring or message.
"""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from vhostpy._ring cimport Scratch

cdef struct Turn:
    # What one poll may use. A poll stops at the first budget that reaches zero and
    # leaves the rest for its next turn, so that no turn takes longer than about 200 us.
    Scratch *scratch       # the poll resets `used` to 0 when it starts
    uint64_t now           # ticks() when the turn started
    int32_t frames         # output frames (copies of a flood count each) or requests
    int64_t bytes          # output bytes
    int worker             # index of the worker

cdef class Pollable:
    # Something that a worker polls. All three run on the worker's thread.
    cdef int poll(self, Turn *turn) noexcept nogil
    # Does at most a turn of work. Returns > 0 if it did or still has some, 0 when idle.
    cdef bint arm(self) noexcept nogil
    # Idle for a while: ask for a kick. True: work is there already, do not sleep.
    cdef void disarm(self) noexcept nogil
    # Polled again: no kicks needed.
    cdef int slot          # control's: place in its worker's table; -1 when in none
    cdef uint64_t busy_at  # worker's: ticks() of the last poll that found work
    cdef bint parked       # worker's

cdef struct Table          # private to worker.pyx: what a worker polls

# Written by the worker only, read by control at any time.
cdef struct Load:
    uint64_t turns
    uint64_t busy_turns        # that found work
    uint64_t busy_ticks        # spent in polls that found work
    uint64_t total_ticks       # since start, sleep included
    uint64_t sleeps

cdef class Worker:
    cdef readonly int index
    cdef readonly object name
    cdef Table *table
    cdef uint64_t epoch         # odd: in a turn; even: quiescent
    cdef Load load
    cdef uint32_t stopping
    cdef uint32_t nudged
    cdef int epoll_fd
    cdef int wake_fd
    cdef Scratch scratch
    cdef uint64_t spin_ticks
    cdef bint may_sleep
    cdef bint busy
    cdef object thread
    cdef list pollables
    cdef object cpu

cdef class Workers:
    # All workers of the process: one quiescence domain.
    cdef readonly list workers
    cdef void wait_quiescent(self) noexcept nogil
