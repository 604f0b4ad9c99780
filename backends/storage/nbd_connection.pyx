"""One connection to an NBD server: commands survive its loss.

Whoever holds its lock drives it: a worker, when it has requests for it or looks for answers,
and never waits for the lock. Its thread does what may take long: it connects, watches for the
end of the connection, and makes the next one. Only the thread makes and closes a handle.

libnbd speaks the protocol. Here is what it leaves open: when the connection is lost,
commands are sent again over the next one. NBD answers in any order and promises none, so
sending all of them again is right; it is reads and idempotent writes of ranges that the
guest holds still for.

What is sent again always goes through a buffer: if it was guest memory that broke the
connection (its file has shrunk: EFAULT), then our own copy finds out which, where such a
fault is contained.

Source: NBD protocol, "Transmission phase"; libnbd(3).
"""
from libc.errno cimport EIO, ENOMEM, ENOTCONN
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strdup, strncpy
from posix.unistd cimport close, read, write

from vhostpy.system.hw cimport clock_ns, load_acquire_u32, store_release_u32
from vhostpy.system.linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD,
    epoll_create1, epoll_ctl, epoll_event, eventfd,
)
from vhostpy.backends.storage.nbd_commands cimport (
    COMMANDS, OPEN, SENT, Command, Commands, bounce, call_all, cut, fail_all, finish,
    start_commands,
)
from vhostpy.backends.storage.completions cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_trylock,
    pthread_mutex_unlock,
)
from vhostpy.backends.storage.libnbd cimport *
from vhostpy.backends.storage.storage cimport REQUEST_UNMAP, Op, Request

cdef extern from "<errno.h>" nogil:
    int ENOTSUP, ESHUTDOWN

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int timeout_ms)
    short POLLIN, POLLOUT, POLLRDHUP

cdef enum:
    PIECE_MAX = 1 << 19         # bytes of one command
    ALIGN_MAX = 4096
    HEAR_MAX = 1 << 18          # a worker that took so many bytes takes no further answer now

    NS = 1_000_000_000
    NS_PER_MS = 1_000_000
    CONNECT_S = 5
    PAUSE_MS = 20               # between two attempts to connect, to begin with
    PAUSE_MAX_MS = 1000


# --- Its life ------------------------------------------------------------------------------

cdef Link *new_link(const char *uri, double silence_s, double give_up_s) noexcept nogil:
    cdef Link *link = <Link *>calloc(1, sizeof(Link))
    if link == NULL:
        return NULL
    link.uri = strdup(uri)
    link.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    pthread_mutex_init(&link.lock, NULL)
    link.silence_ns = <uint64_t>(silence_s * NS)
    link.give_up_ns = <uint64_t>(give_up_s * NS)
    link.down_ns = clock_ns()
    start_commands(&link.commands, link)
    if link.uri == NULL or link.wake_fd < 0:
        close_link(link)
        free_link(link)
        return NULL
    return link


cdef void close_link(Link *link) noexcept nogil:
    if link.nbd != NULL:
        nbd_close(link.nbd)
        link.nbd = NULL
    if link.wake_fd >= 0:
        close(link.wake_fd)
        link.wake_fd = -1


cdef void free_link(Link *link) noexcept nogil:
    pthread_mutex_destroy(&link.lock)
    free(link.uri)
    free(link)


cdef void wake(Link *link) noexcept nogil:
    cdef uint64_t one = 1
    write(link.wake_fd, &one, sizeof(one))


cdef void stop(Link *link) noexcept nogil:
    store_release_u32(&link.stopping, 1)
    wake(link)


# --- Connecting ----------------------------------------------------------------------------

cdef void explain(Link *link, const char *text, int number) noexcept nogil:
    link.reason_errno = number
    strncpy(link.reason, text, REASON_BYTES - 1)


