"""What calls to the drivers behind one socket cost us: dear ones are left out.

A write to an eventfd, or to a Unix socket, wakes all that watch it. A front-end can have it
watched by very many epolls, and each call then takes milliseconds of the worker that makes it,
which are its neighbours'. It is the processor time that counts: a worker that was displaced by
somebody is nobody's fault. As that takes a system call to measure, a call is measured only for
some time after one that took long.

A hypervisor may steal time that looks like ours. So a call that was dear is forgiven when the
next one to the same fd is not; several in a row are not, nor those before a change of the fd.
"""
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

from vhostpy.system.hw cimport ticks, ticks_per_us
from vhostpy.system.suspicion cimport longer

cdef enum:
    DEAR_US = 500

cdef double ticks_a_us = 0


cdef uint64_t thread_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
    return <uint64_t>now.tv_sec * 1_000_000_000 + <uint64_t>now.tv_nsec


cdef bint begin_call(CallCosts *costs, Call *call) noexcept nogil:
    call.since = ticks()
    call.measured = costs.span != 0
    if not call.measured:
        return True
    if call.since < costs.until:
        if costs.dear >= DEAR_CALLS:
            costs.left_out += 1
            return False
    elif call.since - costs.until > costs.span:
        costs.span = costs.dear = 0     # it was good for as long as it was suspected
        call.measured = False
        return True
    call.cpu_ns = thread_ns()
    return True


cdef bint end_call(CallCosts *costs, const Call *call, uint16_t *dear,
                   bint arrived) noexcept nogil:
    cdef uint64_t end = ticks(), took = end - call.since, cpu_ns
    if not call.measured:
        if took > costs.dear_ticks:
            costs.span = longer(0, took)
            costs.until = end + costs.span
        return False
    cpu_ns = thread_ns() - call.cpu_ns
    if took <= costs.dear_ticks or cpu_ns <= costs.dear_ns:
        if arrived:
            if dear[0] == 1 and 0 < costs.dear < DEAR_CALLS:
                costs.dear -= 1
            dear[0] = 0
        return False
    dear[0] = min(dear[0] + 1, 2)
    costs.last_ns = cpu_ns
    costs.dear = min(costs.dear + 1, <int32_t>DEAR_CALLS)
    costs.span = longer(costs.span if costs.dear == DEAR_CALLS else 0, took)
    costs.until = end + costs.span
    if costs.dear < DEAR_CALLS:
        return False
    costs.stops += 1
    return True


cdef class Calls:
    """What the calls to one socket's drivers have cost; `dear_us` is too much for one."""

    def __init__(self, *, int dear_us=DEAR_US):
        global ticks_a_us
        if ticks_a_us == 0:
            ticks_a_us = ticks_per_us()
        self.rate = ticks_a_us
        self.costs.dear_ticks = <uint64_t>(dear_us * self.rate)
        self.costs.dear_ns = <uint64_t>dear_us * 1000

    @property
    def left_out(self) -> int:
        """Calls that were not made since they would have been dear."""
        return self.costs.left_out

    @property
    def pause_s(self) -> float:
        """For how long none will be made; 0: they are made."""
        cdef uint64_t now = ticks()
        if self.costs.dear < DEAR_CALLS or now >= self.costs.until:
            return 0.0
        return (self.costs.until - now) / self.rate / 1e6

    @property
    def dear_ms(self) -> float:
        """What the last dear one took of our processor time."""
        return self.costs.last_ns / 1e6

    def is_news(self) -> bool:
        """Whether it was decided to make none, since this was asked before."""
        cdef uint64_t stops = self.costs.stops
        news = stops != self.said
        self.said = stops
        return news
