"""Worker threads: poll loops without the GIL, adaptive sleep, quiescence.

A worker knows things that can be polled; it knows no device, ring or message.

Three rules hold it together:
1. Within a turn (`epoch` odd) a worker may use its table and all that the table leads
   to; outside one, nothing. So what control has unpublished can be freed as soon as
   every worker has been outside a turn: `wait()`.
2. A pollable that finds nothing for a while *parks*: it asks for kicks and leaves the
   active set; its fds are watched by the worker's epoll. A kick says only 'look': it is
   edge-triggered and never read, and a spurious one costs a poll.
3. Whoever changes what a parked pollable would find says `nudge()`: all look again.
"""
import atexit
import os
import threading
import weakref
from errno import EEXIST

from libc.errno cimport errno
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.signal cimport sigdelset, sigfillset, sigset_t
from posix.time cimport nanosleep, timespec
from posix.unistd cimport close, getpid, write

from vhostpy._hw cimport (
    clock_ns, cpu_pause, fence_full, load_acquire_ptr, load_acquire_u32, load_acquire_u64,
    read_once_u64, store_fence_u64, store_release_ptr, store_release_u32,
    store_release_u64, ticks, ticks_per_us, unlikely,
)
from vhostpy.notify cimport interrupt_number, start_watchdog
from vhostpy._ring cimport SCRATCH_SEGMENTS
from vhostpy.memory cimport Segment

from vhostpy.errors import ConfigError, ProtocolError

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    uint32_t EPOLLIN, EPOLLET

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initval, int flags)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from "<signal.h>" nogil:
    int pthread_sigmask(int how, const sigset_t *new, sigset_t *old)
    int SIG_SETMASK, SIGBUS, SIGSEGV, SIGFPE, SIGILL

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_setname_np(pthread_t thread, const char *name)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_tgkill, SYS_gettid

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef enum:
    EVENTS = 64                     # taken by one look at epoll
    LOOK_US = 50                    # a kick of a parked pollable waits at most that long
    TURN_US = 200
    BUSY_PARK_US = 1000             # poll="busy" parks too, so that idle ports cost nothing
    STUCK_NS = 200_000_000          # a turn that lasts so long is blocked in a system call

cdef uint64_t WAKE = 0xffffffffffffffff     # epoll's data for the wake fd

cdef struct Entry:
    void *pollable                  # borrowed from Worker.pollables; NULL: a free slot
    uint32_t serial                 # of this use of the slot: a late event does not match
    uint32_t fds                    # 0: nobody would wake it, so it never parks

cdef struct Table:
    # Immutable once published, but for `active`, which is the worker's.
    uint64_t generation
    uint32_t slots
    uint32_t members
    Entry *entries
    uint32_t *active                # slots that are polled


# --- What stops a worker that hangs ------------------------------------------------

cdef void block_signals() noexcept nogil:
    # Signals are the main thread's, but for faults and the interrupt.
    cdef sigset_t mask
    sigfillset(&mask)
    sigdelset(&mask, SIGBUS)
    sigdelset(&mask, SIGSEGV)
    sigdelset(&mask, SIGFPE)
    sigdelset(&mask, SIGILL)
    sigdelset(&mask, interrupt_number())
    pthread_sigmask(SIG_SETMASK, &mask, NULL)


cdef void signal_fd(int fd) noexcept nogil:
    cdef uint64_t one = 1
    write(fd, &one, sizeof(one))


cdef double rate = 0        # ticks a microsecond


# --- Pollable ----------------------------------------------------------------------

cdef class Pollable:
    """Something that a worker polls; subclasses say what."""

    def __cinit__(self):
        self.slot = -1

    cdef int poll(self, Turn *turn) noexcept nogil:
        return 0

    cdef bint arm(self) noexcept nogil:
        return False

    cdef void disarm(self) noexcept nogil:
        pass

    @property
    def is_parked(self) -> bool:
        """Whether it waits for a kick."""
        return self.parked

    @property
    def worker(self) -> int | None:
        """Index of the worker that polls it."""
        return self.home.index if self.home is not None else None

    def step(self) -> int:
        """One poll on the calling thread, for tests: refused while a worker polls it."""
        cdef Turn turn
        cdef Scratch scratch
        cdef int found
        if self.home is not None:
            raise RuntimeError("a worker polls it")
        scratch.segments = <Segment *>aligned_alloc(64, SCRATCH_SEGMENTS * sizeof(Segment))
        if scratch.segments == NULL:
            raise MemoryError
        scratch.limit = SCRATCH_SEGMENTS
        scratch.used = 0
        turn.scratch = &scratch
        turn.now = ticks()
        turn.frames = BUDGET_FRAMES
        turn.bytes = BUDGET_BYTES
        turn.worker = 0
        with nogil:
            found = self.poll(&turn)
        free(scratch.segments)
        return found


