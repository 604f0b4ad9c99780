"""How a storage's own threads give requests back to the worker that polls a channel."""
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport write

from vhostpy.system.hw cimport store_release_u32
from vhostpy.backends.storage.storage cimport Channel, Request

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

cdef struct Done:
    # Requests that came back. Plain C: a thread needs no object to reach it.
    pthread_mutex_t lock
    Request *first
    Request **last
    uint32_t count          # also read without the lock
    uint32_t armed
    int fd

cdef inline void ring(Done *done) noexcept nogil:
    # Wants the lock, which close() takes: the fd is still ours.
    cdef uint64_t one = 1
    if done.armed:
        done.armed = 0
        write(done.fd, &one, sizeof(one))

cdef inline void put_done(Done *done, Request *request) noexcept nogil:
    # Any thread. The request is the channel's user's from here on.
    request.next = NULL
    pthread_mutex_lock(&done.lock)
    done.last[0] = request
    done.last = &request.next
    store_release_u32(&done.count, done.count + 1)
    ring(done)
    pthread_mutex_unlock(&done.lock)

cdef inline void call_done(Done *done) noexcept nogil:
    # Any thread: the channel is to look again.
    pthread_mutex_lock(&done.lock)
    ring(done)
    pthread_mutex_unlock(&done.lock)

cdef class DoneChannel(Channel):
    # A channel whose requests come back by put_done(); subclasses say submit().
    cdef Done *done
