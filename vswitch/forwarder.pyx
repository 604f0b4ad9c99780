"""What one port's transmit queue goes through: which port gets a frame.

Decides on a frame's snapshot; moves bursts between ports; copies nothing itself.

A Forwarder serves one transmit queue of one port. A turn of it: receive a burst, decide
for each frame (drop, flood, or one port), deliver the floods, then what goes to one
port, grouped so that each port is called once; release. What a turn can't finish
(its budget is spent, a receiver is full) goes back to the port and comes again with the
next turn, so nothing points into a guest's memory between turns: the Forwarder keeps
bit masks that say what is done already.

Floods come first: while a destination is being learned, frames of one flow may be
flooded and delivered in the same burst, and the flooded ones are the older.
"""
cimport cython
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from vhostpy.ring.chain cimport scratch_free, scratch_make
from vhostpy.system.hw cimport (
    aligned_alloc, likely, load_acquire_ptr, load_acquire_u64, read_once_u64, ticks, unlikely,
    write_once_u64,
)
from vhostpy.vswitch.care cimport (
    CAREFUL_BURST, care_begin, care_copy, care_passes_over, care_stalled, care_step,
)
from vhostpy.vswitch.port cimport DROPS, Drop, Frame, Port, charge
from vhostpy._ring cimport BURST
from vhostpy.vswitch.masks cimport bits_below, bits_of, leading_zeros, lowest_bit, shifted
from vhostpy.vswitch.table cimport Place, PortTable, Ports, next_member
from vhostpy.vswitch.fdb cimport (
    FDB_UNKNOWN, ForwardingTable, fdb_key, fdb_learn, fdb_lookup, fdb_prepare,
)
from vhostpy.runtime.pool cimport BUDGET_BYTES, BUDGET_FRAMES, BUDGET_STEPS, Pollable, Turn

cdef enum Decision:
    # Where a frame goes: to one port, by its place in the table, else:
    EVERYONE = -1          # to a set of them
    DROPPED = -2           # DROPPED - reason, of Drop


cdef inline const uint64_t *members_of(const PortTable *table, int decision) noexcept nogil:
    """The set of ports that a frame goes to, its sender's among them. Frames that are flooded
    together go to one set."""
    return table.everyone


cdef enum:
    SCATTERED = 8          # frames of a burst that the last burst's destination did not serve

cdef uint64_t ONE = 1


