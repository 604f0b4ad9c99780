"""What two processors cost each other: the limits of any device on a core of its own.

A cache line that the other processor has just written is the limit of all copying: no device
is faster than the lines that it must fetch; `bench/peers/lines.py` counts them for a frame.
The time in which the other processor wakes a thread is the limit of a device that sleeps.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix cimport unistd

from vhostpy.system.hw cimport (
    aligned_alloc, cpu_pause, fence_full, load_acquire_u32, load_acquire_u64, read_once_u64,
    store_release_u32, store_release_u64, ticks, ticks_after_loads, ticks_per_us,
    write_once_u64,
)

import os
import threading
from contextlib import suppress
from statistics import median

BEGIN_S = 10               # a processor that is busy lets a thread begin sooner

cdef enum:
    LINES = 256
    LINE = 64
    ROUNDS = 24
    WARM = 4               # rounds that are not counted
    WRITER = 0
    READER = 1
    NOBODY = 2
    WAKES = 100
    REST_US = 1000         # longer than a processor looks for work before it halts


cdef class Line:
    """Lines that a writer fills and a reader reads, or overwrites, in turns."""
    cdef uint8_t *lines
    cdef uint64_t *order           # lines as they are read
    cdef uint64_t *costs           # of each round, in ticks
    cdef uint32_t turn
    cdef bint dependent
    cdef bint overwritten

    def __cinit__(self, *, bint dependent=False, bint in_a_row=False, bint overwritten=False):
        cdef int i
        self.dependent, self.overwritten = dependent, overwritten
        self.lines = <uint8_t *>aligned_alloc(LINE, LINES * LINE)
        self.order = <uint64_t *>calloc(LINES, sizeof(uint64_t))
        self.costs = <uint64_t *>calloc(ROUNDS, sizeof(uint64_t))
        if self.lines == NULL or self.order == NULL or self.costs == NULL:
            raise MemoryError
        from random import Random

        order = list(range(LINES))
        if not in_a_row:
            Random(1).shuffle(order)
        for i in range(LINES):
            self.order[i] = order[i]

    def __dealloc__(self):
        free(self.lines)
        free(self.order)
        free(self.costs)

    cdef bint wait(self, uint32_t whose) noexcept nogil:
        cdef uint32_t turn = load_acquire_u32(&self.turn)
        while turn != whose and turn != NOBODY:
            cpu_pause()
            turn = load_acquire_u32(&self.turn)
        return turn == whose

    cdef void write(self) noexcept nogil:
        cdef int i
        while self.wait(WRITER):
            # Each line names the next, for a reader that follows them.
            for i in range(LINES):
                write_once_u64(self.lines + self.order[i] * LINE,
                               self.order[(i + 1) % LINES] * LINE)
            store_release_u32(&self.turn, READER)

    cdef uint64_t read(self) noexcept nogil:
        cdef uint64_t start, at, total = 0
        cdef int _i, i, i_round
        for i_round in range(ROUNDS):
            self.wait(READER)
            start = ticks()
            if self.dependent:
                at = self.order[0] * LINE
                for _i in range(LINES):
                    at = read_once_u64(self.lines + at)
                total += at
            elif self.overwritten:
                # All of each, as a copy does. They wait in the store buffer until the line is
                # ours, and the fence for them.
                for i in range(LINES):
                    memcpy(self.lines + self.order[i] * LINE, self.order, LINE)
                fence_full()
            else:
                for i in range(LINES):
                    total += read_once_u64(self.lines + self.order[i] * LINE)
            # As many loads as the processor holds at once would else not be counted: of 256
            # that is half of them.
            self.costs[i_round] = ticks_after_loads() - start
            # Never both: a writer that saw its turn would write over the end.
            store_release_u32(&self.turn, WRITER if i_round + 1 < ROUNDS else NOBODY)
        return total

    def run(self, int writer_cpu, int reader_cpu) -> float:
        """Ticks a line, the median of the rounds."""
        cdef int i

        def writing():
            with nogil:
                self.write()

        def reading():
            with nogil:
                self.read()

        on_both((writer_cpu, writing), (reader_cpu, reading), real_time=True)
        return median([self.costs[i] for i in range(WARM, ROUNDS)]) / LINES


cdef class Bell:
    """A thread that sleeps until another wakes it, again and again."""
    cdef int fd                    # an eventfd
    cdef uint64_t woken_at         # in ticks; 0 while it sleeps
    cdef uint64_t[WAKES] costs

    cdef void sleep(self) noexcept nogil:
        cdef uint64_t rings
        cdef int _i
        for _i in range(WAKES):
            while unistd.read(self.fd, &rings, sizeof(rings)) != sizeof(rings):
                pass                # interrupted
            store_release_u64(&self.woken_at, ticks())

    cdef void ring(self, uint64_t rest) noexcept nogil:
        cdef uint64_t start = ticks(), one = 1
        cdef int i
        for i in range(WAKES):
            while ticks() - start < rest:
                cpu_pause()
            self.woken_at = 0       # the other one reads the eventfd before it writes this
            start = ticks()
            unistd.write(self.fd, &one, sizeof(one))
            while load_acquire_u64(&self.woken_at) == 0:
                cpu_pause()
            self.costs[i] = self.woken_at - start

    def run(self, int waker_cpu, int sleeper_cpu) -> float:
        """Microseconds from before the call that wakes until the other runs, the median."""
        cdef double rate = ticks_per_us()
        cdef int i

        def ringing():
            with nogil:
                self.ring(<uint64_t>(REST_US * rate))

        def sleeping():
            with nogil:
                self.sleep()

        self.fd = os.eventfd(0)
        try:
            on_both((waker_cpu, ringing), (sleeper_cpu, sleeping))
        finally:
            os.close(self.fd)
        return median([self.costs[i] for i in range(WAKES)]) / rate


def on_both(one, other, *, bint real_time=False) -> None:
    """Runs two (CPU, function), each on its CPU at the same time; `real_time`: whatever else
    runs there waits meanwhile, where we are allowed to say so."""
    barrier = threading.Barrier(2, timeout=BEGIN_S)
    errors = []

    def run(cpu, work):
        # Neither may wait for one that could not begin.
        try:
            os.sched_setaffinity(0, {cpu})
            if real_time:
                with suppress(PermissionError):
                    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            barrier.wait()
        except Exception as error:
            errors.append(error)
            barrier.abort()
        else:
            work()

    threads = [threading.Thread(target=run, args=each) for each in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))


def line_cost(writer_cpu: int, reader_cpu: int) -> dict:
    """Ticks for a line of another processor: of many that lie in a row, as in a long frame;
    of many that lie anywhere, as with short ones; to overwrite those; and where each says
    where the next is. Both are busy with that for some milliseconds, before all else if we
    may have a real-time class (CAP_SYS_NICE).
    """
    ways = {
        "line_ticks_in_a_row": Line(in_a_row=True),
        "line_ticks": Line(),
        "line_ticks_overwritten": Line(overwritten=True),
        "line_ticks_dependent": Line(dependent=True),
    }
    return {name: line.run(writer_cpu, reader_cpu) for name, line in ways.items()}


def wake_cost(waker_cpu: int, sleeper_cpu: int) -> dict:
    """Microseconds until a thread runs that slept for a millisecond, as a device that rests."""
    return {"wake_us": Bell().run(waker_cpu, sleeper_cpu)}
