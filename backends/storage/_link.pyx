"""One connection to an NBD server: commands survive its loss.

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
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strdup, strncpy
from posix.unistd cimport close, read, write

from vhostpy._hw cimport clock_ns, load_acquire_u32, store_release_u32
from vhostpy.backends.storage._commands cimport (
    COMMANDS, OPEN, SENT, Command, Commands, bounce, cut, fail_all, finish, start_commands,
)
from vhostpy.backends.storage._done cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from vhostpy.backends.storage._libnbd cimport *
from vhostpy.backends.storage._storage cimport REQUEST_UNMAP, Op, Request

cdef extern from "<errno.h>" nogil:
    int ENOTSUP, ESHUTDOWN

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int timeout_ms)
    short POLLIN, POLLOUT

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int, int)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef enum:
    PIECE_MAX = 1 << 20         # bytes of one command
    ALIGN_MAX = 4096

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
    if link.uri == NULL or link.wake_fd < 0:
        free(link.uri)
        free(link)
        return NULL
    pthread_mutex_init(&link.lock, NULL)
    link.silence_ns = <uint64_t>(silence_s * NS)
    link.give_up_ns = <uint64_t>(give_up_s * NS)
    link.inbox_last = &link.inbox
    link.down_ns = clock_ns()
    start_commands(&link.commands, link)
    return link


cdef void free_link(Link *link) noexcept nogil:
    if link.nbd != NULL:
        nbd_close(link.nbd)
    close(link.wake_fd)
    pthread_mutex_destroy(&link.lock)
    free(link.uri)
    free(link)


# --- From any thread -----------------------------------------------------------------------

cdef void wake(Link *link) noexcept nogil:
    cdef uint64_t one = 1
    write(link.wake_fd, &one, sizeof(one))


cdef void put(Link *link, Request **burst, int count) noexcept nogil:
    cdef bint asleep
    cdef int i
    if count == 0:
        return
    for i in range(count):
        burst[i].next = burst[i + 1] if i + 1 < count else NULL
    pthread_mutex_lock(&link.lock)
    link.inbox_last[0] = burst[0]
    link.inbox_last = &burst[count - 1].next
    asleep = link.asleep
    link.asleep = False
    pthread_mutex_unlock(&link.lock)
    if asleep:
        wake(link)


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
    if handshake(link, nbd, clock_ns() + <uint64_t>(limit_s * NS)) < 0 or accept(link, nbd) < 0:
        nbd_close(nbd)
        return -1
    link.nbd = nbd
    link.dropped = False
    link.heard_ns = clock_ns()
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
    if error[0] == ENOTCONN or error[0] == ESHUTDOWN:
        # Not an answer: the connection is gone, or the server is about to leave.
        command.state = OPEN
        link.dropped = True
        if error[0] == ESHUTDOWN:
            explain(link, b"the server shuts down", 0)
    else:
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


# --- The thread ----------------------------------------------------------------------------

cdef void take_inbox(Link *link) noexcept nogil:
    pthread_mutex_lock(&link.lock)
    if link.inbox != NULL:
        link.commands.last[0] = link.inbox
        link.commands.last = link.inbox_last
        link.inbox = NULL
        link.inbox_last = &link.inbox
    pthread_mutex_unlock(&link.lock)


cdef int sleep(Link *link, pollfd *fds, int count, int timeout_ms) noexcept nogil:
    """Until fds[1] is ready, or something came into the inbox (fds[0])."""
    cdef uint64_t drained
    cdef int ready
    pthread_mutex_lock(&link.lock)
    link.asleep = link.inbox == NULL
    if not link.asleep:
        timeout_ms = 0
    pthread_mutex_unlock(&link.lock)
    fds[0].fd = link.wake_fd
    fds[0].events = POLLIN
    ready = poll(fds, count, timeout_ms)
    pthread_mutex_lock(&link.lock)
    link.asleep = False
    pthread_mutex_unlock(&link.lock)
    if ready > 0 and fds[0].revents:
        read(link.wake_fd, &drained, sizeof(drained))
    return ready


cdef void hear(Link *link) noexcept nogil:
    """Takes answers, each at the price of a recv(), until one is not there or not whole."""
    cdef uint32_t before = link.sent + 1
    while link.sent < before and is_up(link.nbd):
        before = link.sent
        if nbd_aio_notify_read(link.nbd) < 0:
            explain_nbd(link)
        if link.sent == 0 or nbd_aio_get_direction(link.nbd) != LIBNBD_AIO_DIRECTION_READ:
            return


cdef bint exchange(Link *link) noexcept nogil:
    """Waits for the server or the inbox, and talks with the server; False: it is gone."""
    cdef pollfd fds[2]
    cdef unsigned direction = nbd_aio_get_direction(link.nbd)
    cdef uint64_t now
    cdef int timeout_ms = -1
    fds[1].fd = nbd_aio_get_fd(link.nbd)
    fds[1].events = fds[1].revents = 0
    if direction & LIBNBD_AIO_DIRECTION_READ:
        fds[1].events |= POLLIN
    if direction & LIBNBD_AIO_DIRECTION_WRITE:
        fds[1].events |= POLLOUT
    if link.sent:
        now = clock_ns()
        if now - link.heard_ns > link.silence_ns:
            explain(link, b"it says nothing", 0)
            return False
        timeout_ms = <int>((link.silence_ns - (now - link.heard_ns)) / NS_PER_MS) + 1
    if sleep(link, fds, 2, timeout_ms) <= 0 or not fds[1].revents:
        return True
    link.heard_ns = clock_ns()
    # What poll() reports besides, an error or the end, shows when it is read.
    if direction & LIBNBD_AIO_DIRECTION_WRITE and fds[1].revents & POLLOUT:
        if nbd_aio_notify_write(link.nbd) < 0:
            explain_nbd(link)
    elif direction & LIBNBD_AIO_DIRECTION_READ:
        hear(link)
    elif nbd_aio_notify_write(link.nbd) < 0:
        explain_nbd(link)
    return is_up(link.nbd)


cdef Event converse(Link *link) noexcept nogil:
    """While the connection holds."""
    cdef Commands *commands = &link.commands
    cdef bint idle
    explain(link, b"the server closed it", 0)
    while True:
        if load_acquire_u32(&link.stopping):
            return STOPPED
        take_inbox(link)
        while commands.first != NULL and commands.spare != NULL and not link.dropped:
            send(link, cut(commands))
        idle = link.sent == 0
        if link.dropped or not exchange(link) or link.dropped:
            return LOST
        if idle:
            link.heard_ns = clock_ns()  # silence counts from the first request on


cdef void hang_up(Link *link) noexcept nogil:
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


cdef Event mend(Link *link) noexcept nogil:
    """Tries to connect until it works; what waits too long fails meanwhile."""
    cdef pollfd fds[1]
    cdef uint64_t now, next_ns
    cdef int pause_ms = PAUSE_MS
    while True:
        if not load_acquire_u32(&link.stopping) and connect(link, CONNECT_S) == 0:
            return MENDED
        next_ns = clock_ns() + <uint64_t>pause_ms * NS_PER_MS
        pause_ms = min(2 * pause_ms, PAUSE_MAX_MS)
        while True:
            if load_acquire_u32(&link.stopping):
                return STOPPED
            take_inbox(link)
            now = clock_ns()
            if link.given_up:
                fail_all(&link.commands)
            elif now - link.down_ns > link.give_up_ns:
                link.given_up = True
                fail_all(&link.commands)
                return GAVE_UP
            if now >= next_ns:
                break
            sleep(link, fds, 1, <int>((next_ns - now) / NS_PER_MS) + 1)


cdef Event serve(Link *link) noexcept nogil:
    cdef Event event
    if link.nbd == NULL:
        event = mend(link)
        if event == MENDED:
            link.given_up = False
            send_again(link)
    else:
        event = converse(link)
        hang_up(link)
        link.down_ns = clock_ns()
    if event == STOPPED:
        hang_up(link)
        take_inbox(link)
        fail_all(&link.commands)
    return event
