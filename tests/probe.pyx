"""What tests of workers have them poll."""
from libc.errno cimport errno
from libc.stdint cimport int32_t, uint64_t
from posix.unistd cimport write

from vhostpy.runtime.pool cimport Pollable, Turn
from vhostpy.system.hw cimport clock_ns, cpu_pause, load_acquire_u64, store_release_u64


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