# --- Worker ------------------------------------------------------------------------

cdef class Worker:
    """One thread and what it polls. Made by Workers, which has the doors."""

    def __cinit__(self, int index, *, str poll, cpu, int spin_us):
        self.index = index
        self.name = f"vhostpy-w{index}"
        self.cpu = cpu
        self.epoll_fd = -1
        self.wake_fd = -1
        self.pollables = []
        self.watched = {}
        self.next_serial = 1
        self.may_sleep = poll != "busy"
        park_us = {"busy": BUSY_PARK_US, "adaptive": spin_us, "interrupt": 0}[poll]
        self.idle_ticks = <uint64_t>(park_us * rate)
        self.look_ticks = <uint64_t>(LOOK_US * rate)
        self.turn_ticks = <uint64_t>(TURN_US * rate)
        self.scratch.segments = <Segment *>aligned_alloc(64, SCRATCH_SEGMENTS * sizeof(Segment))
        if self.scratch.segments == NULL:
            raise MemoryError
        self.scratch.limit = SCRATCH_SEGMENTS
        self.table = self.new_table(0)
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.epoll_fd < 0 or self.wake_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.watch_fd(self.wake_fd, WAKE)

    def __dealloc__(self):
        self.close_fds()
        if self.table != NULL:
            free(self.table)
        free(self.scratch.segments)

    # The worker's thread. --------------------------------------------------------------

    def _run(self):
        if self.cpu is not None:
            os.sched_setaffinity(0, {self.cpu})
        name = self.name.encode()[:15]
        cdef const char *text = name
        with nogil:
            block_signals()
            pthread_setname_np(pthread_self(), text)
            self.tid = syscall(SYS_gettid)
            self.loop()

    cdef void loop(self) noexcept nogil:
        cdef epoll_event events[EVENTS]
        cdef Table *table
        cdef uint64_t generation = 0, looked = 0, now
        cdef uint32_t nudged, seen = 0
        cdef int count = 0, found, i, parked
        while not load_acquire_u32(&self.stopping):
            # pairs with wait_quiescent(): either control sees this turn, or we see
            # what control published before it looked.
            store_fence_u64(&self.epoch, self.epoch + 1)
            table = <Table *>load_acquire_ptr(<void **>&self.table)
            nudged = load_acquire_u32(&self.nudged)
            if unlikely(table.generation != generation or nudged != seen):
                generation = table.generation
                seen = nudged
                self.activate_all(table)
            else:
                for i in range(count):
                    self.activate(table, events[i].data.u64)
            count = 0
            found = self.turn(table) if self.active_count > 0 else 0
            parked = <int>table.members - self.active_count
            store_release_u64(&self.epoch, self.epoch + 1)

            if self.active_count == 0 and self.may_sleep:
                # Whoever publishes or nudges writes to wake_fd behind it.
                self.load.sleeps += 1
                count = epoll_wait(self.epoll_fd, events, EVENTS, -1)
            else:
                if found == 0:
                    cpu_pause()
                if parked > 0:
                    now = ticks()
                    if now - looked > self.look_ticks:
                        looked = now
                        count = epoll_wait(self.epoll_fd, events, EVENTS, 0)
            if count < 0:           # EINTR
                count = 0

    # The table is the one that loop() loaded: another may be published meanwhile.
    cdef int turn(self, Table *table) noexcept nogil:
        """Polls each active pollable once; returns how many found work."""
        cdef Turn turn
        cdef Entry *entry
        cdef uint64_t start = ticks(), before = start, after, busy = 0
        cdef int64_t items = 0
        cdef int found, total = 0, i = self.cursor if self.cursor < self.active_count else 0
        turn.scratch = &self.scratch
        turn.worker = self.index
        while i < self.active_count:
            entry = &table.entries[table.active[i]]
            turn.now = before
            turn.frames = BUDGET_FRAMES
            turn.bytes = BUDGET_BYTES
            found = (<Pollable>entry.pollable).poll(&turn)
            after = ticks()
            if found > 0:
                total += 1
                busy += after - before
                items += BUDGET_FRAMES - turn.frames
                (<Pollable>entry.pollable).busy_at = after
                i += 1
            elif (after - (<Pollable>entry.pollable).busy_at >= self.idle_ticks
                    and entry.fds > 0):
                if (<Pollable>entry.pollable).arm():
                    (<Pollable>entry.pollable).disarm()
                    (<Pollable>entry.pollable).busy_at = after
                    i += 1
                else:
                    (<Pollable>entry.pollable).parked = True
                    self.active_count -= 1
                    table.active[i] = table.active[self.active_count]
            else:
                i += 1
            before = after
            if after - start > self.turn_ticks:
                break               # the rest goes on after a quiescent point
        self.cursor = i
        self.load.turns += 1
        if total > 0:
            self.load.busy_turns += 1
            self.load.busy_polls += total
            self.load.busy_ticks += busy
            self.load.items += items
        return total

    cdef void activate_all(self, Table *table) noexcept nogil:
        cdef uint64_t now = ticks()
        cdef uint32_t slot
        self.active_count = 0
        self.cursor = 0
        for slot in range(table.slots):
            if table.entries[slot].pollable == NULL:
                continue
            if (<Pollable>table.entries[slot].pollable).parked:
                (<Pollable>table.entries[slot].pollable).parked = False
                (<Pollable>table.entries[slot].pollable).disarm()
            (<Pollable>table.entries[slot].pollable).busy_at = now
            table.active[self.active_count] = slot
            self.active_count += 1

    cdef void activate(self, Table *table, uint64_t event) noexcept nogil:
        """An fd of a slot is readable; it may be late, and of a slot long gone."""
        cdef uint32_t slot = <uint32_t>event
        cdef Entry *entry
        if slot >= table.slots:     # the wake fd too
            return
        entry = &table.entries[slot]
        if entry.pollable == NULL or entry.serial != <uint32_t>(event >> 32):
            return
        if not (<Pollable>entry.pollable).parked:
            return
        (<Pollable>entry.pollable).parked = False
        (<Pollable>entry.pollable).disarm()
        (<Pollable>entry.pollable).busy_at = ticks()
        table.active[self.active_count] = slot
        self.active_count += 1

    # Control's side. ---------------------------------------------------------------------

    cdef void wake(self) noexcept nogil:
        signal_fd(self.wake_fd)

    cdef void wait_turn(self) noexcept nogil:
        """Returns when the turn that may be under way has ended."""
        cdef uint64_t epoch = load_acquire_u64(&self.epoch), since
        cdef timespec nap
        cdef int spins = 0
        if not epoch & 1:
            return
        nap.tv_sec = 0
        nap.tv_nsec = 30_000
        since = clock_ns()
        while load_acquire_u64(&self.epoch) == epoch:
            if spins < 500:
                spins += 1
                cpu_pause()
                continue
            nanosleep(&nap, NULL)
            if clock_ns() - since > STUCK_NS:
                # A front-end can hand us a call fd that blocks. The write then
                # returns EINTR, and the turn goes on.
                syscall(SYS_tgkill, <long>getpid(), self.tid, <long>interrupt_number())
                since = clock_ns()

    cdef Table *new_table(self, uint32_t slots) except NULL:
        # One block: header, entries, active.
        cdef Table *table = <Table *>calloc(
            1, sizeof(Table) + slots * (sizeof(Entry) + sizeof(uint32_t)))
        if table == NULL:
            raise MemoryError
        table.slots = slots
        table.entries = <Entry *>(<uint8_t *>table + sizeof(Table))
        table.active = <uint32_t *>(<uint8_t *>table.entries + slots * sizeof(Entry))
        self.generation += 1
        table.generation = self.generation
        return table

    cdef Table *publish(self, Pollable added, uint32_t serial) except NULL:
        """Swaps in a table of what `pollables` and `watched` say now; returns the old
        one, to be freed after quiescence. `added` is new under `serial`."""
        cdef Table *old = self.table
        cdef Table *table = self.new_table(<uint32_t>len(self.pollables))
        cdef Pollable pollable
        cdef uint32_t slot
        for slot in range(table.slots):
            pollable = self.pollables[slot]
            if pollable is None:
                continue
            table.members += 1
            table.entries[slot].pollable = <void *>pollable
            table.entries[slot].fds = <uint32_t>len(self.watched[pollable])
            table.entries[slot].serial = (
                serial if pollable is added else old.entries[slot].serial)
        store_release_ptr(<void **>&self.table, table)      # pairs with loop()
        self.wake()
        return old

    cdef watch_fd(self, int fd, uint64_t data):
        cdef epoll_event event
        cdef int error
        if self.epoll_fd < 0:
            return
        memset(&event, 0, sizeof(event))
        event.events = EPOLLIN | EPOLLET
        event.data.u64 = data
        if epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0:
            return
        error = errno
        # An fd that was closed under us stays in epoll while its sender keeps the file open.
        if error == EEXIST and epoll_ctl(self.epoll_fd, EPOLL_CTL_MOD, fd, &event) == 0:
            return
        raise ProtocolError(
            f"fd {fd} cannot be watched: {os.strerror(error)}", hint="hand over an eventfd")

    cdef unwatch_fd(self, int fd):
        cdef epoll_event event
        if self.epoll_fd < 0:
            return
        memset(&event, 0, sizeof(event))
        # It fails where the fd was closed before, and with it the watch.
        epoll_ctl(self.epoll_fd, EPOLL_CTL_DEL, fd, &event)

    cdef close_fds(self):
        if self.epoll_fd >= 0:
            close(self.epoll_fd)
        if self.wake_fd >= 0:
            close(self.wake_fd)
        self.epoll_fd = self.wake_fd = -1


