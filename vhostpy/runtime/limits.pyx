"""How much a disk may do in a time: requests, and bytes that are read and written."""
cimport cython
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset

from vhostpy.system.hw cimport (
    atomic_add_i64, atomic_max_i64, read_once_u64, store_release_u32, ticks, ticks_per_us,
)

from dataclasses import dataclass

from vhostpy.errors import ConfigError

BURST_S = 0.1


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may say; None: no limit."""

    requests_per_s: int | None = None
    bytes_per_s: int | None = None
    burst_s: float = BURST_S


cdef int64_t allowed(Limit *limit, int64_t now, int64_t most) noexcept nogil:
    """How many of `most` units may pass at `now`."""
    cdef double cost = limit.cost, units
    cdef int64_t clock
    if cost == 0:
        return most
    clock = atomic_max_i64(&limit.clock, now - limit.burst)
    if clock > now:
        return 0
    units = <double>(now - clock) * limit.rate + 1
    return most if units >= most else <int64_t>units


cdef void set_limit(Limit *limit, units_per_s, burst_s, double ticks_per_s, int64_t now):
    # Without a debt from before, and with nothing saved up. Workers may be reading:
    # a poll with half of both settings does no harm.
    limit.clock = now
    limit.burst = <int64_t>(ticks_per_s * burst_s)
    limit.rate = units_per_s / ticks_per_s if units_per_s else 0
    limit.cost = ticks_per_s / units_per_s if units_per_s else 0


@cython.final
cdef class Limits:
    """Of one disk, shared by its queues; without limits to begin with."""

    def __cinit__(self, double ticks_per_s=0):
        self.ticks_per_s = ticks_per_s
        self.settings = Settings()

    def set(self, settings, *, now: int | None = None) -> None:
        """Holds from now on. Raises ConfigError for what cannot be."""
        for what, value in (("requests", settings.requests_per_s), ("bytes", settings.bytes_per_s)):
            if value is not None and not 0 < value < 1 << 50:
                raise ConfigError(f"a limit of {value} {what} a second", "1 or more")
        if not 0 <= settings.burst_s <= 3600:
            raise ConfigError(f"a burst of {settings.burst_s:g} s", "0 to 3600 s")
        any = settings.requests_per_s is not None or settings.bytes_per_s is not None
        if any and self.ticks_per_s == 0:
            self.ticks_per_s = 1e6 * ticks_per_us()
        at = ticks() if now is None else now
        set_limit(&self.requests, settings.requests_per_s, settings.burst_s, self.ticks_per_s, at)
        set_limit(&self.bytes, settings.bytes_per_s, settings.burst_s, self.ticks_per_s, at)
        self.settings = settings
        store_release_u32(&self.on, any)

    @property
    def any(self) -> bool:
        """Whether there is a limit."""
        return bool(self.on)

    cdef bint clip(self, Turn *turn) noexcept nogil:
        cdef int64_t requests = allowed(&self.requests, <int64_t>turn.now, turn.frames)
        cdef int64_t bytes = allowed(&self.bytes, <int64_t>turn.now, turn.bytes)
        if requests == 0 or bytes == 0:
            return False
        turn.frames = <int32_t>requests
        turn.bytes = bytes
        return True

    cdef void charge(self, int64_t requests, int64_t bytes) noexcept nogil:
        if requests > 0:
            atomic_add_i64(&self.requests.clock, <int64_t>(requests * self.requests.cost))
        if bytes > 0:
            atomic_add_i64(&self.bytes.clock, <int64_t>(bytes * self.bytes.cost))

    cdef int64_t wait_ns(self, int64_t now) noexcept nogil:
        cdef int64_t ahead = 0
        if self.requests.cost:
            ahead = max(ahead, <int64_t>read_once_u64(&self.requests.clock) - now)
        if self.bytes.cost:
            ahead = max(ahead, <int64_t>read_once_u64(&self.bytes.clock) - now)
        if ahead == 0:
            return 0
        return <int64_t>(ahead * (1e9 / self.ticks_per_s)) + 1

    # Door, for tests. ------------------------------------------------------------------

    def take(self, now: int, sizes: list) -> int:
        """How many requests of these sizes pass at `now`, as a queue would take them."""
        cdef Turn turn
        cdef int64_t bytes
        cdef int taken = 0
        memset(&turn, 0, sizeof(turn))
        turn.now = now
        turn.frames = len(sizes)
        turn.bytes = bytes = 1 << 40
        if not self.clip(&turn):
            return 0
        bytes = turn.bytes
        while taken < turn.frames and turn.bytes > 0:
            turn.bytes -= sizes[taken]
            taken += 1
        self.charge(taken, bytes - turn.bytes)
        return taken

    def wait(self, now: int) -> int:
        """Nanoseconds until something may pass."""
        return self.wait_ns(now)
