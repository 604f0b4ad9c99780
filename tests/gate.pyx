"""A RAM disk that answers when it is told to: a hung or failing server, for tests."""
cimport cython
from libc.errno cimport errno
from libc.stdint cimport int32_t, uint8_t, uint32_t
from posix.unistd cimport close

from vhostpy.system.hw cimport load_acquire_u32, store_release_u32
from vhostpy.system.linux cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd
from vhostpy.backends.storage.storage cimport Channel, Request, Storage

import os

from vhostpy.backends.storage.storage import Op
from vhostpy.backends.storage.ram import RamStorage

cdef enum:
    PASSED = 64


@cython.final
cdef class GateStorage(Storage):
    """`capacity`: requests that a channel takes at a time."""
    cdef Storage inner
    cdef uint32_t is_open
    cdef int32_t failure
    cdef int capacity
    cdef list fds
    cdef uint8_t ops[PASSED]    # what went through, in order
    cdef int op_count

    def __init__(self, size: int, capacity: int = 1 << 30) -> None:
        self.inner = RamStorage(size)
        self.size_bytes = size
        self.block_size = 512
        self.can_discard = self.can_write_zeroes = True
        self.capacity = capacity
        self.fds = []
        self.name = f"gate before {self.inner.name}"

    def channel(self) -> GateChannel:
        channel = GateChannel(self, self.inner.channel())
        self.fds.append(channel.completion_fd)
        return channel

    def open(self) -> None:
        """What waits is done, and what comes."""
        store_release_u32(&self.is_open, 1)
        for fd in self.fds:
            os.eventfd_write(fd, 1)

    def shut(self) -> None:
        """What comes waits from now on."""
        store_release_u32(&self.is_open, 0)

    @property
    def passed(self) -> list[str]:
        """The first operations that went through, by name."""
        return [Op(self.ops[i]).name for i in range(min(self.op_count, PASSED))]

    def fail(self, number: int) -> None:
        """What comes back says -`number`; 0: success."""
        self.failure = -number


@cython.final
cdef class GateChannel(Channel):
    cdef GateStorage storage
    cdef Channel inner
    cdef Request *first         # before the gate
    cdef Request **last
    cdef int held               # there, and behind it

    def __cinit__(self, GateStorage storage not None, Channel inner not None):
        self.storage = storage
        self.inner = inner
        self.last = &self.first
        self.completion_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.completion_fd < 0:
            raise OSError(errno, os.strerror(errno))

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        cdef int i, taken = min(count, self.storage.capacity - self.held)
        for i in range(taken):
            burst[i].next = NULL
            self.last[0] = burst[i]
            self.last = &burst[i].next
        self.held += taken
        return taken

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        cdef Request *request
        cdef int i, count
        if not load_acquire_u32(&self.storage.is_open):
            return 0
        while self.first != NULL:
            request = self.first
            self.first = request.next
            self.inner.submit(&request, 1)
            if self.storage.op_count < PASSED:
                self.storage.ops[self.storage.op_count] = <uint8_t>request.op
                self.storage.op_count += 1
        self.last = &self.first
        count = self.inner.poll(done, limit)
        self.held -= count
        for i in range(count):
            if self.storage.failure:
                done[i].result = self.storage.failure
        return count

    cdef bint arm(self) noexcept nogil:
        return load_acquire_u32(&self.storage.is_open) and self.held > 0

    def close(self) -> None:
        if self.completion_fd >= 0:
            self.storage.fds.remove(self.completion_fd)
            close(self.completion_fd)
            self.completion_fd = -1
