"""One worker: a thread that polls without the GIL, and sleeps when nothing is to do.

It knows things that can be polled; it knows no device, ring or message.

Three rules hold it together:
1. Within a turn (`epoch` odd) a worker may use its table and all that the table leads
   to; outside one, nothing. So what control has unpublished can be freed as soon as
   every worker has been outside a turn: `Workers.wait()`.
2. A pollable that finds nothing for a while *parks*: it asks for kicks and leaves the
   active set; its fds are watched by the worker's epoll. A kick says only 'look': it is
   edge-triggered and never read, and a spurious one costs a poll. One without fds *rests*
   instead: it is looked at by the clock, the more seldom the longer it has had nothing.
3. Whoever changes what a parked pollable would find says `nudge()`: all look again.
"""
import os
import threading
from errno import EEXIST

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.time cimport nanosleep, timespec
from posix.unistd cimport close, write

from vhostpy.ring.chain cimport scratch_free, scratch_make
from vhostpy.system.hw cimport (
    clock_ns, cpu_pause, load_acquire_ptr, load_acquire_u32, load_acquire_u64, read_once_u64,
    store_fence_u64, store_release_ptr, store_release_u32, store_release_u64, ticks,
    ticks_per_us, unlikely,
)
from vhostpy.system.linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLLET, EPOLLIN, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL,
    EPOLL_CTL_MOD, RUSAGE_THREAD, epoll_create1, epoll_ctl, epoll_event, epoll_wait, eventfd,
    getrusage, pthread_self, pthread_setname_np, rusage,
)
from vhostpy.runtime.pollable cimport BUDGET_BYTES, BUDGET_FRAMES, BUDGET_STEPS
from vhostpy.runtime.timer cimport open_timer, set_timer
from vhostpy.system.notify cimport sound_bell, interrupt_thread, only_faults_and_interrupts

from vhostpy.errors import ProtocolError

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_gettid

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef enum:
    EVENTS = 64                     # taken by one look at epoll
    LOOK_US = 50                    # a kick of a parked pollable waits at most that long
    # Work of one that rests waits at most that long, and four times that where there was none
    # for LONG_US: to be woken costs up to 18 us on a virtual machine, and idle is to cost
    # less than a hundredth of a core.
    REST_US = 1000
    LONG_US = 100_000
    TURN_US = 200
    STALL_US = 2000
    BUSY_PARK_US = 1000             # poll="busy" parks too, so that idle ports cost nothing
    SPIN_SHRINKS = 6                # by so many powers of two at most
    STUCK_NS = 200_000_000          # a turn that lasts so long is blocked in a system call

cdef uint64_t WAKE = 0xffffffffffffffff     # epoll's data for the wake fd

cdef struct Entry:
    void *pollable                  # borrowed from Worker.pollables; NULL: a free slot
    uint32_t serial                 # of this use of the slot: a late event does not match
    uint32_t fds                    # 0: nobody would wake it, so it rests and never parks

cdef struct Table:
    # Immutable once published, but for `active`, which is the worker's.
    uint64_t generation
    uint32_t slots
    uint32_t members
    Entry *entries
    uint32_t *active                # slots that are polled; from the end: those that rest

cdef double rate = 0        # ticks a microsecond


cdef long voluntary_switches() noexcept nogil:
    cdef rusage usage
    getrusage(RUSAGE_THREAD, &usage)
    return usage.ru_nvcsw


cdef void signal_fd(int fd) noexcept nogil:
    cdef uint64_t one = 1
    write(fd, &one, sizeof(one))


cdef inline uint64_t event_of(uint32_t serial, uint32_t slot) noexcept nogil:
    return <uint64_t>serial << 32 | slot