@cython.final
cdef class Forwarder(Pollable):
    """Forwards what one port receives on one queue. Made by Switch.forward()."""

    def __cinit__(self, Ports ports not None, ForwardingTable fdb not None,
                  uint64_t full_wait_ticks, Port port not None, int queue, int kick_fd):
        self.ports = ports
        self.fdb = fdb
        self.full_wait_ticks = full_wait_ticks
        self.port = port
        self.queue = queue
        self.kick_fd = kick_fd
        self.conduct = port.conduct
        self.care.until = port.conduct.until     # 0, unless its rings before were slow
        self.cached_place = DROPPED
        self.burst = <Frame *>aligned_alloc(64, BURST * sizeof(Frame))
        if self.burst == NULL:
            raise MemoryError("forwarder")
        for i in range(BURST):
            self.all[i] = &self.burst[i]

    def __dealloc__(self):
        free(self.burst)
        free(self.care.copies)
        scratch_free(&self.scratch)

    # A turn -------------------------------------------------------------------------

    cdef int poll(self, Turn *turn) noexcept nogil:
        # Pairs with Ports.publish().
        cdef PortTable *table = <PortTable *>load_acquire_ptr(<void **>&self.ports.table)
        cdef int count, limit = BURST
        turn.scratch.used = turn.scratch.steps = turn.scratch.bytes_used = 0
        self.care.on = False
        if unlikely(self.care.until or turn.apart) and care_begin(&self.care, turn):
            # All of a flood that has begun: some ports have it already.
            limit = max(<int>CAREFUL_BURST, 64 - leading_zeros(self.flooding | 1))
        count = self.port.receive(self.queue, self.burst, limit, turn)
        if unlikely(count < 0 and not self.told):
            self.ports.workers.sound_bell()
        self.told = count < 0
        if count <= 0:
            return 0
        if unlikely(self.care.on):
            care_copy(&self.care, self.burst, count)
        # Whatever these have cost, one receiver gets some: or they would never get on.
        turn.steps = max(turn.steps - <int32_t>turn.scratch.steps, 1)
        self.floods = 0
        self.refused = 0
        self.check_pair()
        if not self.all_of_pair(count):
            self.decide(table, bits_below(count) & ~self.done)
        if self.floods:
            self.flood(table, turn)
        self.deliver(table, turn)
        self.finish(count, turn)
        return count

    # Slow memory --------------------------------------------------------------------

    cdef bint stalled(self, uint64_t since, uint64_t end) noexcept nogil:
        return care_stalled(&self.care, self.conduct, since, end)

    cdef int give(self, Place *place, Frame **group, int count, Turn *turn) noexcept nogil:
        """Transmits to a port, unless that is slow; returns how many frames are done with."""
        cdef int taken
        if unlikely((<Port>place.port).slow):
            if care_passes_over(&self.care, <Port>place.port, turn.now):
                (<Port>place.port).count_drop(self.queue, Drop.DROP_RECEIVER_SLOW, count)
                charge(turn, group, count)
                return count
        taken = (<Port>place.port).transmit(self.queue, group, count, turn)
        if unlikely(self.care.on):
            care_step(&self.care, place.port)
        return taken

    cdef bint arm(self) noexcept nogil:
        # What was put back counts as being there.
        return self.port.arm(self.queue)

    cdef void disarm(self) noexcept nogil:
        self.port.disarm(self.queue)

    # Deciding -----------------------------------------------------------------------

    cdef void check_pair(self) noexcept nogil:
        """Forgets the last pair where its answer may have changed."""
        # Read before the table is: a change in between makes the next turn look again.
        cdef uint64_t changes = load_acquire_u64(&self.fdb.changes)
        if changes != self.cached_changes:
            self.cached_changes = changes
            self.cached_place = DROPPED

    cdef bint all_of_pair(self, int count) noexcept nogil:
        """The whole burst is of the last pair, the usual case: then all is decided."""
        cdef const Frame *frame
        cdef int64_t size = 0
        cdef int i
        if self.done | self.flooding or self.cached_place < 0:
            return False
        for i in range(count):
            frame = &self.burst[i]
            if not self.is_cached(frame):
                return False
            self.places[i] = self.cached_place
            size += frame.length
        self.unicasts = bits_below(count)
        self.alike = True
        self.unicast_bytes = size
        self.looked_up = 0
        return True

    cdef void decide(self, PortTable *table, uint64_t todo) noexcept nogil:
        """Sorts the frames of `todo` into floods, unicasts and dropped ones."""
        cdef uint16_t dropped[DROPS]
        cdef bint any_dropped = False
        cdef int i, place
        cdef uint64_t bit
        cdef bint prepared = self.looked_up > SCATTERED
        memset(dropped, 0, sizeof(dropped))
        # Where many talk to many, the table is not in the cache: 1 MB of it, at its largest.
        if prepared:
            self.prepare_all(todo)
        self.looked_up = 0
        self.unicasts = 0
        self.unicast_bytes = 0
        self.alike = True
        while todo:
            i = lowest_bit(todo)
            bit = ONE << i
            todo &= todo - 1
            if (self.cached_place >= 0 and self.is_cached(&self.burst[i])
                    and not self.flooding & bit):
                place = self.cached_place
            # What some ports have already is flooded on, whatever was learned since.
            elif self.flooding & bit and not self.burst[i].fault:
                place = EVERYONE
            else:
                if not prepared:
                    self.prepare(i)
                place = self.verdict(table, i)
            self.places[i] = place
            if likely(place >= 0):
                self.unicasts |= bit
                self.alike &= place == self.places[lowest_bit(self.unicasts)]
                self.unicast_bytes += self.burst[i].length
            elif place == EVERYONE:
                self.floods |= bit
            else:
                dropped[DROPPED - place] += 1
                any_dropped = True
                self.done |= bit
        if any_dropped:
            for i in range(<int>DROPS):
                if dropped[i]:
                    self.port.count_drop(self.queue, i, dropped[i])

    cdef void prepare(self, int i) noexcept nogil:
        cdef const Frame *frame = &self.burst[i]
        self.destinations[i] = fdb_prepare(self.fdb, fdb_key(frame.vlan, frame.head))
        self.sources[i] = fdb_prepare(self.fdb, fdb_key(frame.vlan, frame.head + 6))

    cdef void prepare_all(self, uint64_t todo) noexcept nogil:
        """What the table knows of these frames' addresses comes while others are looked at."""
        cdef int i
        while todo:
            i = lowest_bit(todo)
            todo &= todo - 1
            self.prepare(i)

    cdef bint is_cached(self, const Frame *frame) noexcept nogil:
        # Destination and source: the first 12 bytes of the snapshot.
        return ((<const uint64_t *>frame.head)[0] == self.cached_pair[0]
                and (<const uint32_t *>frame.head)[2] == self.cached_pair[1]
                and not frame.fault and frame.vlan == self.cached_vlan)

    cdef int verdict(self, PortTable *table, int i) noexcept nogil:
        """A place in the table, or a Decision, for a frame that is prepared; learns its source."""
        cdef const Frame *frame = &self.burst[i]
        cdef int place
        if unlikely(frame.fault):
            return DROPPED - (<int>frame.fault - 1)
        if frame.head[6] & 1:
            return DROPPED - Drop.DROP_BAD_SOURCE
        self.looked_up += 1
        fdb_learn(self.fdb, self.sources[i], self.port.index)
        if table.attached < 2:
            return DROPPED - Drop.DROP_NO_DESTINATION
        if frame.head[0] & 1:
            return EVERYONE
        place = fdb_lookup(self.fdb, self.destinations[i])
        if place == FDB_UNKNOWN or place >= table.count or table.places[place].port == NULL:
            return EVERYONE
        if place == self.port.index:
            return DROPPED - Drop.DROP_REFLECTED
        self.cached_pair[0] = (<const uint64_t *>frame.head)[0]
        self.cached_pair[1] = (<const uint32_t *>frame.head)[2]
        self.cached_vlan = frame.vlan
        self.cached_place = place
        return place

    # Floods -------------------------------------------------------------------------

    cdef void flood(self, PortTable *table, Turn *turn) noexcept nogil:
        """Copies to all other ports, as far as the budget goes."""
        self.flooding &= self.floods
        while True:
            if not self.flooding:
                self.start_flood(turn)
                if not self.flooding:
                    return
            if not self.flood_on(table, turn):
                return
            self.done |= self.flooding
            self.floods &= ~self.flooding
            self.flooding = 0

    cdef void start_flood(self, Turn *turn) noexcept nogil:
        """Chooses the oldest floods, as many as one port's share of a turn has room for."""
        cdef uint64_t todo = self.floods
        cdef int32_t frames = turn.frames
        cdef int64_t size = turn.bytes
        cdef int i
        self.next_port = 0
        while todo and frames > 0 and size > 0:
            i = lowest_bit(todo)
            todo &= todo - 1
            self.flooding |= ONE << i
            frames -= 1
            size -= self.burst[i].length

    cdef bint flood_on(self, PortTable *table, Turn *turn) noexcept nogil:
        """Goes on with the chosen floods from port to port; True when all have them."""
        cdef uint64_t todo = self.flooding
        cdef const uint64_t *members = members_of(table, self.places[lowest_bit(todo)])
        cdef int count = 0, taken, i
        cdef Place *place
        while todo:
            i = lowest_bit(todo)
            todo &= todo - 1
            self.group[count] = &self.burst[i]
            count += 1
        while True:
            self.next_port = next_member(table, members, self.next_port)
            if self.next_port >= table.count:
                return True
            place = &table.places[self.next_port]
            if self.next_port != self.port.index:
                if turn.frames <= 0 or turn.bytes <= 0 or turn.steps <= 0:
                    return False
                # Copies never wait for a receiver: one full port would stop all.
                taken = self.give(place, self.group, count, turn)
                if taken < count:
                    (<Port>place.port).count_drop(self.queue, Drop.DROP_RECEIVER_FULL,
                                                  count - taken)
                    charge(turn, &self.group[taken], count - taken)
            self.next_port += 1

    # To one port --------------------------------------------------------------------

    cdef void deliver(self, PortTable *table, Turn *turn) noexcept nogil:
        cdef uint64_t todo = self.unicasts
        cdef int place, count, first
        if todo == 0:
            return
        first = lowest_bit(todo)
        count = bits_of(todo)
        if likely(self.alike and todo >> first == bits_below(count)
                  and count <= turn.frames and self.unicast_bytes <= turn.bytes):
            self.taken_mask = todo
            self.transmit(&table.places[self.places[first]], &self.all[first], count, turn)
            return
        while todo and turn.frames > 0 and turn.bytes > 0 and turn.steps > 0:
            place = self.places[lowest_bit(todo)]
            count = self.gather(todo, place, turn)
            todo &= ~self.group_mask
            self.transmit(&table.places[place], self.group, count, turn)

    cdef int gather(self, uint64_t todo, int place, Turn *turn) noexcept nogil:
        """Collects the frames of `todo` that go to `place`: as many as the budget allows
        into `group`, all of them into `group_mask` (none may overtake those before it)."""
        cdef int32_t frames = turn.frames
        cdef int64_t size = turn.bytes
        cdef int count = 0, i
        self.group_mask = 0
        self.taken_mask = 0
        while todo:
            i = lowest_bit(todo)
            todo &= todo - 1
            if self.places[i] != place:
                continue
            self.group_mask |= ONE << i
            if frames > 0 and size > 0:
                self.taken_mask |= ONE << i
                self.group[count] = &self.burst[i]
                count += 1
                frames -= 1
                size -= self.burst[i].length
        return count

    cdef void transmit(self, Place *place, Frame **group, int count, Turn *turn) noexcept nogil:
        """Gives a group to its receiver. What does not fit waits, or is dropped."""
        cdef int taken = self.give(place, group, count, turn)
        cdef uint64_t now = turn.now if turn.now else 1
        cdef uint64_t full_since = read_once_u64(&place.full_since)
        cdef int i, dropped = 0
        cdef uint64_t bit
        if likely(taken == count):
            self.done |= self.taken_mask
            if full_since:
                write_once_u64(&place.full_since, 0)
            return
        for i in range(taken):
            self.done |= ONE << (group[i] - self.burst)
        if taken > 0 or full_since == 0:
            full_since = now
            write_once_u64(&place.full_since, now)
        for i in range(taken, count):
            bit = ONE << (group[i] - self.burst)
            if self.waited_enough(bit, full_since, now):
                self.done |= bit
                dropped += 1
            else:
                self.refused |= bit
        if dropped:
            (<Port>place.port).count_drop(self.queue, Drop.DROP_RECEIVER_FULL, dropped)

    cdef bint waited_enough(self, uint64_t bit, uint64_t full_since,
                            uint64_t now) noexcept nogil:
        """The frame's own time is up, or its receiver has taken nothing for so long: then
        it gets no further wait until it does. Signed: clocks of cores may differ."""
        cdef int64_t limit = self.full_wait_ticks
        if <int64_t>(now - full_since) >= limit:
            return True
        return self.waiting & bit != 0 and <int64_t>(now - self.waiting_since) >= limit

    cdef void finish(self, int count, Turn *turn) noexcept nogil:
        """Releases the done prefix, puts the rest back, and moves the masks with it."""
        cdef uint64_t undone = bits_below(count) & ~self.done
        cdef int prefix = lowest_bit(undone) if undone else count
        # A new wait starts only when all frames of the one before are gone: so one
        # clock is enough, and no frame waits longer than twice the limit.
        self.waiting &= ~self.done
        if not self.waiting and self.refused:
            self.waiting = self.refused
            self.waiting_since = turn.now
        if prefix:
            self.port.release(self.queue, self.burst, prefix)
        if prefix < count:
            self.port.put_back(self.queue, &self.burst[prefix], count - prefix)
        self.done = shifted(self.done, prefix)
        self.flooding = shifted(self.flooding, prefix)
        self.waiting = shifted(self.waiting, prefix)

    # Control's ----------------------------------------------------------------------

    cdef int settle(self) except -1:
        """The queue stops, and no worker polls it any more. The next back-end of its ring
        must not send again what was delivered: the ring goes on behind that, and frames
        that still waited before it are dropped."""
        cdef uint64_t begun = self.done | (self.flooding if self.next_port else 0)
        cdef uint64_t lost
        cdef int count
        if not begun:
            return 0
        self.make_scratch()
        count = 64 - leading_zeros(begun)
        lost = bits_below(count) & ~self.done
        with nogil:      # it may call the driver
            if lost:
                self.port.count_drop(self.queue, Drop.DROP_STOPPED, bits_of(lost))
            self.port.skip(self.queue, count, &self.scratch)
        self.done = self.flooding = self.waiting = 0
        return 0

    cdef int make_scratch(self) except -1:
        if self.scratch.segments == NULL:
            scratch_make(&self.scratch)
        return 0

    # Doors --------------------------------------------------------------------------

    def turn(self, frames: int = BUDGET_FRAMES, size: int = BUDGET_BYTES,
             steps: int = BUDGET_STEPS, now: int | None = None) -> int:
        """One poll with that budget, on this thread: only while no worker polls it."""
        cdef Turn turn
        cdef int found
        self.make_scratch()
        memset(&turn, 0, sizeof(turn))
        turn.scratch = &self.scratch
        turn.now = ticks() if now is None else now
        turn.frames = frames
        turn.bytes = size
        turn.steps = steps
        with nogil:
            found = self.poll(&turn)
        return found