cdef void explain_nbd(Link *link) noexcept nogil:
    cdef const char *text = nbd_get_error()
    cdef int number = nbd_get_errno()
    if text == NULL:
        text = b"unknown error"
    explain(link, text, number)


cdef bint is_up(nbd_handle *nbd) noexcept nogil:
    return nbd_aio_is_ready(nbd) > 0 or nbd_aio_is_processing(nbd) > 0


cdef int connect(Link *link, double limit_s) noexcept nogil:
    cdef nbd_handle *nbd = nbd_create()
    if nbd == NULL:
        explain_nbd(link)
        return -1
    nbd_set_uri_allow_local_file(nbd, True)     # tls-psk-file=
    nbd_set_pread_initialize(nbd, False)        # zeros that the answer overwrites
    nbd_set_request_structured_replies(nbd, not link.local)
    if handshake(link, nbd, clock_ns() + <uint64_t>(limit_s * NS)) < 0 or accept(link, nbd) < 0:
        nbd_close(nbd)
        return -1
    explain(link, b"the server closed it", 0)   # unless something else is seen
    pthread_mutex_lock(&link.lock)
    link.nbd = nbd
    link.fd = nbd_aio_get_fd(nbd)
    link.generation += 1
    link.given_up = False
    link.dropped = False
    link.heard_ns = link.up_ns = clock_ns()
    link.answered = False
    link.wants_room = False
    send_again(link)
    send_more(link)
    call_all(&link.commands)            # to watch the new socket
    pthread_mutex_unlock(&link.lock)
    return 0


cdef int handshake(Link *link, nbd_handle *nbd, uint64_t deadline_ns) noexcept nogil:
    if nbd_aio_connect_uri(nbd, link.uri) < 0:
        explain_nbd(link)
        return -1
    while nbd_aio_is_connecting(nbd) > 0 or nbd_aio_is_negotiating(nbd) > 0:
        if load_acquire_u32(&link.stopping):
            explain(link, b"stopped", 0)
            return -1
        if clock_ns() > deadline_ns:
            explain(link, b"the server does not answer", 0)
            return -1
        if nbd_poll(nbd, 50) < 0:
            explain_nbd(link)
            return -1
    if not is_up(nbd):
        explain_nbd(link)
        return -1
    return 0


cdef int accept(Link *link, nbd_handle *nbd) noexcept nogil:
    """Takes the server's word for what the export is; later ones may not take it back."""
    cdef int64_t size = nbd_get_size(nbd)
    cdef int64_t align = max(nbd_get_block_size(nbd, LIBNBD_SIZE_MINIMUM), 1)
    cdef int64_t largest = nbd_get_block_size(nbd, LIBNBD_SIZE_MAXIMUM)
    cdef bint read_only = nbd_is_read_only(nbd) > 0
    if size < 0:
        explain_nbd(link)
        return -1
    if align & (align - 1) or align > ALIGN_MAX or 0 < largest < align:
        explain(link, b"the server wants blocks of a size that no guest has", ENOTSUP)
        return -1
    if link.size_bytes and (<uint64_t>size < link.size_bytes
                            or <uint64_t>align > link.commands.align or read_only > link.read_only):
        explain(link, b"the export has become smaller or may not be written any more", 0)
        return -1
    if load_acquire_u32(&link.shares) and nbd_can_multi_conn(nbd) <= 0:
        explain(link, b"a flush does not cover the disk's other connections any more", 0)
        return -1
    if not link.size_bytes:
        link.commands.align = <uint64_t>align
        link.read_only = read_only
    link.size_bytes = <uint64_t>size
    link.commands.piece_max = PIECE_MAX
    if largest > 0:
        link.commands.piece_max = min(<uint64_t>PIECE_MAX, <uint64_t>largest)
        link.commands.piece_max &= ~(<uint64_t>align - 1)
    link.can_flush = nbd_can_flush(nbd) > 0
    link.can_trim = nbd_can_trim(nbd) > 0
    link.can_zero = nbd_can_zero(nbd) > 0
    link.can_multi_conn = nbd_can_multi_conn(nbd) > 0
    return 0