cdef class Worker:
    """One thread and what it polls. Made by Workers, which has the doors."""

    def __cinit__(self, int index, *, str poll, cpu, int spin_us):
        global rate
        if rate == 0:
            rate = ticks_per_us()
        self.index = index
        self.name = f"vhostpy-w{index}"
        self.cpu = cpu
        self.pollables = []
        self.watched = {}
        self.next_serial = 1
        self.may_sleep = poll != "busy"
        park_us = {"busy": BUSY_PARK_US, "adaptive": spin_us, "interrupt": 0}[poll]
        self.idle_ticks = <uint64_t>(park_us * rate)
        # No longer than a sleep delays the end of what is under way: some 25 us, half of the
        # usual spin.
        self.spin = self.spin_limit = self.idle_ticks // 2
        self.look_ticks = <uint64_t>(LOOK_US * rate)
        self.rest_ticks = <uint64_t>(REST_US * rate)
        self.long_ticks = <uint64_t>(LONG_US * rate)
        self.turn_ticks = <uint64_t>(TURN_US * rate)
        self.stall_ticks = <uint64_t>(STALL_US * rate)
        self.epoll_fd = self.wake_fd = self.timer_fd = -1
        scratch_make(&self.scratch)
        self.table = self.new_table(0)
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.epoll_fd < 0 or self.wake_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.timer_fd = open_timer()
        self.watch_fd(self.wake_fd, WAKE)
        self.watch_fd(self.timer_fd, WAKE)

    def __dealloc__(self):
        if self.table != NULL:      # else it was refused, and its fds are still 0
            self.close_fds()
            free(self.table)
        scratch_free(&self.scratch)

    # The worker's thread. --------------------------------------------------------------

    def _run(self):
        if self.cpu is not None:
            os.sched_setaffinity(0, {self.cpu})
        name = self.name.encode()[:15]
        cdef const char *text = name
        with nogil:
            only_faults_and_interrupts()
            pthread_setname_np(pthread_self(), text)
            self.tid = syscall(SYS_gettid)
            self.switches = voluntary_switches()
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
            if self.resting_count > 0 and ticks() >= self.rested_until:
                self.look_at_resting(table)
            found = self.turn(table) if self.active_count > 0 else 0
            parked = <int>table.members - self.active_count - self.resting_count
            store_release_u64(&self.epoch, self.epoch + 1)

            if self.active_count == 0 and self.may_sleep:
                # Whoever publishes or nudges writes to wake_fd behind it.
                self.load.sleeps += 1
                if self.resting_count > 0:
                    self.set_alarm()
                count = epoll_wait(self.epoll_fd, events, EVENTS, -1)
                self.switches = voluntary_switches()
                if self.slept_under_way:
                    self.learn_from_sleep()
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

    cdef void learn_from_sleep(self) noexcept nogil:
        """What is under way takes its time: spins longer where that would have met its end,
        and less where it was in vain. Not so for what others begin: they may be slow only
        because we slept, and would have come at once."""
        self.slept_under_way = False
        if ticks() - self.found_at < self.spin_limit:
            self.spin = min(self.spin << 1, self.spin_limit)
        else:
            self.spin = max(self.spin >> 1, self.spin_limit >> SPIN_SHRINKS)

    # The table is the one that loop() loaded: another may be published meanwhile.
    cdef int turn(self, Table *table) noexcept nogil:
        """Polls each active pollable once; returns how many found work."""
        cdef Turn turn
        cdef Entry *entry
        cdef uint32_t slot
        cdef uint64_t start = ticks(), before = start, after, busy = 0
        cdef int64_t items = 0
        cdef int found, total = 0, i = self.cursor if self.cursor < self.active_count else 0
        cdef bint spun = self.may_sleep and start - self.found_at >= self.spin
        turn.scratch = &self.scratch
        turn.worker = self.index
        turn.lock_ticks = self.look_ticks if self.shared else 0
        turn.apart = self.apart
        while i < self.active_count:
            slot = table.active[i]
            entry = &table.entries[slot]
            turn.now = before
            turn.frames = BUDGET_FRAMES
            turn.bytes = BUDGET_BYTES
            turn.steps = BUDGET_STEPS
            found = (<Pollable>entry.pollable).poll(&turn)
            after = ticks()
            if found > 0:
                total += 1
                busy += after - before
                items += BUDGET_FRAMES - turn.frames
                (<Pollable>entry.pollable).busy_at = after
                i += 1
            elif entry.fds == 0:
                if self.may_sleep and after - (<Pollable>entry.pollable).busy_at >= self.idle_ticks:
                    self.rest(table, i, after)
                else:
                    i += 1
            elif self.idles(<Pollable>entry.pollable, after, spun):
                if (<Pollable>entry.pollable).arm():
                    (<Pollable>entry.pollable).disarm()
                    (<Pollable>entry.pollable).busy_at = after
                    i += 1
                else:
                    (<Pollable>entry.pollable).parked = True
                    self.slept_under_way |= (<Pollable>entry.pollable).under_way
                    self.active_count -= 1
                    table.active[i] = table.active[self.active_count]
                after = ticks()
            else:
                i += 1
            if after - start > self.turn_ticks:
                if unlikely(after - before > self.stall_ticks):
                    self.look_at_stall(table, slot, before, after)
                before = after
                break               # the rest goes on after a quiescent point
            before = after
        self.cursor = i
        self.load.turns += 1
        if total > 0:
            self.found_at = before
            self.load.busy_turns += 1
            self.load.busy_polls += total
            self.load.busy_ticks += busy
            self.load.items += items
        return total

    cdef bint idles(self, Pollable pollable, uint64_t now, bint spun) noexcept nogil:
        """It has found nothing for so long that it may park."""
        return (spun and pollable.under_way
                or now - pollable.busy_at >= self.idle_ticks)

    cdef void rest(self, Table *table, int at, uint64_t now) noexcept nogil:
        """The active slot at `at` has had nothing for a while: for as long, within bounds, it
        is not polled. All that rest are looked at together."""
        cdef uint64_t idle = now - (<Pollable>table.entries[table.active[at]].pollable).busy_at
        cdef uint64_t most = self.rest_ticks if idle < self.long_ticks else 4 * self.rest_ticks
        cdef uint64_t until = now + min(max(idle, self.look_ticks), most)
        cdef uint32_t slot = table.active[at]
        self.active_count -= 1
        table.active[at] = table.active[self.active_count]
        if self.resting_count == 0 or until < self.rested_until:
            self.rested_until = until
        self.resting_count += 1
        table.active[<int>table.slots - self.resting_count] = slot

    cdef void look_at_resting(self, Table *table) noexcept nogil:
        """They are active for a turn, and for longer if they find work: `busy_at` stays."""
        cdef int i, first = <int>table.slots - self.resting_count
        for i in range(self.resting_count):
            if not (<Pollable>table.entries[table.active[first + i]].pollable).banned:
                table.active[self.active_count] = table.active[first + i]
                self.active_count += 1
        self.resting_count = 0

    cdef void set_alarm(self) noexcept nogil:
        cdef int64_t left = <int64_t>(self.rested_until - ticks())
        set_timer(self.timer_fd, <int64_t>(max(left, 0) * 1000 / rate) + 1)

    cdef void look_at_stall(self, Table *table, uint32_t slot, uint64_t since,
                            uint64_t end) noexcept nogil:
        """Whoever blocks a worker again and again leaves it: guest memory in which holes are
        punched, or whose pages are fetched from a disk, makes its neighbours wait.

        A thread that waits in a page fault gives its processor up; one that fills a huge page
        with zeros, or was displaced by another, does not.
        """
        cdef long switches = voluntary_switches()
        cdef bint blocked = switches != self.switches
        self.switches = switches
        if (blocked and (<Pollable>table.entries[slot].pollable).stalled(since, end)
                and not self.apart):
            self.ban(table, slot)

    cdef void ban(self, Table *table, uint32_t slot) noexcept nogil:
        """Polls it no more, and asks control to move it."""
        cdef int i
        (<Pollable>table.entries[slot].pollable).banned = True
        for i in range(self.active_count):
            if table.active[i] == slot:
                self.active_count -= 1
                table.active[i] = table.active[self.active_count]
                break
        sound_bell()

    cdef void activate_slot(self, Table *table, uint32_t slot) noexcept nogil:
        cdef uint64_t start = ticks(), now = start
        if (<Pollable>table.entries[slot].pollable).banned:
            return
        if (<Pollable>table.entries[slot].pollable).parked:
            (<Pollable>table.entries[slot].pollable).parked = False
            (<Pollable>table.entries[slot].pollable).disarm()
            now = ticks()
        (<Pollable>table.entries[slot].pollable).busy_at = now
        table.active[self.active_count] = slot
        self.active_count += 1
        if unlikely(now - start > self.stall_ticks):
            self.look_at_stall(table, slot, start, now)

    cdef void activate_all(self, Table *table) noexcept nogil:
        cdef uint32_t slot
        self.active_count = 0
        self.resting_count = 0
        self.cursor = 0
        for slot in range(table.slots):
            if table.entries[slot].pollable != NULL:
                self.activate_slot(table, slot)

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
        self.activate_slot(table, slot)

    # Control's side. ---------------------------------------------------------------------

    cdef start(self):
        self.started_ticks = ticks()
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self.thread.start()

    cdef ask_to_stop(self):
        store_release_u32(&self.stopping, 1)
        self.wake()

    cdef join(self):
        thread = self.thread
        with nogil:
            self.wait_turn()
        thread.join()

    cdef nudge(self):
        # Under the GIL: nobody else adds.
        store_release_u32(&self.nudged, self.nudged + 1)    # pairs with loop()
        if self.wake_fd >= 0:
            self.wake()

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
                interrupt_thread(self.tid)
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

    cdef Table *add(self, Pollable pollable, list fds) except NULL:
        cdef uint32_t serial = self.next_serial
        cdef uint32_t slot
        cdef Table *old
        slot = (self.pollables.index(None) if None in self.pollables
                else len(self.pollables))
        self.next_serial += 1
        pollable.parked = pollable.banned = False
        for i, fd in enumerate(fds):
            try:
                self.watch_fd(fd, event_of(serial, slot))
            except BaseException:
                for done in fds[:i]:
                    self.unwatch_fd(done)
                raise
        if slot == len(self.pollables):
            self.pollables.append(pollable)
        else:
            self.pollables[slot] = pollable
        self.watched[pollable] = fds
        old = self.publish(pollable, serial)
        pollable.slot = slot
        pollable.home = self
        return old

    cdef Table *remove(self, Pollable pollable) except NULL:
        cdef Table *old
        for fd in self.watched.pop(pollable):
            self.unwatch_fd(fd)
        self.pollables[pollable.slot] = None
        while self.pollables and self.pollables[len(self.pollables) - 1] is None:
            self.pollables.pop()
        old = self.publish(None, 0)
        pollable.slot = -1
        pollable.home = None
        return old

    cdef Table *watch(self, Pollable pollable, int fd) except NULL:
        self.watch_fd(fd, event_of(self.table.entries[pollable.slot].serial, pollable.slot))
        self.watched[pollable].append(fd)
        return self.publish(None, 0)

    cdef Table *unwatch(self, Pollable pollable, int fd) except NULL:
        self.unwatch_fd(fd)
        self.watched[pollable].remove(fd)
        return self.publish(None, 0)

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
        if self.timer_fd >= 0:
            close(self.timer_fd)
        self.epoll_fd = self.wake_fd = self.timer_fd = -1

    cdef dict report(self):
        cdef Load load, shown
        cdef uint64_t total = ticks() - self.started_ticks if self.started_ticks else 0
        # Read singly: sums of one turn may be in some and not yet in others.
        load.turns = read_once_u64(&self.load.turns)
        load.busy_turns = read_once_u64(&self.load.busy_turns)
        load.busy_polls = read_once_u64(&self.load.busy_polls)
        load.busy_ticks = read_once_u64(&self.load.busy_ticks)
        load.items = read_once_u64(&self.load.items)
        load.sleeps = read_once_u64(&self.load.sleeps)
        shown = self.shown
        busy = load.busy_ticks - shown.busy_ticks
        items = load.items - shown.items
        polls = load.busy_polls - shown.busy_polls
        span = total - self.shown_ticks
        self.shown = load
        self.shown_ticks = total
        return {
            "index": self.index,
            "cpu": self.cpu,
            "pollables": len(self.watched),
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
        }
