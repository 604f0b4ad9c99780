"""What a worker polls, and what one poll may use."""
from libc.stdint cimport int32_t, int64_t, uint64_t
from vhostpy.ring.chain cimport Scratch

cdef enum:
    # A poll's budget. 512 KiB copy in about 50 us, 256 small frames take less than
    # that: a turn that spends it all stays well below 200 us.
    BUDGET_FRAMES = 256
    BUDGET_BYTES = 524288
    # As many as one pop() walks: some 50 us, most of it cache misses.
    BUDGET_STEPS = 4096

cdef struct Turn:
    # What one poll may use. A poll stops at the first budget that reaches zero and
    # leaves the rest for its next turn, so that no turn takes longer than about 200 us.
    Scratch *scratch       # the poll resets what is used of it when it starts
    uint64_t now           # ticks() when the poll started
    int32_t frames         # output frames (copies of a flood count each) or requests
    int64_t bytes          # output bytes
    int32_t steps          # descriptors of chains that had to be walked
    uint64_t lock_ticks    # how long to wait for what other workers lock; 0: there are none
    bint apart             # of a worker for those whose memory is slow
    int worker             # index of the worker

cdef class Conduct:
    # How the memory of one device has behaved: it outlives the device's rings. Written by
    # the workers that poll them: what one of them loses by another does not matter.
    cdef uint64_t until    # ticks(): it is suspected for so long
    cdef uint64_t span     # how long that is
    cdef bint apart        # control's: its rings are polled apart
    cdef readonly str name
    cdef bint strike(self, uint64_t since, uint64_t end) noexcept nogil
    # A poll was blocked. True: once again.

cdef class Pollable:
    # Something that a worker polls. All three run on the worker's thread.
    cdef int poll(self, Turn *turn) noexcept nogil
    # Does at most a turn of work. Returns > 0 if it did or still has some, 0 when idle.
    cdef bint arm(self) noexcept nogil
    # Idle for a while: ask for a kick. True: work is there already, do not sleep.
    cdef void disarm(self) noexcept nogil
    # Polled again: no kicks needed.
    cdef bint stalled(self, uint64_t since, uint64_t end) noexcept nogil
    # A poll of it was blocked for that time. True: by what is its own, again: it has to go.
    cdef Conduct conduct   # its device's
    cdef bint under_way    # poll's: work that it has begun will end by itself, without a kick
    cdef int slot          # control's: place in its worker's table; -1 when in none
    cdef object home       # control's: the Worker whose table it is in, or None
    cdef uint64_t busy_at  # worker's: ticks() of the last poll that found work
    cdef bint parked       # worker's
    cdef bint banned       # worker's, until control has moved it: not polled any more