# --- Commands to the server ----------------------------------------------------------------

cdef int completed(void *user_data, int *error) noexcept nogil:
    """libnbd's: the answer to a command. Runs within its calls, so it calls none of them."""
    cdef Command *command = <Command *>user_data
    cdef Link *link = <Link *>command.link
    link.sent -= 1
    link.heard_bytes += command.size
    if error[0] == ENOTCONN or error[0] == ESHUTDOWN:
        # Not an answer: the connection is gone, or the server is about to leave.
        command.state = OPEN
        link.dropped = True
        if error[0] == ESHUTDOWN:
            explain(link, b"the server shuts down", 0)
    else:
        link.answered = True
        finish(&link.commands, command, -error[0])
    return 1                            # libnbd forgets it


cdef void send(Link *link, Command *command) noexcept nogil:
    cdef nbd_completion_callback callback
    cdef int op = command.request.op
    cdef int64_t cookie = -1
    cdef uint32_t flags = 0 if command.request.flags & REQUEST_UNMAP else LIBNBD_CMD_FLAG_NO_HOLE
    callback.callback = completed
    callback.user_data = command
    callback.free = NULL
    if (not link.can_flush) if op == Op.FLUSH else command.size == 0:
        # Nothing to do. A server without flush has nothing that it could lose.
        finish(&link.commands, command, 0)
        return
    if op <= Op.WRITE and command.buffer == NULL and not bounce(command):
        finish(&link.commands, command, -ENOMEM)
        return
    command.state = SENT
    link.sent += 1                      # before: the answer may come within the call
    if op == Op.READ:
        cookie = nbd_aio_pread(link.nbd, command.buffer, command.size, command.offset,
                               callback, 0)
    elif op == Op.WRITE:
        cookie = nbd_aio_pwrite(link.nbd, command.buffer, command.size, command.offset,
                                callback, 0)
    elif op == Op.FLUSH:
        cookie = nbd_aio_flush(link.nbd, callback, 0)
    elif op == Op.DISCARD:
        cookie = nbd_aio_trim(link.nbd, command.size, command.offset, callback, 0)
    else:
        cookie = nbd_aio_zero(link.nbd, command.size, command.offset, callback, flags)
    if cookie >= 0:
        return
    link.sent -= 1
    explain_nbd(link)
    if is_up(link.nbd):                 # libnbd would not even ask the server
        finish(&link.commands, command, -(link.reason_errno or EIO))
    else:
        command.state = OPEN
        link.dropped = True


cdef void send_again(Link *link) noexcept nogil:
    """Over a new connection, what the one before did not answer."""
    cdef Command *command
    cdef int i
    for i in range(COMMANDS):
        command = &link.commands.all[i]
        if command.state != OPEN:
            continue
        if command.request.op <= Op.WRITE and command.size and not bounce(command):
            finish(&link.commands, command, -ENOMEM)
        else:
            send(link, command)
        if link.dropped:
            return


cdef void send_more(Link *link) noexcept nogil:
    cdef Commands *commands = &link.commands
    if link.sent == 0:
        link.heard_ns = clock_ns()      # silence counts from the first command on
    while commands.first != NULL and commands.spare != NULL and not link.dropped:
        send(link, cut(commands))


cdef int look(Link *link, pollfd *socket) noexcept nogil:
    """What libnbd waits for on the socket; > 0 if some of it is there."""
    cdef unsigned direction = nbd_aio_get_direction(link.nbd)
    socket.fd = link.fd
    socket.events = socket.revents = 0
    if direction & LIBNBD_AIO_DIRECTION_READ:
        socket.events |= POLLIN
    if direction & LIBNBD_AIO_DIRECTION_WRITE:
        socket.events |= POLLOUT
    return poll(socket, 1, 0)


