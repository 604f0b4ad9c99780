"""What more than one module takes from the C library, and Cython does not declare."""
from libc.stdint cimport uint32_t, uint64_t
from posix.signal cimport sigset_t

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initval, int flags)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout_ms)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    uint32_t EPOLLIN, EPOLLET

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_setname_np(pthread_t thread, const char *name)

cdef extern from "<sys/resource.h>" nogil:
    struct rusage:
        long ru_nvcsw
    int getrusage(int who, rusage *)
    int RUSAGE_THREAD

cdef extern from "<signal.h>" nogil:
    int pthread_sigmask(int how, const sigset_t *mask, sigset_t *old)
    int SIG_SETMASK

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_t "statfs":
        long f_type
        long f_bsize
    int fstatfs(int fd, statfs_t *)

cdef extern from "<linux/falloc.h>" nogil:
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
