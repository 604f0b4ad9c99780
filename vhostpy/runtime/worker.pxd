"""One worker: what its thread and control know of each other."""
from libc.stdint cimport uint32_t, uint64_t
from vhostpy.ring.chain cimport Scratch
from vhostpy.runtime.pollable cimport Pollable, Turn

cdef void signal_fd(int fd) noexcept nogil
# Adds one to an eventfd of ours; of others' see notify.

cdef struct Table          # private to _worker.pyx: what a worker polls

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
    cdef int timer_fd               # wakes it to look at what rests
    cdef bint may_sleep
    cdef bint shared                # there are others: what several reach is locked
    cdef bint apart                 # for those whose memory is slow
    cdef uint64_t stall_ticks       # a poll that lasts so long has been blocked, perhaps
    cdef uint64_t idle_ticks        # a pollable that found nothing for that long parks
    cdef uint64_t look_ticks        # between two looks at epoll while something is active
    cdef uint64_t rest_ticks        # between two looks at what rests, at most,
    cdef uint64_t long_ticks        # unless it has rested for that long
    cdef uint64_t turn_ticks        # a turn that takes longer is cut after the current poll
    # The worker's.
    cdef uint64_t epoch             # odd: in a turn; even: quiescent
    cdef Load load
    cdef Scratch scratch
    cdef int active_count           # of table.active
    cdef int resting_count          # at its end
    cdef uint64_t rested_until      # ticks() when they are looked at
    cdef int cursor                 # where a turn that was cut goes on
    cdef uint64_t found_at          # ticks() of the last turn that found work
    # When nothing was found for that long, those park that have work under way.
    cdef uint64_t spin
    cdef uint64_t spin_limit
    cdef long switches              # voluntary ones of the thread, its own sleeps aside
    cdef bint slept_under_way       # one of them has, since the last sleep
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
    cdef void learn_from_sleep(self) noexcept nogil
    cdef bint idles(self, Pollable pollable, uint64_t now, bint spun) noexcept nogil
    cdef void rest(self, Table *table, int at, uint64_t now) noexcept nogil
    cdef void look_at_resting(self, Table *table) noexcept nogil
    cdef void set_alarm(self) noexcept nogil
    cdef void look_at_stall(self, Table *table, uint32_t slot, uint64_t since,
                            uint64_t end) noexcept nogil
    cdef void ban(self, Table *table, uint32_t slot) noexcept nogil
    cdef void activate_slot(self, Table *table, uint32_t slot) noexcept nogil
    cdef void activate_all(self, Table *table) noexcept nogil
    cdef void activate(self, Table *table, uint64_t event) noexcept nogil
    cdef void wake(self) noexcept nogil
    cdef void wait_turn(self) noexcept nogil
    # Returns when the turn that may be under way has ended.

    cdef start(self)
    cdef ask_to_stop(self)
    cdef join(self)
    cdef nudge(self)
    cdef dict report(self)
    # All four return the table that was in use before: free it after quiescence.
    cdef Table *add(self, Pollable pollable, list fds) except NULL
    cdef Table *remove(self, Pollable pollable) except NULL
    cdef Table *watch(self, Pollable pollable, int fd) except NULL
    cdef Table *unwatch(self, Pollable pollable, int fd) except NULL
    cdef Table *new_table(self, uint32_t slots) except NULL
    cdef Table *publish(self, Pollable added, uint32_t serial) except NULL
    cdef watch_fd(self, int fd, uint64_t data)
    cdef unwatch_fd(self, int fd)
    cdef close_fds(self)
