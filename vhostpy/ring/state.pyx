"""What an end of a virtqueue does, however the ring is laid out: logs and notifies."""
from vhostpy.system.calls cimport Call, begin_call, end_call
from vhostpy.system.hw cimport fence_full, unlikely
from vhostpy.memory.guest cimport log_mark
from vhostpy.system.notify cimport BLOCKS, SIGNALLED, sound_bell, signal_eventfd, signal_socket

# Our own invariant; sizeof is a constant, so this costs nothing but says it early.
assert sizeof(WorkerSide) == 64 and sizeof(ControlSide) == 64


cdef void log_flush(Ring *ring) noexcept nogil:
    cdef uint32_t i
    if ring.worker.logged:
        fence_full()
        for i in range(ring.worker.logged):
            log_mark(ring.control.log, ring.ranges[i].gpa, ring.ranges[i].length)
        ring.worker.logged = 0


cdef void log_collect(Ring *ring, uint64_t gpa, uint64_t length) noexcept nogil:
    cdef LoggedRange *last
    if ring.worker.logged:
        last = &ring.ranges[ring.worker.logged - 1]
        if last.gpa + last.length == gpa:
            last.length += length
            return
        if ring.worker.logged == LOGGED_RANGES:
            log_flush(ring)
    ring.ranges[ring.worker.logged].gpa = gpa
    ring.ranges[ring.worker.logged].length = length
    ring.worker.logged += 1


cdef void call_driver(Ring *ring) noexcept nogil:
    # Whoever received the fd has made it O_NONBLOCK: a hostile counter is full, and the
    # write fails. Any failure is the other end's own: it is the one who hears nothing.
    cdef Call call
    cdef int how
    if ring.control.call_fd < 0 or ring.worker.deaf:
        return
    if unlikely(not begin_call(ring.costs, &call)):
        return
    ring.worker.calls += 1
    if unlikely(ring.control.call_is_socket):
        how = signal_socket(ring.control.call_fd)
    else:
        how = signal_eventfd(ring.control.call_fd)
        if unlikely(how == BLOCKS):
            ring.worker.deaf = 1
            sound_bell()
    if unlikely(end_call(ring.costs, &call, &ring.worker.dear_calls, how == SIGNALLED)):
        sound_bell()


cdef void break_ring(Ring *ring) noexcept nogil:
    break_ring_for(ring, BROKEN_INDEXES)


cdef void break_ring_for(Ring *ring, uint32_t why) noexcept nogil:
    ring.worker.broken = why
    sound_bell()