cdef void exchange(Link *link) noexcept nogil:
    """Says and hears what can be, without waiting."""
    cdef uint64_t stop_at = link.heard_bytes + HEAR_MAX
    cdef pollfd socket
    cdef bint wants_room
    # Each time a look: told to read where nothing is, libnbd sends nothing until there is.
    while (link.sent and not link.dropped and link.heard_bytes < stop_at
           and look(link, &socket) > 0):
        link.heard_ns = clock_ns()
        # What poll() reports besides, an error or the end, shows when it is read.
        if (nbd_aio_notify_write(link.nbd)
                if socket.revents & POLLOUT or not socket.events & POLLIN
                else nbd_aio_notify_read(link.nbd)) < 0:
            explain_nbd(link)
            link.dropped = True
    send_more(link)
    wants_room = nbd_aio_get_direction(link.nbd) & LIBNBD_AIO_DIRECTION_WRITE != 0
    if wants_room and not link.wants_room:
        # It may be others' commands, who sleep and watch for answers alone.
        call_all(&link.commands)
    link.wants_room = wants_room
    if link.dropped:
        wake(link)


# --- Workers -------------------------------------------------------------------------------

cdef bint put(Link *link, Request **burst, int count) noexcept nogil:
    cdef Commands *commands = &link.commands
    cdef int i
    if pthread_mutex_trylock(&link.lock):
        return False
    for i in range(count):
        commands.last[0] = burst[i]
        commands.last = &burst[i].next
    commands.last[0] = NULL
    if link.given_up:
        fail_all(commands)
    elif link.nbd != NULL and not link.dropped:
        send_more(link)
        if link.dropped:
            wake(link)
    pthread_mutex_unlock(&link.lock)
    return True


cdef void drive(Link *link) noexcept nogil:
    if pthread_mutex_trylock(&link.lock):
        return
    if link.nbd != NULL and not link.dropped:
        exchange(link)
    pthread_mutex_unlock(&link.lock)


cdef bint attend(Link *link, Watch *watch) noexcept nogil:
    cdef pollfd socket
    cdef bint ready = False
    if pthread_mutex_trylock(&link.lock):
        return True
    if link.nbd != NULL and not link.dropped:
        # A look besides: an edge that came while it was polled is gone.
        ready = look(link, &socket) > 0 or not watch_socket(link, watch, &socket)
    pthread_mutex_unlock(&link.lock)
    return ready


cdef int control(Watch *watch, int op, int fd, short events) noexcept nogil:
    cdef epoll_event event
    memset(&event, 0, sizeof(event))
    event.events = <uint32_t>events     # EPOLLIN is POLLIN
    return epoll_ctl(watch.epoll_fd, op, fd, &event)


cdef int start_watch(Watch *watch, int fd) noexcept nogil:
    watch.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    return -1 if watch.epoll_fd < 0 else control(watch, EPOLL_CTL_ADD, fd, POLLIN)


cdef bint watch_socket(Link *link, Watch *watch, const pollfd *socket) noexcept nogil:
    cdef int op = EPOLL_CTL_MOD
    if watch.generation != link.generation:     # closing the socket before ended that
        op = EPOLL_CTL_ADD
    elif watch.events == socket.events:
        return True
    if control(watch, op, socket.fd, socket.events) < 0:
        return False
    watch.generation = link.generation
    watch.events = socket.events
    return True


cdef void leave(Link *link, Watch *watch) noexcept nogil:
    if watch.generation != link.generation or pthread_mutex_trylock(&link.lock):
        return
    if link.nbd != NULL and link.sent and watch.generation == link.generation:
        epoll_ctl(watch.epoll_fd, EPOLL_CTL_DEL, link.fd, NULL)
        watch.generation = 0
    pthread_mutex_unlock(&link.lock)


# --- The thread ----------------------------------------------------------------------------

