"""virtio-net's data path: a switch port on virtqueue pairs.

Queue pair i is virtqueues 2i (the guest receives) and 2i + 1 (the guest transmits).
What a guest transmits comes out of receive() as views of its buffers; transmit() copies
frames into the buffers that a guest has posted: the only copy on the way from guest to
guest. Source: virtio 1.3, "Network Device / Device Operation".

Guests' memory changes under our hands: what is decided upon was read once, into
`Frame.head`, and it is that copy which the receiver gets. The rest is copied unseen.
"""
cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vhostpy.ring.chain cimport is_one_writable, scratch_free, scratch_make
from vhostpy.system.hw cimport (
    aligned_alloc, atomic_add_i64, likely, load_acquire_ptr, read_once_u32, spin_lock_for,
    spin_unlock, store_release_ptr, ticks_per_us, unlikely, write_once_u32,
)
from vhostpy.runtime.pollable cimport BUDGET_STEPS, Turn
from vhostpy.vswitch.port cimport SNAPSHOT, Drop, Frame, Port, QueueCounters, charge
from vhostpy._ring cimport BURST, Chain, ChainFault, Scratch, Virtqueue
from vhostpy._spec cimport Feature
from vhostpy.backends.net.copy cimport (
    BYTES_AHEAD, fetch, gather, write_whole,
)
from vhostpy.backends.net.pair cimport WINDOW, Pair
from vhostpy.backends.net.release cimport (
    PAUSE_US, Release, release_look, release_push, release_reset, release_show,
)
from vhostpy.backends.net.scatter cimport log_spread, spread
from vhostpy.backends.net.view cimport view, view_whole
from vhostpy.backends.net.counters cimport counters_of, drop_name
from vhostpy.memory.guest cimport Segment

cdef enum:
    # Pieces of the buffers that one transmit() takes: a burst of the longest frames in pages
    # of 2 KiB. What a chain may cost a sender.
    PIECES = 36 * BURST
    # Of unusable buffers: so many descriptors in one transmit(), and it takes no more. Their
    # sender has done nothing.
    FAULTY_MAX = 256
    # An unusable buffer of more descriptors than that is nobody's mistake. After so many of
    # them the ring is broken.
    COSTLY = 64
    COSTLY_MAX = 16
    # Results of collect(), besides a count of chains.
    FULL = 0
    REFUSED = -1           # - reason, of Drop

assert sizeof(Pair) % 64 == 0 and sizeof(QueueCounters) % 64 == 0 and sizeof(Release) == 24


cdef double tick_rate = 0     # ticks a microsecond


