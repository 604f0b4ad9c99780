"""How a storage's own threads give requests back to the worker that polls a channel."""
from libc.errno cimport errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close

from vhostpy.system.hw cimport load_acquire_u32
from vhostpy.system.linux cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd
from vhostpy.backends.storage.storage cimport Channel, Request

import os


cdef class DoneChannel(Channel):
    """A channel whose requests are done by threads of the storage's own."""

    def __cinit__(self, *_):
        self.done = <Done *>calloc(1, sizeof(Done))
        if self.done == NULL:
            raise MemoryError
        pthread_mutex_init(&self.done.lock, NULL)
        self.done.last = &self.done.first
        self.done.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.done.fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.completion_fd = self.done.fd

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        cdef Done *mine = self.done
        cdef int count = 0
        if load_acquire_u32(&mine.count) == 0:      # pairs with put_done()
            return 0
        pthread_mutex_lock(&mine.lock)
        while count < limit and mine.first != NULL:
            done[count] = mine.first
            mine.first = mine.first.next
            count += 1
        if mine.first == NULL:
            mine.last = &mine.first
        mine.count -= <uint32_t>count
        pthread_mutex_unlock(&mine.lock)
        return count

    cdef bint arm(self) noexcept nogil:
        cdef bint ready
        pthread_mutex_lock(&self.done.lock)
        ready = self.done.first != NULL
        self.done.armed = not ready
        pthread_mutex_unlock(&self.done.lock)
        return ready

    cdef void disarm(self) noexcept nogil:
        pthread_mutex_lock(&self.done.lock)
        self.done.armed = 0
        pthread_mutex_unlock(&self.done.lock)

    def close(self) -> None:
        """Called when no request is under way; idempotent."""
        cdef Done *done = self.done
        if done == NULL:
            return
        self.done = NULL
        self.completion_fd = -1
        # The thread that brought the last request back may still hold it.
        pthread_mutex_lock(&done.lock)
        pthread_mutex_unlock(&done.lock)
        close(done.fd)
        pthread_mutex_destroy(&done.lock)
        free(done)