cdef bint sleep(Link *link, int fd, uint64_t until_ns) noexcept nogil:
    """Until then, or somebody wakes us; True: the server hung up on `fd`."""
    cdef uint64_t drained, now = clock_ns()
    cdef pollfd fds[2]
    if now >= until_ns:
        return False
    fds[0].fd = link.wake_fd
    fds[0].events = POLLIN
    fds[1].fd = fd
    fds[1].events = POLLRDHUP           # of what it says there workers know
    if poll(fds, 2, <int>((until_ns - now) / NS_PER_MS) + 1) <= 0:
        return False
    if fds[0].revents:
        read(link.wake_fd, &drained, sizeof(drained))
    return fds[1].revents != 0


cdef void hang_up(Link *link) noexcept nogil:
    cdef uint64_t now = clock_ns()
    cdef bint lasted = now - link.up_ns >= PAUSE_MAX_MS * NS_PER_MS
    cdef int i
    if link.nbd == NULL:
        return
    if is_up(link.nbd):
        nbd_aio_disconnect(link.nbd, 0)
    # It may or may not tell what becomes of the commands: we know them all.
    nbd_close(link.nbd)
    link.nbd = NULL
    for i in range(COMMANDS):
        if link.commands.all[i].state == SENT:
            link.commands.all[i].state = OPEN
    link.sent = 0
    if lasted:
        link.pause_ms = 0
    if lasted or link.answered:         # else it was as good as none
        link.down_ns = now


cdef uint64_t silent_at_ns(Link *link) noexcept nogil:
    """When it will have said nothing for too long, from now on where it owes nothing."""
    return (link.heard_ns if link.sent else clock_ns()) + link.silence_ns


cdef bint still_up(Link *link, bint hung_up) noexcept nogil:
    """Wants the lock."""
    if not link.dropped and (hung_up or clock_ns() >= silent_at_ns(link)):
        exchange(link)                  # what it said last may still lie there
    if clock_ns() >= silent_at_ns(link):
        explain(link, b"it says nothing", 0)
        link.dropped = True
    return not hung_up and not link.dropped


cdef Event watch_over(Link *link) noexcept nogil:
    """While the connection holds."""
    cdef uint64_t until_ns
    cdef bint hung_up = False
    cdef bint up
    while True:
        if load_acquire_u32(&link.stopping):
            return STOPPED
        pthread_mutex_lock(&link.lock)
        up = still_up(link, hung_up)
        if up:
            until_ns = silent_at_ns(link)
        else:
            hang_up(link)
        pthread_mutex_unlock(&link.lock)
        if not up:
            return LOST
        hung_up = sleep(link, link.fd, until_ns)


cdef void fail(Link *link) noexcept nogil:
    """What waits, and what comes from now on."""
    pthread_mutex_lock(&link.lock)
    hang_up(link)
    link.given_up = True
    fail_all(&link.commands)
    pthread_mutex_unlock(&link.lock)


cdef Event mend(Link *link) noexcept nogil:
    """Tries to connect until it works; what waits too long fails meanwhile."""
    cdef uint64_t next_ns, give_up_ns
    while True:
        next_ns = clock_ns() + <uint64_t>link.pause_ms * NS_PER_MS
        while True:
            if load_acquire_u32(&link.stopping):
                return STOPPED
            give_up_ns = UINT64_MAX if link.given_up else link.down_ns + link.give_up_ns
            if clock_ns() >= give_up_ns:
                fail(link)
                return GAVE_UP
            if clock_ns() >= next_ns:
                break
            sleep(link, -1, min(next_ns, give_up_ns))
        link.pause_ms = min(max(2 * link.pause_ms, <int>PAUSE_MS), <int>PAUSE_MAX_MS)
        if connect(link, CONNECT_S) == 0:
            return MENDED


cdef Event serve(Link *link) noexcept nogil:
    cdef Event event = mend(link) if link.nbd == NULL else watch_over(link)
    if event == STOPPED:
        fail(link)
    return event
