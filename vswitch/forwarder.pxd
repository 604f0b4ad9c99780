"""What one port's transmit queue goes through: which port gets a frame."""
cimport cython
from libc.stdint cimport int64_t, uint16_t, uint64_t
from vhostpy.vswitch.care cimport Care
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
    cdef Port port
    cdef int queue
    cdef int kick_fd
    cdef bint told           # that the queue is broken

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
    cdef uint16_t cached_vlan
    cdef int cached_place
    cdef int looked_up       # frames of the last burst that were not of that pair

    # Within a turn.
    cdef Frame *burst
    cdef int places[BURST]   # where frames go: a place in the table, or a Decision
    cdef uint64_t destinations[BURST]   # hashes of frames' addresses, once prepared
    cdef uint64_t sources[BURST]
    cdef Frame *group[BURST]
    cdef uint64_t group_mask  # frames that go where the group goes; frames that are in it
    cdef uint64_t taken_mask
    cdef Frame *all[BURST]     # pointers to all of the burst
    cdef uint64_t floods
    cdef uint64_t unicasts
    cdef int64_t unicast_bytes
    cdef bint alike            # all unicasts go to one place
    cdef Care care
    cdef uint64_t refused    # found their receivers full in this turn
    cdef Scratch scratch     # for turn() and settle() only

    cdef int give(self, Place *place, Frame **group, int count, Turn *turn) noexcept nogil
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
