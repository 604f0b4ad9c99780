"""One connection to an NBD server: requests become commands, survive its loss, come back.

libnbd speaks the protocol. Here is what it leaves open: requests of any size and any pieces
become commands that the server takes, and when the connection is lost they are sent again
over the next one. NBD answers in any order and promises none, so sending all of them again
is right; it is reads and idempotent writes of ranges that the guest holds still for.

Data go straight between the socket and guest memory where a command's data lie in one
piece; else through a buffer. What is sent again always goes through a buffer: if it was
guest memory that broke the connection (its file has shrunk: EFAULT), then our own copy
finds out which, where such a fault is contained.

Source: NBD protocol, "Transmission phase"; libnbd(3).
"""
from libc.errno cimport EIO, ENOMEM, ENOTCONN
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strdup, strncpy
from posix.unistd cimport close, read, write

from vhostpy._hw cimport clock_ns, load_acquire_u32, store_release_u32
from vhostpy.backends.storage._done cimport (
    Done, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, put_done,
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
    FREE, OPEN, SENT, HELD      # OPEN: to be sent, again; HELD: a lead that waits for others

    PIECE_MAX = 1 << 20         # bytes of one command
    BOUNCE_MAX = 1 << 18        # the same, through a buffer
    DIRECT_MIN = 1 << 16        # a shorter piece of a longer request is not worth a command
    CLEAR_MAX = 1 << 30         # of one trim or zero; the protocol counts in 32 bits
    ALIGN_MAX = 4096

    NS = 1_000_000_000
    NS_PER_MS = 1_000_000
    CONNECT_S = 5
    PAUSE_MS = 20               # between two attempts to connect, to begin with
    PAUSE_MAX_MS = 1000


# --- Its life ------------------------------------------------------------------------------

cdef Link *new_link(const char *uri, double silence_s, double give_up_s) noexcept nogil:
    cdef Link *link = <Link *>calloc(1, sizeof(Link))
    cdef int i
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
    link.last = &link.first
    link.down_ns = clock_ns()
    for i in range(COMMANDS):
        link.commands[i].link = link
        link.commands[i].next = link.free_commands
        link.free_commands = &link.commands[i]
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
                            or <uint64_t>align > link.align or read_only > link.read_only):
        explain(link, b"the export has become smaller or may not be written any more", 0)
        return -1
    if not link.size_bytes:
        link.align = <uint64_t>align
        link.read_only = read_only
    link.size_bytes = <uint64_t>size
    link.piece_max = PIECE_MAX
    if largest > 0:
        link.piece_max = min(<uint64_t>PIECE_MAX, <uint64_t>largest) & ~(<uint64_t>align - 1)
    link.can_flush = nbd_can_flush(nbd) > 0
    link.can_trim = nbd_can_trim(nbd) > 0
    link.can_zero = nbd_can_zero(nbd) > 0
    link.can_multi_conn = nbd_can_multi_conn(nbd) > 0
    return 0


# --- Requests into commands ----------------------------------------------------------------

cdef void release(Link *link, Command *command) noexcept nogil:
    command.state = FREE
    command.next = link.free_commands
    link.free_commands = command


cdef void settle(Link *link, Command *lead) noexcept nogil:
    """One of the lead's commands is done, or no more of them come."""
    cdef Request *request = lead.request
    lead.pending -= 1
    if lead.pending == 0:
        request.result = lead.result
        release(link, lead)
        put_done(<Done *>request.home, request)


cdef void copy(Command *command, bint to_guest) noexcept nogil:
    """Between `bounce` and the command's part of the request's pieces."""
    cdef int32_t piece = command.piece
    cdef uint64_t at = command.piece_at, done = 0, length
    cdef char *guest
    while done < command.size:
        length = min(command.request.iov[piece].iov_len - at, command.size - done)
        guest = <char *>command.request.iov[piece].iov_base + at
        if to_guest:
            memcpy(guest, command.bounce + done, length)
        else:
            memcpy(command.bounce + done, guest, length)
        done += length
        piece += 1
        at = 0


cdef void finish(Link *link, Command *command, int result) noexcept nogil:
    cdef Command *lead = command.lead
    if result == 0 and command.bounce != NULL and command.request.op == Op.READ:
        copy(command, True)
    free(command.bounce)
    command.bounce = NULL
    if result < 0 and lead.result == 0:
        lead.result = result
    if command == lead:
        command.state = HELD
    else:
        release(link, command)
    settle(link, lead)


cdef bint bounce(Command *command) noexcept nogil:
    """Gives a read or write a buffer of its own, filled if it is a write."""
    if command.bounce == NULL:
        # Zeroed: a server that answers with less must not show the guest our memory.
        command.bounce = <char *>calloc(1, command.size)
        if command.bounce == NULL:
            return False
        if command.request.op == Op.WRITE:
            copy(command, False)
    command.buffer = command.bounce
    return True


