"""Worker threads: all of them, who polls what, quiescence.

A worker (`worker.pyx`) polls without the GIL and sleeps adaptively. Here is what control
does with them: it starts and stops them, hands pollables over, and waits until none of
them can still see what it took away.
"""
import atexit
import os
import threading
import weakref

from libc.errno cimport errno
from libc.stdlib cimport calloc, free
from posix.unistd cimport close

from vhostpy.system.hw cimport fence_full, ticks
from vhostpy.system.linux cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd
from vhostpy.runtime.worker cimport Table, Worker, signal_fd
from vhostpy.system.notify cimport start_watchdog

from vhostpy.errors import ConfigError

POLL_MODES = ("adaptive", "busy", "interrupt")

cdef object started = weakref.WeakSet()


@atexit.register
def _stop_all():
    # No worker may run while the interpreter takes its objects apart.
    for workers in list(started):
        workers.stop()


cdef class Workers:
    """All workers of the process. Methods are control's; one quiescence domain."""

    def __cinit__(self, int count=1, *, str poll="adaptive", cpus=None, int spin_us=50):
        if count < 1:
            raise ConfigError(f"{count} workers", hint="give at least one")
        if poll not in POLL_MODES:
            raise ConfigError(f"poll mode {poll!r}", hint=f"one of {', '.join(POLL_MODES)}")
        if spin_us < 0:
            raise ConfigError(f"spin of {spin_us} us", hint="0 or more")
        self.poll = poll
        self.lock = threading.Lock()
        self.workers = []
        self.members = <void **>calloc(count + 1, sizeof(void *))
        if self.members == NULL:
            raise MemoryError
        self.bell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.bell_fd < 0:
            raise OSError(errno, os.strerror(errno))
        for index, cpu in enumerate(choose_cpus(count, poll, cpus)):
            worker = Worker(index, poll=poll, cpu=cpu, spin_us=spin_us)
            self.workers.append(worker)
            self.members[index] = <void *>worker
        self.count = self.regular = count
        for worker in self.workers:
            (<Worker>worker).shared = count > 1

    def __dealloc__(self):
        if self.members != NULL:    # else it was refused, and its fd is still 0
            close(self.bell_fd)
            free(self.members)

    def start(self) -> None:
        """Starts the threads."""
        cdef Worker worker
        if self.running:
            return
        start_watchdog()
        self.pid = os.getpid()
        self.running = True
        started.add(self)
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        """Ends the threads and waits for them. Final; idempotent."""
        cdef Worker worker
        started.discard(self)
        if self.running and os.getpid() == self.pid:
            for worker in self.workers:
                worker.ask_to_stop()
            for worker in self.workers:
                worker.join()
        self.running = False
        for worker in self.workers:
            worker.thread = None
            worker.close_fds()

    def add(self, Pollable pollable not None, fds=(), worker: int | None = None) -> int:
        """Polls it from now on, on the least loaded worker unless told; returns which.

        `fds` become readable when a parked pollable must be polled again; with none it is
        looked at from time to time.
        """
        cdef Worker home
        cdef Table *old = NULL
        if pollable.home is not None:
            raise ValueError("already polled")
        if worker is not None and not 0 <= worker < self.count:
            raise ValueError(f"worker {worker} of {self.count}")
        with self.lock:
            if worker is not None:
                home = self.workers[worker]
            elif pollable.conduct.apart and ticks() < pollable.conduct.until:
                home = self.quarantine()    # its device's rings before were slow
            else:
                pollable.conduct.apart = False
                home = min(self.workers[:self.regular], key=load_of)
            old = home.add(pollable, [int(fd) for fd in fds])
        self.free_unused(old)
        return home.index

    def isolate(self) -> list[str]:
        """Moves those that have blocked a worker to one of their own; their devices' names.

        Wanted by a worker: it asks for a look, and polls them no more. They share one: what
        one of them waits for, the others wait for, but nobody else does.
        """
        cdef Worker home, away
        cdef Pollable pollable
        cdef Table *old = NULL
        moved = []
        for home in self.workers[:self.regular]:
            for pollable in list(home.watched):
                if not pollable.banned:
                    continue
                # All of it under the lock: whoever removes it meanwhile must find it.
                with self.lock:
                    if pollable.home is not home:
                        continue
                    away = self.quarantine()
                    fds = home.watched[pollable]
                    old = home.remove(pollable)
                    self.free_unused(old)
                    pollable.conduct.apart = True
                    old = away.add(pollable, fds)
                self.free_unused(old)
                moved.append(pollable.conduct.name)
        return moved

    def wants_isolation(self) -> bool:
        """Whether there are some that isolate() would move."""
        return any((<Pollable>pollable).banned for home in self.workers[:self.regular]
                   for pollable in list((<Worker>home).watched))

    cdef Worker quarantine(self):
        """The worker for those whose memory is slow; made when the first one is."""
        cdef Worker worker
        if self.count == self.regular:
            worker = Worker(self.count, poll="interrupt", cpu=None, spin_us=0)
            worker.apart = True
            for other in [*self.workers, worker]:
                (<Worker>other).shared = True
            self.wait()     # they lock from now on
            self.workers.append(worker)
            self.members[self.count] = <void *>worker
            self.count += 1
            if self.running:
                worker.start()
        return self.workers[self.regular]

    def remove(self, Pollable pollable not None) -> None:
        """On return no worker polls it, nor will. Unknown ones are ignored."""
        cdef Worker home
        cdef Table *old = NULL
        with self.lock:
            if pollable.home is None:
                return
            home = pollable.home
            old = home.remove(pollable)
        self.free_unused(old)

    def watch(self, Pollable pollable not None, int fd) -> None:
        """One more fd that wakes it."""
        cdef Worker home
        cdef Table *old = NULL
        with self.lock:
            if pollable.home is None:
                raise ValueError("not polled")
            home = pollable.home
            old = home.watch(pollable, fd)
        self.free_unused(old)

    def unwatch(self, Pollable pollable not None, int fd) -> None:
        """To be said before `fd` is closed: another process may hold the same file."""
        cdef Worker home
        cdef Table *old = NULL
        with self.lock:
            if pollable.home is None:
                return
            home = pollable.home
            if fd not in home.watched[pollable]:
                return
            old = home.unwatch(pollable, fd)
        self.free_unused(old)

    cdef free_unused(self, Table *old):
        self.wait()
        free(old)

    def wait(self) -> None:
        """Returns when every worker has finished the turn it was in, or sleeps."""
        with nogil:
            self.wait_quiescent()

    def nudge(self) -> None:
        """All pollables look again, parked ones too."""
        cdef Worker worker
        for worker in self.workers:
            worker.nudge()

    def loads(self) -> list[dict]:
        """What each worker does. Counts are since its start; `busy_share`, `items_per_poll`
        and `cycles_per_item` are since the call before, the last two of polls that found
        work, None where there was none. Cycles are those of the time-stamp counter.
        """
        cdef Worker worker
        found = []
        for worker in self.workers:
            found.append(worker.report())
        return found

    cdef void wait_quiescent(self) noexcept nogil:
        cdef int i
        fence_full()        # what was published before is seen by turns that start now
        for i in range(self.count):
            (<Worker>self.members[i]).wait_turn()

    cdef void sound_bell(self) noexcept nogil:
        signal_fd(self.bell_fd)


def load_of(Worker worker not None):
    """For choosing: how many pollables it has."""
    return len(worker.watched)


def choose_cpus(count, poll, cpus):
    """The CPU of each worker; None where the scheduler decides."""
    allowed = os.sched_getaffinity(0)
    if cpus is None:
        if poll != "busy":
            return [None] * count
        # From the end: interrupts and the control thread like CPU 0.
        cpus = sorted(allowed, reverse=True)
    elif not cpus:
        raise ConfigError("an empty list of CPUs", hint="name at least one")
    elif missing := sorted(set(cpus) - allowed):
        raise ConfigError(
            f"CPU {missing[0]} is not among those this process may use",
            hint=f"choose from {', '.join(map(str, sorted(allowed)))}")
    return [cpus[i % len(cpus)] for i in range(count)]