# --- Workers -----------------------------------------------------------------------

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
        global rate
        if count < 1:
            raise ConfigError(f"{count} workers", hint="give at least one")
        if poll not in POLL_MODES:
            raise ConfigError(f"poll mode {poll!r}", hint=f"one of {', '.join(POLL_MODES)}")
        if spin_us < 0:
            raise ConfigError(f"spin of {spin_us} us", hint="0 or more")
        if rate == 0:
            rate = ticks_per_us()
        self.poll = poll
        self.attention_fd = -1
        self.lock = threading.Lock()
        self.workers = []
        self.members = <void **>calloc(count, sizeof(void *))
        if self.members == NULL:
            raise MemoryError
        for index, cpu in enumerate(choose_cpus(count, poll, cpus)):
            worker = Worker(index, poll=poll, cpu=cpu, spin_us=spin_us)
            self.workers.append(worker)
            self.members[index] = <void *>worker
        self.count = count
        self.attention_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.attention_fd < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        if self.attention_fd >= 0:
            close(self.attention_fd)
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
            worker.started_ticks = ticks()
            worker.thread = threading.Thread(target=worker._run, name=worker.name, daemon=True)
            worker.thread.start()

    def stop(self) -> None:
        """Ends the threads and waits for them. Final; idempotent."""
        cdef Worker worker
        started.discard(self)
        if self.running and os.getpid() == self.pid:
            for worker in self.workers:
                store_release_u32(&worker.stopping, 1)
                worker.wake()
            for worker in self.workers:
                thread = worker.thread
                with nogil:
                    worker.wait_turn()
                thread.join()
        self.running = False
        for worker in self.workers:
            worker.thread = None
            worker.close_fds()

    def add(self, Pollable pollable not None, fds=(), worker: int | None = None) -> int:
        """Polls it from now on, on the least loaded worker unless told; returns which.

        `fds` become readable when a parked pollable must be polled again; with none it
        never parks.
        """
        cdef Worker home
        cdef Table *old = NULL
        cdef int slot
        cdef uint32_t serial
        if pollable.home is not None:
            raise ValueError("already polled")
        if worker is not None and not 0 <= worker < self.count:
            raise ValueError(f"worker {worker} of {self.count}")
        fds = [int(fd) for fd in fds]
        with self.lock:
            home = (min(self.workers, key=load_of) if worker is None else self.workers[worker])
            slot = (home.pollables.index(None) if None in home.pollables
                    else len(home.pollables))
            serial = home.next_serial
            home.next_serial += 1
            pollable.parked = False
            for i, fd in enumerate(fds):
                try:
                    home.watch_fd(fd, <uint64_t>serial << 32 | <uint32_t>slot)
                except BaseException:
                    for done in fds[:i]:
                        home.unwatch_fd(done)
                    raise
            if slot == len(home.pollables):
                home.pollables.append(pollable)
            else:
                home.pollables[slot] = pollable
            home.watched[pollable] = fds
            old = home.publish(pollable, serial)
            pollable.slot = slot
            pollable.home = home
        self.wait()
        free(old)
        return home.index

    def remove(self, Pollable pollable not None) -> None:
        """On return no worker polls it, nor will. Unknown ones are ignored."""
        cdef Worker home
        cdef Table *old = NULL
        with self.lock:
            if pollable.home is None:
                return
            home = pollable.home
            for fd in home.watched.pop(pollable):
                home.unwatch_fd(fd)
            home.pollables[pollable.slot] = None
            while home.pollables and home.pollables[len(home.pollables) - 1] is None:
                home.pollables.pop()
            old = home.publish(None, 0)
            pollable.slot = -1
            pollable.home = None
        self.wait()
        free(old)

    def watch(self, Pollable pollable not None, int fd) -> None:
        """One more fd that wakes it."""
        cdef Worker home
        cdef Table *old = NULL
        with self.lock:
            if pollable.home is None:
                raise ValueError("not polled")
            home = pollable.home
            home.watch_fd(fd, <uint64_t>home.table.entries[pollable.slot].serial << 32
                          | <uint32_t>pollable.slot)
            home.watched[pollable].append(fd)
            old = home.publish(None, 0)
        self.wait()
        free(old)

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
            home.unwatch_fd(fd)
            home.watched[pollable].remove(fd)
            old = home.publish(None, 0)
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
            # Under the GIL: nobody else adds.
            store_release_u32(&worker.nudged, worker.nudged + 1)    # pairs with loop()
            if worker.wake_fd >= 0:
                worker.wake()

    def loads(self) -> list[dict]:
        """What each worker does. Counts are since its start; `busy_share`, `items_per_poll`
        and `cycles_per_item` are since the call before, the last two of polls that found
        work, None where there was none. Cycles are those of the time-stamp counter.
        """
        cdef Worker worker
        cdef Load load, shown
        cdef uint64_t total
        result = []
        for worker in self.workers:
            total = ticks() - worker.started_ticks if worker.started_ticks else 0
            # Read singly: sums of one turn may be in some and not yet in others.
            load.turns = read_once_u64(&worker.load.turns)
            load.busy_turns = read_once_u64(&worker.load.busy_turns)
            load.busy_polls = read_once_u64(&worker.load.busy_polls)
            load.busy_ticks = read_once_u64(&worker.load.busy_ticks)
            load.items = read_once_u64(&worker.load.items)
            load.sleeps = read_once_u64(&worker.load.sleeps)
            shown = worker.shown
            busy = load.busy_ticks - shown.busy_ticks
            items = load.items - shown.items
            polls = load.busy_polls - shown.busy_polls
            span = total - worker.shown_ticks
            worker.shown = load
            worker.shown_ticks = total
            result.append({
                "index": worker.index,
                "cpu": worker.cpu,
                "pollables": len(worker.watched),
                "busy_share": min(1.0, busy / span) if span > 0 else 0.0,
                "items_per_poll": items / polls if polls else None,
                "cycles_per_item": busy / items if items else None,
                "turns": load.turns,
                "busy_turns": load.busy_turns,
                "busy_polls": load.busy_polls,
                "busy_ticks": load.busy_ticks,
                "idle_ticks": max(0, <int64_t>(total - load.busy_ticks)),
                "total_ticks": total,
                "items": load.items,
                "sleeps": load.sleeps,
            })
        return result

    cdef void wait_quiescent(self) noexcept nogil:
        cdef int i
        fence_full()        # what was published before is seen by turns that start now
        for i in range(self.count):
            (<Worker>self.members[i]).wait_turn()

    cdef void attention(self) noexcept nogil:
        signal_fd(self.attention_fd)


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


