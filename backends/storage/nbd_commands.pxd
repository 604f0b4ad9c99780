"""Requests of any size and any pieces as commands that an NBD server takes."""
from libc.stdint cimport int32_t, uint32_t, uint64_t

from vhostpy.backends.storage.pieces cimport Position
from vhostpy.backends.storage.storage cimport Request

cdef enum:
    COMMANDS = 64           # that a server has at a time, of one connection

cdef enum State:
    FREE
    OPEN                    # to be sent, again
    SENT
    HELD                    # a lead that waits for others

cdef struct Command:
    # A piece of a request, small enough for the server.
    Request *request
    Command *lead           # the first command of the request: counts the others
    Command *next           # of those that are free
    void *link              # whose it is
    uint64_t offset         # bytes, in the export
    uint64_t size
    char *buffer            # guest memory, or `bounce`
    char *bounce            # ours; NULL: none
    Position position       # of the request's pieces: where the data start
    int32_t state           # State
    int32_t pending         # the lead's: commands that are not done
    int32_t result          # the lead's: the first error

cdef struct Commands:
    # Those of one connection, and the requests that it has still to cut.
    Request *first          # not cut up yet, but for the start of the first one
    Request **last
    Command *lead           # of the first one, once it is begun
    uint64_t cut_bytes      # of it that are cut off
    Position cut            # where the next command's data start
    Command all[COMMANDS]
    Command *spare          # free ones
    uint64_t align          # bytes; of offset and size of every command
    uint64_t piece_max      # bytes of one read or write

cdef void start_commands(Commands *commands, void *link) noexcept nogil
cdef Command *cut(Commands *commands) noexcept nogil
# The next one. There must be a request, and a free command.
cdef bint bounce(Command *command) noexcept nogil
# Gives a read or write a buffer of its own, filled if it is a write. False: no memory.
cdef void finish(Commands *commands, Command *command, int result) noexcept nogil
# It is done. With its last command a request goes back to the Done that is its `home`.
cdef void fail_all(Commands *commands) noexcept nogil
# Of what came so far, and is not on its way to a server.
cdef void call_all(Commands *commands) noexcept nogil
# Every channel that waits for one of them is to look again.
