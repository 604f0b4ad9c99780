"""Worker threads: poll loops without the GIL, adaptive sleep, quiescence.

A worker knows things that can be polled; it knows no device, ring or message.
"""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from vhostpy._ring cimport Scratch

cdef enum:
    # A poll's budget. 512 KiB copy in about 50 us, 256 small frames take less than
    # that: a turn that spends it all stays well below 200 us.
    BUDGET_FRAMES = 256
    BUDGET_BYTES = 524288

cdef struct Turn:
    # What one poll may use. A poll stops at the first budget that reaches zero and
    # leaves the rest for its next turn, so that no turn takes longer than about 200 us.
    Scratch *scratch       # the poll resets `used` to 0 when it starts
    uint64_t now           # ticks() when the poll started
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
    cdef object home       # control's: the Worker whose table it is in, or None
    cdef uint64_t busy_at  # worker's: ticks() of the last poll that found work
    cdef bint parked       # worker's

cdef struct Table          # private to worker.pyx: what a worker polls

# Written by the worker only, read by control at any time.
cdef struct Load:
    uint64_t turns
    uint64_t busy_turns        # that found work
    uint64_t busy_polls        # polls that found work
    uint64_t busy_ticks        # spent in them
    uint64_t items             # of Turn.frames, used by them: packets sent on, or requests
    uint64_t sleeps

cdef class Worker:
    cdef readonly int index
    cdef readonly str name
    cdef readonly object cpu        # pinned there, or None
    # Published by control, read by the worker.
    cdef Table *table
    cdef uint32_t nudged
    cdef uint32_t stopping
    cdef int epoll_fd
    cdef int wake_fd
    cdef bint may_sleep
    cdef uint64_t idle_ticks        # a pollable that found nothing for that long parks
    cdef uint64_t look_ticks        # between two looks at epoll while something is active
    cdef uint64_t turn_ticks        # a turn that takes longer is cut after the current poll
    # The worker's.
    cdef uint64_t epoch             # odd: in a turn; even: quiescent
    cdef Load load
    cdef Scratch scratch
    cdef int active_count           # of table.active
    cdef int cursor                 # where a turn that was cut goes on
    cdef long tid
    # Control's.
    cdef object thread
    cdef list pollables             # by slot; keeps alive what the table borrows
    cdef dict watched               # pollable -> its fds
    cdef uint32_t next_serial
    cdef uint64_t generation
    cdef uint64_t started_ticks
    cdef Load shown                 # at the last loads()
    cdef uint64_t shown_ticks

    cdef void loop(self) noexcept nogil
    cdef int turn(self, Table *table) noexcept nogil
    cdef void activate_all(self, Table *table) noexcept nogil
    cdef void activate(self, Table *table, uint64_t event) noexcept nogil
    cdef void wake(self) noexcept nogil
    cdef void wait_turn(self) noexcept nogil
    cdef Table *new_table(self, uint32_t slots) except NULL
    cdef Table *publish(self, Pollable added, uint32_t serial) except NULL
    cdef watch_fd(self, int fd, uint64_t data)
    cdef unwatch_fd(self, int fd)
    cdef close_fds(self)

cdef class Workers:
    # All workers of the process: one quiescence domain.
    cdef object __weakref__
    cdef readonly list workers
    cdef readonly str poll
    cdef readonly int attention_fd      # eventfd by which workers wake control
    cdef void **members                 # the same, without the GIL
    cdef int count
    cdef object lock
    cdef int pid
    cdef bint running
    cdef void wait_quiescent(self) noexcept nogil
    cdef void attention(self) noexcept nogil
