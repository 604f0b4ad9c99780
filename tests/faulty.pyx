"""A storage in front of another one, which fails, is late, mixes up the order, tears.

Where the storage behind it shows what a disk should do, this one shows what disks do.
Everything is chosen by a seed, so that a failure can be had again.
"""
cimport cython
from libc.errno cimport ENOMEM
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.uio cimport iovec

from vhostpy.backends.storage.storage cimport Channel, Op, Request, Storage

cdef enum:
    RULES = 8
    SECTOR = 512

# What happens to requests of one kind that touch a range.
cdef struct Rule:
    uint64_t start          # bytes
    uint64_t end
    int32_t op
    int32_t error           # what it says; 0: it says nothing, for ever
    bint torn               # part of it is done

# The part of a torn request that is done. Behind the request that the storage sees.
cdef struct Part:
    Request request
    Request *whole
    int32_t error
    iovec iov[1024]


@cython.final
cdef class FaultyStorage(Storage):
    """In front of `inner`. A request comes back up to `late` polls after it is done."""
    cdef Storage inner
    cdef uint64_t state
    cdef uint32_t late
    cdef Rule rules[RULES]
    cdef int rule_count
    cdef double tear_rate

    def __init__(self, Storage inner not None, *, seed: int = 1, late: int = 0) -> None:
        self.inner = inner
        self.state = seed * 2 + 1
        self.late = late
        self.size_bytes = inner.size_bytes
        self.block_size = inner.block_size
        self.read_only = inner.read_only
        self.can_discard, self.can_write_zeroes = inner.can_discard, inner.can_write_zeroes
        self.can_secure_erase = inner.can_secure_erase
        self.erase_alignment = inner.erase_alignment
        self.name = f"faults before {inner.name}"

    def fail(self, op: int, error: int, start: int = 0, end: int | None = None, *,
             torn: bool = False) -> None:
        """Requests of that kind that touch [start, end) fail with an errno; 0: never end.

        `torn`: an even share of them, from nothing to nearly all, is done before.
        """
        cdef Rule *rule = &self.rules[self.rule_count]
        if self.rule_count == RULES:
            raise ValueError("too many rules")
        rule.op, rule.error, rule.torn = op, error, torn
        rule.start, rule.end = start, self.size_bytes if end is None else end
        self.rule_count += 1

    def tear(self, rate: float) -> None:
        """So many of all writes are done in part and never end: a kill will find them so."""
        self.tear_rate = rate

    def heal(self) -> None:
        """No more of it."""
        self.rule_count = 0
        self.tear_rate = 0

    def channel(self) -> FaultyChannel:
        return FaultyChannel(self, self.inner.channel())

    def actual_bytes(self) -> int:
        return self.inner.actual_bytes()

    def close(self) -> None:
        self.inner.close()

    cdef uint32_t below(self, uint32_t limit) noexcept nogil:
        # xorshift64, from all workers: who cares who gets which number.
        self.state ^= self.state >> 12
        self.state ^= self.state << 25
        self.state ^= self.state >> 27
        return <uint32_t>(self.state >> 32) % limit

    cdef const Rule *rule_for(self, const Request *request) noexcept nogil:
        cdef const Rule *rule
        cdef int i
        for i in range(self.rule_count):
            rule = &self.rules[i]
            if rule.op == request.op and (request.op == Op.FLUSH or (
                    request.offset < rule.end and request.offset + request.size > rule.start)):
                return rule
        return NULL


@cython.final
cdef class FaultyChannel(Channel):
    cdef FaultyStorage storage
    cdef Channel inner
    cdef Request *late          # done, but not yet handed back; `home` is how many polls to go

    def __cinit__(self, FaultyStorage storage not None, Channel inner not None):
        self.storage = storage
        self.inner = inner
        self.completion_fd = -1     # so that it is polled

    def close(self) -> None:
        self.inner.close()

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        cdef int i
        for i in range(count):
            if not self.begin(burst[i]):
                return i
        return count

    cdef bint begin(self, Request *request) noexcept nogil:
        cdef const Rule *rule = self.storage.rule_for(request)
        if rule != NULL and rule.torn:
            return self.begin_part(request, rule.error)
        if rule != NULL and rule.error != 0:
            self.hold(request, -rule.error)
            return True
        if rule != NULL:
            return True
        if (request.op == Op.WRITE and self.storage.tear_rate > 0
                and self.storage.below(1 << 20) < self.storage.tear_rate * (1 << 20)):
            return self.begin_part(request, 0)
        return self.inner.submit(&request, 1) == 1

    cdef bint begin_part(self, Request *request, int32_t error) noexcept nogil:
        cdef Part *part = <Part *>calloc(1, sizeof(Part))
        cdef uint64_t left = self.storage.below(<uint32_t>(request.size // SECTOR) + 1)
        cdef Request *first
        cdef int i = 0
        if part == NULL:
            self.hold(request, -ENOMEM)
            return True
        left = min(left * SECTOR, request.size - min(request.size, <uint64_t>SECTOR))
        part.whole, part.error = request, error
        first = &part.request
        first.op, first.flags = request.op, request.flags
        first.offset, first.size = request.offset, left
        first.owner = NULL          # so poll() knows it: no user's is NULL
        if request.iov_count:
            first.iov = part.iov
        while left > 0 and request.iov_count and i < 1024:
            part.iov[i] = request.iov[i]
            part.iov[i].iov_len = min(<uint64_t>part.iov[i].iov_len, left)
            left -= part.iov[i].iov_len
            i += 1
        first.iov_count = i
        if self.inner.submit(&first, 1) == 1:
            return True
        free(part)
        return False

    cdef void hold(self, Request *request, int32_t result) noexcept nogil:
        """Gives it back, but not at once."""
        request.result = result
        request.home = <void *><uint64_t>(
            self.storage.below(self.storage.late + 1) if self.storage.late else 0)
        request.next = self.late
        self.late = request

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        cdef Request *got[64]
        cdef Request *request
        cdef Request **link
        cdef Part *part
        cdef int i, count = self.inner.poll(got, 64)
        for i in range(count):
            request = got[i]
            if request.owner == NULL:
                part = <Part *>request
                if part.error != 0:
                    self.hold(part.whole, -part.error)
                free(part)
            else:
                self.hold(request, request.result)
        count = 0
        link = &self.late
        while link[0] != NULL and count < limit:
            request = link[0]
            if <uint64_t>request.home > 0:
                request.home = <void *>(<uint64_t>request.home - 1)
                link = &request.next
                continue
            link[0] = request.next
            done[count] = request
            count += 1
        return count

    cdef bint arm(self) noexcept nogil:
        return True
