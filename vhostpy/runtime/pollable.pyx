"""What a worker polls. Subclasses say what they do; this knows no thread and no table."""
from libc.errno cimport errno
from libc.stdint cimport uint64_t
from posix.unistd cimport write

from vhostpy.ring.chain cimport Scratch, scratch_free, scratch_make
from vhostpy.system.hw cimport clock_ns, cpu_pause, load_acquire_u64, store_release_u64, ticks


cdef class Conduct:
    """How the memory of one device, called `name`, has behaved."""

    def __init__(self, str name=""):
        self.name = name

    cdef bint strike(self, uint64_t since, uint64_t end) noexcept nogil:
        cdef bint again = since < self.until
        if not again and end - self.until > self.span:
            self.span = 0           # it was good for as long as it was suspected
        self.span = longer(self.span, end - since)
        self.until = end + self.span
        return again


cdef class Pollable:
    """Something that a worker polls; subclasses say what."""

    def __cinit__(self):
        self.slot = -1
        self.conduct = Conduct()

    cdef int poll(self, Turn *turn) noexcept nogil:
        return 0

    cdef bint arm(self) noexcept nogil:
        return False

    cdef void disarm(self) noexcept nogil:
        pass

    cdef bint stalled(self, uint64_t since, uint64_t end) noexcept nogil:
        return self.conduct.strike(since, end)

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
        scratch_make(&scratch)
        turn.scratch = &scratch
        turn.now = ticks()
        turn.frames = BUDGET_FRAMES
        turn.bytes = BUDGET_BYTES
        turn.steps = BUDGET_STEPS
        turn.lock_ticks = 0
        turn.apart = False
        turn.worker = 0
        with nogil:
            found = self.poll(&turn)
        scratch_free(&scratch)
        return found


# --- For tests -----------------------------------------------------------------------

cdef class Probe(Pollable):
    """A pollable that counts what is done to it, and can be told what to find."""
    cdef readonly uint64_t polls
    cdef readonly uint64_t found    # of them, the last that found work
    cdef readonly uint64_t arms
    cdef readonly uint64_t disarms
    cdef uint64_t wanted        # written by the test
    cdef uint64_t served        # by the worker
    cdef int jam_fd
    cdef readonly long jam_errno
    cdef uint64_t burn_ns

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
        if self.burn_ns:
            self.spin(self.burn_ns)
            self.burn_ns = 0
            return 1
        if self.served == wanted:
            return 0
        turn.frames -= <int32_t>(wanted - self.served)
        self.found = self.polls
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

    def begin(self) -> None:
        """What it will find is work of its own, under way from now on."""
        self.under_way = True

    cdef void spin(self, uint64_t duration_ns) noexcept nogil:
        cdef uint64_t start = clock_ns()
        while clock_ns() - start < duration_ns:
            cpu_pause()

    def jam(self, int fd) -> None:
        """The next poll writes to `fd`, which may block."""
        self.jam_fd = fd

    def burn(self, duration_ms: int) -> None:
        """The next poll takes that long, and gives the processor away for nothing."""
        self.burn_ns = duration_ms * 1_000_000

    @property
    def jammed(self) -> bool:
        """A poll that was told to has not come back."""
        return self.jam_fd >= 0 or self.burn_ns > 0

    @property
    def idle(self) -> bool:
        return load_acquire_u64(&self.served) == self.wanted