@cython.final
cdef class NetPort(Port):
    """A virtio-net device as a port of a switch. `wire` and its like are control's."""

    def __cinit__(self, name, int pairs=4):
        global tick_rate
        cdef size_t size = pairs * sizeof(Pair)
        if not 1 <= pairs <= PAIRS_MAX:
            raise ValueError(f"{pairs} queue pairs are not in 1..{PAIRS_MAX}")
        if tick_rate == 0:
            tick_rate = ticks_per_us()
        self.name = name
        self.pair_limit = pairs
        self.pause_ticks = <uint64_t>(PAUSE_US * tick_rate)
        self.virtqueues = [None] * (2 * pairs)
        self.pairs = <Pair *>aligned_alloc(64, size)
        if self.pairs == NULL:
            raise MemoryError("queue pairs")
        for i in range(pairs):
            # All but the chains: those are pages that most pairs never touch.
            memset(&self.pairs[i], 0, sizeof(Pair) - sizeof(self.pairs[i].chains))
        for i in range(pairs):
            scratch_make(&self.pairs[i].scratch)
            self.pairs[i].scratch.limit = PIECES
        self.negotiated(<uint64_t>1 << Feature.VERSION_1)

    def __dealloc__(self):
        cdef int i
        if self.pairs != NULL:
            for i in range(self.pair_limit):
                scratch_free(&self.pairs[i].scratch)
            free(self.pairs)

    # From the guest -----------------------------------------------------------------

    cdef int receive(self, int queue, Frame *burst, int limit, Turn *turn) noexcept nogil:
        cdef Pair *pair = &self.pairs[queue]
        cdef void *tx = load_acquire_ptr(&pair.tx)
        cdef Chain chains[BURST]
        cdef uint32_t skip = self.header_size
        cdef int count, i
        cdef bint enabled
        if tx == NULL or not (<Virtqueue>tx).is_live():
            return 0
        count = (<Virtqueue>tx).pop(chains, limit, turn.scratch)
        release_look(&pair.release, tx, count > 0, turn.now, self.pause_ticks)
        if count <= 0:
            return count
        # virtio's rule for a disabled queue: its frames are taken and discarded.
        enabled = pair.tx_enabled
        for i in range(count):
            if unlikely(not enabled or not view_whole(&chains[i], &burst[i], skip)):
                view(&chains[i], &burst[i], skip, enabled)
        return count

    cdef void release(self, int queue, const Frame *burst, int count) noexcept nogil:
        cdef Pair *pair = &self.pairs[queue]
        cdef Chain chains[BURST]
        cdef uint64_t size = 0
        cdef uint32_t slots = 0
        cdef int i
        for i in range(count):
            (<uint32_t *>&chains[i].id)[0] = burst[i].cookie
            slots += chains[i].slots
            size += burst[i].length
            if unlikely(burst[i].fault == Drop.DROP_BAD_CHAIN + 1):
                pair.bad_chains[burst[i].head[0]] += 1
        pair.sent.frames_in += count
        pair.sent.bytes_in += size
        release_push(&pair.release, pair.tx, chains, count, slots)

    cdef void put_back(self, int queue, const Frame *burst, int count) noexcept nogil:
        cdef Chain chains[BURST]
        cdef int i
        for i in range(count):
            (<uint32_t *>&chains[i].id)[0] = burst[i].cookie
        (<Virtqueue>self.pairs[queue].tx).rewind(chains, count)

    cdef void skip(self, int queue, int count, Scratch *scratch) noexcept nogil:
        cdef void *tx = load_acquire_ptr(&self.pairs[queue].tx)
        cdef Chain chains[BURST]
        cdef Frame burst[BURST]
        cdef int some, i
        while tx != NULL and count > 0:
            scratch.used = 0
            some = (<Virtqueue>tx).pop(chains, min(count, <int>BURST), scratch)
            if some <= 0:
                return
            for i in range(some):
                view(&chains[i], &burst[i], self.header_size, self.pairs[queue].tx_enabled)
            self.release(queue, burst, some)
            count -= some

    cdef bint arm(self, int queue) noexcept nogil:
        cdef void *tx = load_acquire_ptr(&self.pairs[queue].tx)
        if tx == NULL or not (<Virtqueue>tx).is_live():
            return False
        # A worker may sleep sooner than a sender pauses.
        release_show(&self.pairs[queue].release, tx)
        return (<Virtqueue>tx).arm()

    cdef void disarm(self, int queue) noexcept nogil:
        cdef void *tx = load_acquire_ptr(&self.pairs[queue].tx)
        if tx != NULL and (<Virtqueue>tx).is_live():
            (<Virtqueue>tx).disarm()

    # To the guest -------------------------------------------------------------------

    cdef int transmit(self, int queue, Frame **frames, int count, Turn *turn) noexcept nogil:
        cdef int index = self.receiving_pair(queue)
        cdef Pair *pair = &self.pairs[max(index, 0)]
        cdef void *rx
        cdef int taken = count
        if turn.lock_ticks and unlikely(not spin_lock_for(&pair.lock, turn.lock_ticks)):
            return 0            # its holder waits for something: as if the buffers were full
        rx = load_acquire_ptr(&pair.rx)
        if unlikely(index < 0 or rx == NULL or not pair.rx_enabled
                    or not (<Virtqueue>rx).is_live()):
            pair.received.drops[<int>Drop.DROP_RECEIVER_DOWN] += count
            charge(turn, frames, count)
        else:
            taken = self.fill(pair, frames, count, turn)
            turn.steps -= <int32_t>pair.scratch.steps
        if turn.lock_ticks:
            spin_unlock(&pair.lock)
        return taken

    cdef int receiving_pair(self, int queue) noexcept nogil:
        """The sender's pair modulo the pairs that receive: a flow keeps to one. -1: none."""
        cdef int enabled = <int>read_once_u32(&self.enabled_pairs)
        if enabled == 0:
            return -1
        return self.route[queue if queue < enabled else queue % enabled]

    cdef int fill(self, Pair *pair, Frame **frames, int count, Turn *turn) noexcept nogil:
        """Puts frames into buffers until these run out; returns how many are done with."""
        cdef int done = 0
        pair.have = pair.next = pair.faulty = 0
        pair.scratch.used = pair.scratch.steps = 0
        pair.logging = (<Virtqueue>pair.rx).logging()
        while done < count:
            done += self.put_whole(pair, frames + done, count - done, turn)
            if done == count or not self.put(pair, frames[done], count - done, turn):
                break
            done += 1
        if pair.next:
            (<Virtqueue>pair.rx).push(pair.chains, pair.written, pair.next)
        if pair.next < pair.have:
            (<Virtqueue>pair.rx).rewind(&pair.chains[pair.next], pair.have - pair.next)
        (<Virtqueue>pair.rx).publish()
        return done

    cdef int put_whole(self, Pair *pair, Frame **frames, int count, Turn *turn) noexcept nogil:
        """Writes frames as long as each, and its buffer, is in one piece: the usual case."""
        cdef Chain *chain = &pair.chains[pair.next]
        cdef uint32_t *written = &pair.written[pair.next]
        cdef uint32_t header_size = self.header_size
        cdef uint32_t need
        cdef uint64_t size = 0
        cdef const Frame *frame
        cdef int done = 0, ahead = 0
        cdef int64_t flying = 0
        if pair.logging:
            return 0
        if pair.next == pair.have and pair.faulty < FAULTY_MAX:
            self.pop_more(pair, count, 0)
        count = min(count, pair.have - pair.next)
        while done < count:
            while ahead < count and flying < BYTES_AHEAD:
                if likely(is_one_writable(&chain[ahead])):
                    fetch(frames[ahead], chain[ahead].segments.hva + header_size)
                flying += frames[ahead].length
                ahead += 1
            frame = frames[done]
            need = header_size + frame.length
            if unlikely(frame.count != 1 or frame.length < SNAPSHOT
                        or not is_one_writable(&chain[done])
                        or chain[done].writable_bytes < need):
                break
            write_whole(chain[done].segments.hva, frame, header_size)
            flying -= frame.length
            size += frame.length
            written[done] = need
            done += 1
        pair.next += done
        pair.received.frames_out += done
        pair.received.bytes_out += size
        turn.frames -= done
        turn.bytes -= size
        return done

    cdef int put(self, Pair *pair, Frame *frame, int wanted, Turn *turn) noexcept nogil:
        """Writes one frame into the next buffers, or drops it; 0: they don't suffice now."""
        cdef uint64_t need = <uint64_t>self.header_size + frame.length
        cdef int chains = self.collect(pair, need, wanted)
        if unlikely(chains <= 0):
            if chains == FULL:
                return 0
            pair.received.drops[REFUSED - chains] += 1
            charge(turn, &frame, 1)
            return 1
        spread(frame, self.header_size, &pair.chains[pair.next], &pair.written[pair.next], chains)
        if unlikely(pair.logging):
            log_spread(<Virtqueue>pair.rx, &pair.chains[pair.next], &pair.written[pair.next],
                       chains)
        pair.next += chains
        pair.received.frames_out += 1
        pair.received.bytes_out += frame.length
        charge(turn, &frame, 1)
        return 1

    cdef int collect(self, Pair *pair, uint64_t need, int wanted) noexcept nogil:
        """How many chains from `next` on hold the frame; FULL; or REFUSED - reason.

        Looks at all of them before a byte is written. Unusable ones are given up: they
        go back to the guest with used length 0.
        """
        cdef uint64_t room = 0
        cdef int count = 0, more
        cdef Chain *chain
        while True:
            if pair.next + count == pair.have:
                if unlikely(pair.faulty >= FAULTY_MAX):
                    return REFUSED - Drop.DROP_BUFFER_FAULT
                more = self.pop_more(pair, wanted, count)
                if unlikely(more < 0):
                    return REFUSED - Drop.DROP_RECEIVER_DOWN
                if more == 0:
                    return self.nothing_more(pair, count)
            chain = &pair.chains[pair.next + count]
            if unlikely(chain.writable == 0):
                # A frame's buffers have to be neighbours: those before it are lost too.
                self.give_up(pair, count + 1)
                self.count_fault(pair, chain)
                count = 0
                room = 0
                continue
            room += chain.writable_bytes
            count += 1
            if likely(room >= need):
                return count
            # Mergeable buffers may be short, but the first has to hold the header.
            if not self.mergeable or room < <uint64_t>self.header_size:
                self.give_up(pair, 1)
                return REFUSED - Drop.DROP_BUFFER_TOO_SMALL

    cdef void count_fault(self, Pair *pair, Chain *chain) noexcept nogil:
        """A buffer that nobody can use: its owner hears of it, and pays for it."""
        cdef int cost = chain.walked
        if chain.fault == ChainFault.CHAIN_OK:
            chain.fault = ChainFault.CHAIN_BAD_ORDER     # readable ones only
            cost = chain.readable
        pair.bad_buffers[chain.fault] += 1
        pair.faulty += max(cost, 1)
        if cost > COSTLY:
            pair.costly += 1
            if pair.costly == COSTLY_MAX:
                (<Virtqueue>pair.rx).condemn()

    cdef int nothing_more(self, Pair *pair, int count) noexcept nogil:
        """FULL, unless these are all that there can ever be: not worth a wait then."""
        if count and (count == WINDOW or <uint32_t>count >= (<Virtqueue>pair.rx).size()):
            return REFUSED - Drop.DROP_BUFFER_TOO_SMALL
        return FULL

    cdef void give_up(self, Pair *pair, int count) noexcept nogil:
        memset(&pair.written[pair.next], 0, count * sizeof(uint32_t))
        pair.next += count

    cdef int pop_more(self, Pair *pair, int wanted, int chains) noexcept nogil:
        """Takes buffers: one for each frame to come, more once a frame needs several.
        Returns how many; 0: none now; RING_BROKEN."""
        cdef int limit = min(max(wanted, 16) if chains else wanted, <int>BURST)
        cdef int count
        limit = min(limit, WINDOW - pair.have)
        if limit <= 0:
            return 0
        count = (<Virtqueue>pair.rx).pop(&pair.chains[pair.have], limit, &pair.scratch)
        if count <= 0:
            return count
        pair.have += count
        return count

    # Counters -----------------------------------------------------------------------

    cdef void count_drop(self, int queue, int reason, int count) noexcept nogil:
        cdef Pair *pair
        if reason != Drop.DROP_RECEIVER_FULL and reason != Drop.DROP_RECEIVER_SLOW:
            self.pairs[queue].sent.drops[reason] += count
            return
        pair = &self.pairs[max(self.receiving_pair(queue), 0)]
        # Without the lock: nothing else counts these reasons.
        atomic_add_i64(<int64_t *>&pair.received.drops[reason], count)

    def counters(self) -> list[dict]:
        """One dictionary for each queue pair."""
        return [{"index": i, **counters_of(
            &self.pairs[i].sent, &self.pairs[i].received, self.pairs[i].bad_chains,
            self.pairs[i].bad_buffers)} for i in range(self.pair_limit)]

    # Control ------------------------------------------------------------------------

    def negotiated(self, features: int) -> None:
        """The features that decide the header's form; all rings are held."""
        self.mergeable = features >> Feature.NET_MRG_RXBUF & 1
        self.header_size = 12 if self.mergeable or features >> Feature.VERSION_1 & 1 else 10

    def wire(self, index: int, Virtqueue virtqueue not None) -> None:
        """Puts a virtqueue that is not live into its place."""
        cdef Pair *pair = &self.pairs[self.checked(index) // 2]
        if self.virtqueues[index] is not None:
            raise ValueError(f"{self.name}: virtqueue {index} is in its place already")
        self.virtqueues[index] = virtqueue
        virtqueue.set_lead(self.header_size)
        if index & 1:
            release_reset(&pair.release)
        else:
            pair.costly = 0
        store_release_ptr(&pair.tx if index & 1 else &pair.rx, <void *>virtqueue)
        self.choose_receivers()

    def unwire(self, index: int) -> Virtqueue:
        """Takes it out again, shows the driver what was held back, and returns it.

        It is held, and workers may still look whether it is live: drop the last reference
        only when they have been quiescent once more.
        """
        cdef Pair *pair = &self.pairs[self.checked(index) // 2]
        cdef Virtqueue virtqueue = self.virtqueues[index]
        store_release_ptr(&pair.tx if index & 1 else &pair.rx, NULL)
        self.virtqueues[index] = None
        self.choose_receivers()
        with nogil:      # it may call the driver, whose fd may block us for a while
            virtqueue.publish()
        return virtqueue

    def enable(self, index: int, bint enabled) -> None:
        """SET_VRING_ENABLE."""
        cdef Pair *pair = &self.pairs[self.checked(index) // 2]
        if index & 1:
            pair.tx_enabled = enabled
        else:
            pair.rx_enabled = enabled
        self.choose_receivers()

    cdef int choose_receivers(self) except -1:
        # Workers may read these in between: each value is good by itself, and transmit()
        # looks whether the pair that it finds does receive.
        cdef int i, count = 0
        for i in range(self.pair_limit):
            if self.pairs[i].rx != NULL and self.pairs[i].rx_enabled:
                self.route[count] = <uint8_t>i
                count += 1
        write_once_u32(&self.enabled_pairs, count)
        return 0

    cdef int checked(self, index) except -1:
        if not 0 <= index < 2 * self.pair_limit:
            raise ValueError(f"{self.name}: virtqueue {index} of {2 * self.pair_limit}")
        return index

    # Doors --------------------------------------------------------------------------

    def take(self, queue: int = 0, limit: int = BURST) -> list:
        """Receives a burst and releases it: each frame's bytes, or the name of its fault.
        Where there is none, the sender sees all buffers that were released."""
        cdef Frame burst[BURST]
        cdef Scratch scratch
        cdef Turn turn
        cdef int count = limit, i, number = self.checked(2 * queue) // 2
        if not 0 <= limit <= BURST:
            raise ValueError(f"limit {limit} is not in 0..{BURST}")
        memset(&turn, 0, sizeof(turn))
        scratch_make(&scratch)
        turn.scratch = &scratch
        try:
            with nogil:
                count = self.receive(number, burst, count, &turn)
            frames = [frame_of(&burst[i]) for i in range(count)]
            if count > 0:
                self.release(number, burst, count)
            elif self.virtqueues[2 * number + 1] is not None:
                release_show(&self.pairs[number].release, self.pairs[number].tx)
            return frames
        finally:
            scratch_free(&scratch)

    def give(self, frames, queue: int = 0) -> int:
        """Transmits frames, each a list of pieces or bytes; returns how many it took."""
        cdef Frame burst[BURST]
        cdef Frame *pointers[BURST]
        cdef Segment *segments
        cdef bytes piece
        cdef Turn turn
        cdef int count, i, used = 0, number = queue
        frames = [[f] if isinstance(f, bytes) else list(f) for f in frames]
        if len(frames) > BURST or not 0 <= queue < PAIRS_MAX:
            raise ValueError(f"{len(frames)} frames to queue {queue}")
        segments = <Segment *>calloc(sum(map(len, frames)) + 1, sizeof(Segment))
        if segments == NULL:
            raise MemoryError("segments")
        try:
            memset(burst, 0, sizeof(burst))
            memset(&turn, 0, sizeof(turn))
            turn.steps = BUDGET_STEPS
            for i, pieces in enumerate(frames):
                pointers[i] = &burst[i]
                burst[i].segments = &segments[used]
                burst[i].count = len(pieces)
                for piece in pieces:
                    segments[used].hva = <uint8_t *><char *>piece
                    segments[used].length = len(piece)
                    burst[i].length += len(piece)
                    used += 1
                gather(burst[i].head, burst[i].segments, min(burst[i].length, <uint32_t>SNAPSHOT))
            count = len(frames)
            with nogil:
                count = self.transmit(number, pointers, count, &turn)
            return count
        finally:
            free(segments)


cdef object frame_of(const Frame *frame):
    cdef int i
    if frame.fault:
        return drop_name(frame.fault - 1)
    return b"".join([(<char *>frame.segments[i].hva)[:frame.segments[i].length]
                     for i in range(frame.count)])
