"""One connection to an NBD server: commands survive its loss. Plain C."""
from libc.stdint cimport uint32_t, uint64_t

from vhostpy.backends.storage.nbd_commands cimport Commands
from vhostpy.backends.storage.completions cimport pthread_mutex_t
from vhostpy.backends.storage.libnbd cimport nbd_handle
from vhostpy.backends.storage.storage cimport Request

cdef enum:
    REASON_BYTES = 200

cdef enum Event:
    # Why serve() returned.
    STOPPED
    LOST                    # the connection; serve() goes on with mending it
    MENDED
    GAVE_UP                 # requests fail from now on, until the server answers again

cdef struct Watch:
    # Of one channel.
    int epoll_fd
    uint32_t generation     # of the socket that is in it; 0: none
    short events            # of poll(2), that are watched for

cdef struct Link:
    # What it is to do; set before its thread starts.
    char *uri
    # Structured replies spare holes, and cost both sides two more system calls a read: on
    # the same machine that is the larger part.
    bint local
    uint32_t shares         # the disk has other connections: a flush must cover those, too
    uint64_t silence_ns     # a server that has requests and says nothing for so long is dead
    uint64_t give_up_ns     # requests wait so long for a new connection
    # Between the thread and others.
    uint32_t stopping
    int wake_fd             # the thread's
    pthread_mutex_t lock    # of all below; who holds it drives the connection
    nbd_handle *nbd         # NULL: no connection
    int fd                  # its socket
    uint32_t generation     # of the socket; counts from 1
    bint given_up           # requests fail at once
    bint dropped            # the connection is of no more use: the thread is to close it
    uint64_t heard_ns       # when the server last gave a sign of life
    uint64_t heard_bytes    # of commands that are done
    uint64_t up_ns          # when the connection was made
    bint answered           # it has brought an answer
    bint wants_room         # it had to wait for room in the socket, when it was last driven
    uint64_t down_ns        # when the last connection that was of use was lost
    int pause_ms            # before the next attempt to connect
    Commands commands
    uint32_t sent           # commands that the server has
    char reason[REASON_BYTES]   # why the connection was lost or cannot be made
    int reason_errno
    # What the server said, written while there is no connection; the first one's word counts.
    uint64_t size_bytes
    bint read_only
    bint can_flush
    bint can_trim
    bint can_zero
    bint can_multi_conn

cdef Link *new_link(const char *uri, double silence_s, double give_up_s) noexcept nogil
# NULL: no memory, or no fd.
cdef void close_link(Link *link) noexcept nogil
# Its fds. The thread has ended; put(), drive() and attend() do nothing from now on.
cdef void free_link(Link *link) noexcept nogil
# Nobody uses it any more.
cdef int connect(Link *link, double limit_s) noexcept nogil
# 0; or -1 and a `reason`. May wait for the resolver of host names, without a bound.
cdef Event serve(Link *link) noexcept nogil
# What its thread does, until something happens that an operator should know; call it
# again unless it says STOPPED.
cdef void stop(Link *link) noexcept nogil
# Any thread: serve() fails what is under way, hangs up, and says STOPPED.

cdef int start_watch(Watch *watch, int fd) noexcept nogil
# With this fd in it, besides the socket; -1 and errno.

# Any thread; these never wait.
cdef bint put(Link *link, Request **burst, int count) noexcept nogil
# Requests whose `home` is the Done that they come back to. False: somebody else drives
# the connection, so try again.
cdef void drive(Link *link) noexcept nogil
# Takes answers, and sends what could not be sent before.
cdef bint attend(Link *link, Watch *watch) noexcept nogil
# Before sleeping with requests under way: its epoll_fd becomes readable when drive() would
# find something; after a new connection the Done is called. True: look again now.
cdef void leave(Link *link, Watch *watch) noexcept nogil
# Before sleeping without: the answers to others need not wake us.