# --- For tests -----------------------------------------------------------------------

cdef class Probe(Pollable):
    """A pollable that counts what is done to it, and can be told what to find."""
    cdef readonly uint64_t polls
    cdef readonly uint64_t arms
    cdef readonly uint64_t disarms
    cdef uint64_t wanted        # written by the test
    cdef uint64_t served        # by the worker
    cdef int jam_fd
    cdef readonly long jam_errno

    def __cinit__(self):
        self.jam_fd = -1

    cdef int poll(self, Turn *turn) noexcept nogil:
        cdef uint64_t one = 1, wanted = load_acquire_u64(&self.wanted)
        self.polls += 1
        if self.jam_fd >= 0:
            if write(self.jam_fd, &one, sizeof(one)) < 0:
                self.jam_errno = errno
            self.jam_fd = -1
            return 1
        if self.served == wanted:
            return 0
        turn.frames -= <int32_t>(wanted - self.served)
        store_release_u64(&self.served, wanted)
        return 1

    cdef bint arm(self) noexcept nogil:
        self.arms += 1
        return self.served != load_acquire_u64(&self.wanted)

    cdef void disarm(self) noexcept nogil:
        self.disarms += 1

    def give(self) -> None:
        """One more piece of work, without a kick."""
        store_release_u64(&self.wanted, self.wanted + 1)

    def jam(self, int fd) -> None:
        """The next poll writes to `fd`, which may block."""
        self.jam_fd = fd

    @property
    def idle(self) -> bool:
        return load_acquire_u64(&self.served) == self.wanted
