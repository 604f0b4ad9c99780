"""Requests of any size and any pieces as commands that an NBD server takes.

Data go straight between the socket and guest memory where a command's data lie in one
piece; else through a buffer. Knows no connection.

Source: NBD protocol, "Block size constraints".
"""
from libc.errno cimport EIO
from libc.stdint cimport int32_t, uint64_t
from libc.stdlib cimport calloc, free

from vhostpy.backends.storage.completions cimport Done, call_done, put_done
from vhostpy.backends.storage.pieces cimport Position, copy_pieces, skip
from vhostpy.backends.storage.storage cimport Op, Request

cdef enum:
    BOUNCE_MAX = 1 << 18        # bytes of one command, through a buffer
    DIRECT_MIN = 1 << 16        # a shorter piece of a longer request is not worth a command
    CLEAR_MAX = 1 << 30         # of one trim or zero; the protocol counts in 32 bits


cdef void start_commands(Commands *commands, void *link) noexcept nogil:
    cdef int i
    commands.last = &commands.first
    for i in range(COMMANDS):
        commands.all[i].link = link
        release(commands, &commands.all[i])


cdef void release(Commands *commands, Command *command) noexcept nogil:
    command.state = FREE
    command.next = commands.spare
    commands.spare = command


cdef void settle(Commands *commands, Command *lead) noexcept nogil:
    """One of the lead's commands is done, or no more of them come."""
    cdef Request *request = lead.request
    lead.pending -= 1
    if lead.pending == 0:
        request.result = lead.result
        release(commands, lead)
        put_done(<Done *>request.home, request)


cdef void copy(Command *command, bint to_guest) noexcept nogil:
    cdef Position position = command.position
    copy_pieces(command.request, &position, command.bounce, command.size, to_guest)


cdef void finish(Commands *commands, Command *command, int result) noexcept nogil:
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
        release(commands, command)
    settle(commands, lead)


cdef bint bounce(Command *command) noexcept nogil:
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


cdef Command *cut(Commands *commands) noexcept nogil:
    cdef Request *request = commands.first
    cdef Command *command = commands.spare
    cdef uint64_t rest, run
    commands.spare = command.next
    if commands.lead == NULL:
        commands.lead = command
        commands.cut_bytes = commands.cut.at = 0
        commands.cut.piece = 0
        command.pending = 1             # until the request is cut up
        command.result = 0
    command.state = OPEN
    command.request = request
    command.lead = commands.lead
    command.lead.pending += 1
    command.offset = request.offset + commands.cut_bytes
    command.buffer = command.bounce = NULL
    rest = request.size - commands.cut_bytes
    if request.op == Op.READ or request.op == Op.WRITE:
        command.position = commands.cut
        run = contiguous(request, commands.cut.piece, commands.cut.at) if rest else 0
        if run >= rest or run >= DIRECT_MIN:
            command.size = min(min(run, rest), commands.piece_max)
            command.buffer = (<char *>request.iov[commands.cut.piece].iov_base + commands.cut.at
                              if rest else NULL)
        else:
            command.size = min(min(rest, <uint64_t>BOUNCE_MAX), commands.piece_max)
        if command.size < rest:
            command.size &= ~(commands.align - 1)
        skip(request, &commands.cut, command.size)
    else:
        command.size = min(rest, <uint64_t>CLEAR_MAX)
    commands.cut_bytes += command.size
    if commands.cut_bytes >= request.size:
        end_cut(commands)
    return command


cdef void end_cut(Commands *commands) noexcept nogil:
    """The first request is cut up, or given up."""
    cdef Command *lead = commands.lead
    commands.first = commands.first.next
    if commands.first == NULL:
        commands.last = &commands.first
    commands.lead = NULL
    settle(commands, lead)


cdef void fail_all(Commands *commands) noexcept nogil:
    cdef Request *request
    cdef int i
    if commands.lead != NULL:
        commands.lead.result = commands.lead.result or -EIO
        end_cut(commands)
    for i in range(COMMANDS):
        if commands.all[i].state == OPEN:
            finish(commands, &commands.all[i], -EIO)
    while commands.first != NULL:
        request = commands.first
        commands.first = request.next
        request.result = -EIO
        put_done(<Done *>request.home, request)
    commands.last = &commands.first


cdef void call_all(Commands *commands) noexcept nogil:
    cdef Request *request = commands.first
    cdef int i
    for i in range(COMMANDS):
        if commands.all[i].state != FREE:
            call_done(<Done *>commands.all[i].request.home)
    while request != NULL:
        call_done(<Done *>request.home)
        request = request.next
