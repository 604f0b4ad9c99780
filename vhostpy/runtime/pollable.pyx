"""What a worker polls. Subclasses say what they do; this knows no thread and no table."""
from libc.stdint cimport uint64_t

from vhostpy.ring.chain cimport Scratch, scratch_free, scratch_make
from vhostpy.system.hw cimport ticks
from vhostpy.system.suspicion cimport longer


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