cdef uint64_t contiguous(Request *request, int32_t piece, uint64_t at) noexcept nogil:
    """Bytes that lie behind each other from there on."""
    cdef uint64_t run = request.iov[piece].iov_len - at
    cdef char *end = <char *>request.iov[piece].iov_base + request.iov[piece].iov_len
    piece += 1
    while piece < request.iov_count and request.iov[piece].iov_base == end:
        run += request.iov[piece].iov_len
        end += request.iov[piece].iov_len
        piece += 1
    return run


cdef Command *cut(Link *link) noexcept nogil:
    """The next command; there is a request, and a free command."""
    cdef Request *request = link.first
    cdef Command *command = link.free_commands
    cdef uint64_t rest, run
    link.free_commands = command.next
    if link.lead == NULL:
        link.lead = command
        link.cut_bytes = link.cut_piece_at = 0
        link.cut_piece = 0
        command.pending = 1             # until the request is cut up
        command.result = 0
    command.state = OPEN
    command.request = request
    command.lead = link.lead
    command.lead.pending += 1
    command.offset = request.offset + link.cut_bytes
    command.buffer = command.bounce = NULL
    rest = request.size - link.cut_bytes
    if request.op == Op.READ or request.op == Op.WRITE:
        command.piece = link.cut_piece
        command.piece_at = link.cut_piece_at
        run = contiguous(request, link.cut_piece, link.cut_piece_at) if rest else 0
        if run >= rest or run >= DIRECT_MIN:
            command.size = min(min(run, rest), link.piece_max)
            command.buffer = (<char *>request.iov[command.piece].iov_base + command.piece_at
                              if rest else NULL)
        else:
            command.size = min(min(rest, <uint64_t>BOUNCE_MAX), link.piece_max)
        if command.size < rest:
            command.size &= ~(link.align - 1)
        advance(link, command.size)
    else:
        command.size = min(rest, <uint64_t>CLEAR_MAX)
    link.cut_bytes += command.size
    return command


cdef void advance(Link *link, uint64_t size) noexcept nogil:
    cdef uint64_t left
    while size > 0:
        left = link.first.iov[link.cut_piece].iov_len - link.cut_piece_at
        if size < left:
            link.cut_piece_at += size
            return
        size -= left
        link.cut_piece += 1
        link.cut_piece_at = 0


cdef void end_cut(Link *link) noexcept nogil:
    """The first request is cut up, or given up."""
    cdef Command *lead = link.lead
    link.first = link.first.next
    if link.first == NULL:
        link.last = &link.first
    link.lead = NULL
    settle(link, lead)


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
        finish(link, command, -error[0])
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
        finish(link, command, 0)
        return
    if op <= Op.WRITE and command.buffer == NULL and not bounce(command):
        finish(link, command, -ENOMEM)
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
        finish(link, command, -(link.reason_errno or EIO))
    else:
        command.state = OPEN
        link.dropped = True


cdef void send_again(Link *link) noexcept nogil:
    """Over a new connection, what the one before did not answer."""
    cdef Command *command
    cdef int i
    for i in range(COMMANDS):
        command = &link.commands[i]
        if command.state != OPEN:
            continue
        if command.request.op <= Op.WRITE and command.size and not bounce(command):
            finish(link, command, -ENOMEM)
        else:
            send(link, command)
        if link.dropped:
            return


cdef void fail_all(Link *link) noexcept nogil:
    """Of what came so far, and is not on its way to a server."""
    cdef Request *request
    cdef int i
    if link.lead != NULL:
        link.lead.result = link.lead.result or -EIO
        end_cut(link)
    for i in range(COMMANDS):
        if link.commands[i].state == OPEN:
            finish(link, &link.commands[i], -EIO)
    while link.first != NULL:
        request = link.first
        link.first = request.next
        request.result = -EIO
        put_done(<Done *>request.home, request)
    link.last = &link.first


# --- The thread ----------------------------------------------------------------------------

cdef void take_inbox(Link *link) noexcept nogil:
    pthread_mutex_lock(&link.lock)
    if link.inbox != NULL:
        link.last[0] = link.inbox
        link.last = link.inbox_last
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
    cdef bint idle
    explain(link, b"the server closed it", 0)
    while True:
        if load_acquire_u32(&link.stopping):
            return STOPPED
        take_inbox(link)
        while link.first != NULL and link.free_commands != NULL and not link.dropped:
            send(link, cut(link))
            if link.cut_bytes >= link.first.size:
                end_cut(link)
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
        if link.commands[i].state == SENT:
            link.commands[i].state = OPEN
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
                fail_all(link)
            elif now - link.down_ns > link.give_up_ns:
                link.given_up = True
                fail_all(link)
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
        fail_all(link)
    return event
