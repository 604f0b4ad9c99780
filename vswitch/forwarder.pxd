"""What one port's transmit queue goes through: which port gets a frame."""
cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from vhostpy.vswitch.port cimport Frame, Port
from vhostpy._ring cimport BURST, Scratch
from vhostpy.runtime.pool cimport Pollable, Turn
from vhostpy.vswitch.table cimport Place, PortTable, Ports
from vhostpy.vswitch.fdb cimport ForwardingTable


@cython.final
cdef class Forwarder(Pollable):
    # One transmit queue of one port: receives its frames and forwards them.
    cdef Ports ports
    cdef ForwardingTable fdb
    cdef uint64_t full_wait_ticks    # how long a frame may wait for its receiver
    cdef uint64_t pause_ticks        # a sender that is silent for so long gets its buffers back
    cdef Port port
    cdef int queue
    cdef int kick_fd
    cdef bint told           # that the queue is broken

    cdef uint64_t received_at        # when there was a frame, last
    cdef uint64_t shown_at           # and when the sender got buffers back that it waited for

    # Between turns. Bit i speaks of frame i of the next burst: what a turn leaves undone
    # goes back to the port and comes again, with what is done already in between.
    cdef uint64_t done       # delivered or dropped
    cdef uint64_t flooding   # on their way: ports below next_port have them
    cdef int next_port
    cdef uint64_t waiting    # found their receivers full at `waiting_since`
    cdef uint64_t waiting_since

    # The last destination looked up.
    cdef uint64_t cached_pair[2]     # the first 12 bytes of its frame
    cdef uint64_t cached_changes
    cdef int cached_place
    cdef int looked_up       # frames of the last burst that were not of that pair

    # Within a turn.
    cdef Frame *burst
    cdef int places[BURST]   # where frames go: a place in the table, or a Verdict
    cdef uint64_t destinations[BURST]   # hashes of frames' addresses, once prepared
    cdef uint64_t sources[BURST]
    cdef Frame *group[BURST]
    cdef uint64_t group_mask  # frames that go where the group goes; those that are in it
    cdef uint64_t taken_mask
    cdef int64_t group_bytes
    cdef Frame *all[BURST]     # pointers to all of the burst
    cdef uint64_t floods
    cdef uint64_t unicasts
    cdef int64_t unicast_bytes
    cdef bint alike            # all unicasts go to one place
    # Where a poll of it was blocked, its own memory or a receiver's may have been the cause.
    # So for a while it copies frames out of the sender's first, and takes times in between.
    cdef uint64_t careful_until      # ticks(); 0: it is not
    cdef uint8_t *copies     # room for a burst of them
    cdef bint careful
    cdef uint64_t step_at            # when the last step ended
    cdef uint64_t slowest            # the longest step of this poll
    cdef void *slowest_port          # borrowed Port, whose memory it was; NULL: the sender's
    cdef uint64_t refused    # found their receivers full in this turn
    cdef Scratch scratch     # for turn() and settle() only

    cdef bint begin_careful(self, Turn *turn) noexcept nogil
    cdef void take_copies(self, int count) noexcept nogil
    cdef void note_step(self, void *port) noexcept nogil
    cdef int give(self, Place *place, Frame **group, int count, Turn *turn) noexcept nogil
    cdef bint is_slow(self, Port port, uint64_t now) noexcept nogil
    cdef void check_pair(self) noexcept nogil
    cdef bint all_of_pair(self, int count) noexcept nogil
    cdef void decide(self, PortTable *table, uint64_t todo) noexcept nogil
    cdef bint is_cached(self, const Frame *frame) noexcept nogil
    cdef void prepare(self, int i) noexcept nogil
    cdef void prepare_all(self, uint64_t todo) noexcept nogil
    cdef int verdict(self, PortTable *table, int i) noexcept nogil
    cdef void flood(self, PortTable *table, Turn *turn) noexcept nogil
    cdef void start_flood(self, Turn *turn) noexcept nogil
    cdef bint flood_on(self, PortTable *table, Turn *turn) noexcept nogil
    cdef void deliver(self, PortTable *table, Turn *turn) noexcept nogil
    cdef int gather(self, uint64_t todo, int place, Turn *turn) noexcept nogil
    cdef void transmit(self, Place *place, Frame **group, int count, Turn *turn) noexcept nogil
    cdef bint waited_enough(self, uint64_t bit, uint64_t full_since, uint64_t now) noexcept nogil
    cdef void finish(self, int count, Turn *turn) noexcept nogil
    cdef int settle(self) except -1
    cdef int make_scratch(self) except -1
