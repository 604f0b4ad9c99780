"""The packet generator: a driver's queue pairs, filled and emptied by one thread.

It sends as a guest's driver does, whatever comes back: an open loop, since a closed one
shrinks with each frame that is dropped. How much it touches its frames decides what can
be seen of a device (`Touch`): one that never writes leaves all lines in the device's cache.
What frames hold is `frame`'s.
"""
cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from vhostpy.system.hw cimport (
    cpu_pause, likely, load_acquire_u32, prefetch_read, prefetch_write, read_once_u16,
    read_once_u32, read_once_u64, store_release_u32, ticks, ticks_per_us, unlikely,
    write_once_u32, write_once_u64,
)
from vhostpy._ring cimport BURST, DriverVirtqueue, UsedEntry
from vhostpy.load.frame cimport (
    AT_BUFFERS, AT_FRAME, AT_PAYLOAD, AT_SEQUENCE, AT_SIZE, AT_STAMP, AT_TYPE, FRAME_LIMIT,
    OURS, PRIME, SHORT, TEMPLATE_BYTES, TEMPLATES, is_payload, kind_of, station, write_header,
    write_payload,
)
from vhostpy.load.histogram cimport BINS, bin_of, value_of
from vhostpy.memory.guest cimport Segment, translate
from vhostpy.system.notify cimport signal_eventfd, start_watchdog

cdef enum:
    PIECES = 64             # of one frame, at most

    # Lines of the frames to come are fetched so many ahead: the device has them, and one
    # after the other each would cost a way of 150 to 250 cycles. With 48 short ones take
    # longer: 64 B, headers, 222 -> 239 cycles, 256 B 6 % more.
    LINE = 64
    LINES_AHEAD = 24

cpdef enum Touch:
    # What the generator does with its frames' memory, from flattering to unkind.
    NONE = 0                # frames were written once, and are never read
    HEADER = 1              # the first line is written and read
    FRAME = 2               # all of it is written, read and compared

cpdef enum Phase:
    LISTEN = 0              # only receives
    TEACH = 1               # sends a frame from each MAC
    SEND = 2

FRAME_MIN, FRAME_MAX, MACS_MAX = SHORT, FRAME_LIMIT, 65536


cdef inline uint8_t *buffer_of(Side *side, uint16_t id, uint32_t stride) noexcept nogil:
    return side.buffers + <uint64_t>id * stride


cdef inline uint32_t lines_of(uint32_t length) noexcept nogil:
    return (length + LINE - 1) // LINE


cdef inline void fetch(const uint8_t *at, uint32_t lines, bint own) noexcept nogil:
    cdef uint32_t i
    for i in range(lines):
        if own:
            prefetch_write(at + i * LINE)
        else:
            prefetch_read(at + i * LINE)


def mac(port: int, flow: int) -> bytes:
    """The address of a port's station number `flow`."""
    return (<uint64_t>station(port, flow)).to_bytes(6, "little")


@cython.final
cdef class NetGenerator:
    """Sends and receives on all queue pairs; `run` on a thread, the rest from another.

    `pairs`: (rx queue, tx queue, rx buffers' GPA, tx buffers' GPA, port, peer, sends) of
    each; a queue is a `frontend.Queue`. There are as many buffers as descriptors, `stride`
    bytes apart.
    """

    def __cinit__(self, pairs, *, sizes, int touch, bint dirty=True, bint verify=False,
                  bint stamps=False, bint broadcast=False, int room=2048, int stride=2304,
                  int macs=1, int burst=BURST, int window=0, double rate_pps=0.0, int ports=2):
        cdef int i, senders = 0
        cdef uint64_t flows
        if not pairs or not sizes:
            raise ValueError("no queue pair, or no size")
        if not FRAME_MIN <= min(sizes) <= max(sizes) <= FRAME_MAX:
            raise ValueError(f"frames of {min(sizes)} to {max(sizes)} bytes")
        if not 0 < macs <= MACS_MAX or not 0 < burst <= BURST or window < 0:
            raise ValueError("macs, burst or window")
        if not AT_PAYLOAD <= room <= stride or -(-(AT_FRAME + max(sizes)) // room) > PIECES:
            raise ValueError(f"frames of {max(sizes)} bytes in buffers of {room}")
        self.touch, self.dirty, self.verify = touch, dirty, verify
        self.stamps, self.broadcast = stamps, broadcast
        self.room, self.stride, self.macs, self.burst = room, stride, macs, burst
        self.window = window
        self.pieces = -(-(AT_FRAME + max(sizes)) // room)
        self.plain = touch == Touch.HEADER and self.pieces == 1 and not verify and not stamps
        self.rate_us = ticks_per_us()
        self.count = len(pairs)
        self.pairs = <Pair *>calloc(self.count, sizeof(Pair))
        self.size_count = len(sizes)
        self.sizes = <uint32_t *>calloc(self.size_count, sizeof(uint32_t))
        self.template = <uint8_t *>calloc(1, TEMPLATE_BYTES)
        self.histogram = <uint64_t *>calloc(BINS, sizeof(uint64_t))
        flows = <uint64_t>self.count * macs * (ports if broadcast else 1)
        self.seen = <uint64_t *>calloc(flows if verify else 1, sizeof(uint64_t))
        if (self.pairs == NULL or self.sizes == NULL or self.template == NULL
                or self.histogram == NULL or self.seen == NULL):
            raise MemoryError
        from random import Random

        noise = Random(1).randbytes(TEMPLATE_BYTES)
        memcpy(self.template, <const uint8_t *>noise, TEMPLATE_BYTES)
        for i, size in enumerate(sizes):
            self.sizes[i] = size
        self.keep = []
        for i, (rx, tx, rx_gpa, tx_gpa, port, peer, sends) in enumerate(pairs):
            self.pairs[i].port, self.pairs[i].peer, self.pairs[i].sends = port, peer, sends
            senders += bool(sends)
            self._wire(&self.pairs[i].rx, rx, rx_gpa)
            self._wire(&self.pairs[i].tx, tx, tx_gpa)
            self.prepare(&self.pairs[i])
        if rate_pps > 0 and senders:
            self.ticks_per_frame = self.rate_us * 1e6 / rate_pps * senders

    cdef _wire(self, Side *side, queue, gpa):
        cdef DriverVirtqueue ring = queue.ring
        cdef Segment whole
        cdef uint32_t hint = 0
        side.size = ring.size
        if self.pieces > side.size:
            raise ValueError(f"frames of {self.pieces} buffers in a queue of {side.size}")
        side.lengths = <uint32_t *>calloc(side.size, sizeof(uint32_t))
        if side.lengths == NULL:
            raise MemoryError
        if translate(&ring.memory.map, gpa, <uint64_t>side.size * self.stride, &whole, 1,
                     &hint) != 1:
            raise ValueError(f"buffers at {gpa:#x} are not in one piece of memory")
        side.buffers, side.gpa = whole.hva, gpa
        side.kick_fd = -1 if queue.kick is None else queue.kick.fileno()
        ring.disarm()
        side.ring = <void *>ring
        self.keep.append(queue)

    def __dealloc__(self):
        cdef int i
        if self.pairs != NULL:
            for i in range(self.count):
                free(self.pairs[i].rx.lengths)
                free(self.pairs[i].tx.lengths)
        free(self.pairs)
        free(self.sizes)
        free(self.template)
        free(self.histogram)
        free(self.seen)

    # The loop. -----------------------------------------------------------------------------

    cdef void loop(self) noexcept nogil:
        cdef uint64_t now = ticks(), after, started = now, before = self.total_ticks
        cdef uint32_t phase = Phase.LISTEN, wanted
        cdef int found, i
        while not load_acquire_u32(&self.stopping) and not self.broken:
            wanted = load_acquire_u32(&self.phase)
            if wanted != phase:
                phase = wanted
                for i in range(self.count):
                    self.pairs[i].paced_at = <double>now
                    self.pairs[i].heard_at = now
                    self.pairs[i].primes = self.macs if phase == Phase.TEACH else 0
            found = 0
            for i in range(self.count):
                found += self.turn(&self.pairs[i], phase, now)
                if unlikely(self.broken):
                    break
            after = ticks()
            if found:
                self.busy_ticks += after - now
                self.busy_turns += 1
            else:
                cpu_pause()
            self.total_ticks = before + (after - started)
            now = after

    cdef int turn(self, Pair *pair, uint32_t phase, uint64_t now) noexcept nogil:
        cdef int found = self.receive(pair, now), limit
        cdef UsedEntry sent[BURST]
        if pair.sends or pair.primes:
            self.collect(pair, &pair.tx, sent)
            limit = self.allowance(pair, phase, now)
            if limit:
                found += self.send(pair, limit, phase == Phase.TEACH)
        return found

    cdef int collect(self, Pair *pair, Side *side, UsedEntry *used) noexcept nogil:
        cdef int count = (<DriverVirtqueue>side.ring).collect(used, BURST)
        if unlikely(count < 0):
            self.broken = 1 + <int>(pair - self.pairs)
            return 0
        return count

    cdef void kick(self, Pair *pair, Side *side) noexcept nogil:
        if side.kick_fd >= 0:
            pair.count.kicks += 1
            if unlikely(not signal_eventfd(side.kick_fd)):
                self.deaf = True
                self.broken = 1 + <int>(pair - self.pairs)

    # Sending.

    cdef uint32_t allowance(self, Pair *pair, uint32_t phase, uint64_t now) noexcept nogil:
        """How many frames are to be sent now."""
        cdef uint32_t room = (<DriverVirtqueue>pair.tx.ring).ring.free_count
        cdef uint32_t limit = min(room if self.pieces == 1 else room // self.pieces, self.burst)
        cdef uint64_t flying
        cdef double due
        if phase != Phase.SEND:
            return min(limit, pair.primes) if phase == Phase.TEACH else 0
        if not pair.sends:
            return 0
        if self.window:
            flying = pair.sequence - pair.delivered - pair.written_off
            if flying >= self.window:
                # What has not come back for so long has been lost.
                if <double>(now - pair.heard_at) < self.rate_us * 100_000:
                    return 0
                pair.written_off += flying
                pair.heard_at = now
                flying = 0
            limit = min(limit, <uint32_t>(self.window - flying))
        if self.ticks_per_frame > 0:
            due = (<double>now - pair.paced_at) / self.ticks_per_frame
            if due < 1:
                return 0
            if due > pair.tx.size:      # the device does not take them: no burst later on
                pair.paced_at = <double>now - self.ticks_per_frame * pair.tx.size
            if due < limit:
                limit = <uint32_t>due
            pair.paced_at += self.ticks_per_frame * limit
        return limit

    cdef int send(self, Pair *pair, uint32_t limit, bint prime) noexcept nogil:
        cdef Side *side = &pair.tx
        cdef uint64_t bytes
        if likely(self.pieces == 1):
            bytes = self.send_whole(pair, limit, prime)
        else:
            bytes = self.send_long(pair, limit, prime)
        if (<DriverVirtqueue>side.ring).publish():
            self.kick(pair, side)
        if prime:
            pair.primes -= limit
        else:
            pair.count.sent += limit
            pair.count.sent_bytes += bytes
        return limit

    cdef uint64_t send_whole(self, Pair *pair, uint32_t count, bint prime) noexcept nogil:
        """Frames in a buffer each; their bytes."""
        cdef Side *side = &pair.tx
        cdef uint16_t ids[BURST]
        cdef Segment pieces[BURST]
        cdef uint32_t i, ahead = 0, lines
        cdef int flying = 0
        cdef uint64_t bytes = 0
        cdef uint64_t stamp = ticks() if self.stamps else 0
        (<DriverVirtqueue>side.ring).reserve(ids, count)
        self.address(pair, prime)
        for i in range(count):
            pieces[i].gpa = side.gpa + <uint64_t>ids[i] * self.stride
            pieces[i].hva = buffer_of(side, ids[i], self.stride)
            pieces[i].length = self.next_length(pair, ids[i], prime)
            bytes += pieces[i].length - AT_FRAME
        if self.touch:
            for i in range(count):
                flying -= self.lines_touched(pieces[i].length)
                while ahead < count and flying < LINES_AHEAD:
                    lines = self.lines_touched(pieces[ahead].length)
                    fetch(pieces[ahead].hva, lines, True)
                    flying += lines
                    ahead += 1
                self.begin(pair, pieces[i].hva, pieces[i].length - AT_FRAME, prime, stamp)
                stamp = 0       # one frame of each burst is timed
                if self.touch == Touch.FRAME:
                    write_payload(&pieces[i], 1, self.template, pair.sequence)
                pair.sequence += not prime
        (<DriverVirtqueue>side.ring).add_burst(ids, pieces, count, False)
        return bytes

    cdef uint64_t send_long(self, Pair *pair, uint32_t count, bint prime) noexcept nogil:
        """Frames in several buffers each; their bytes."""
        cdef Side *side = &pair.tx
        cdef uint16_t ids[PIECES]
        cdef Segment pieces[PIECES]
        cdef uint32_t length, left
        cdef int used
        cdef uint64_t bytes = 0
        cdef uint64_t stamp = ticks() if self.stamps else 0
        self.address(pair, prime)
        for _ in range(count):
            (<DriverVirtqueue>side.ring).reserve(ids, self.pieces)
            length = left = self.next_length(pair, ids[0], prime)
            used = 0
            while left:
                pieces[used].gpa = side.gpa + <uint64_t>ids[used] * self.stride
                pieces[used].hva = buffer_of(side, ids[used], self.stride)
                pieces[used].length = min(left, self.room)
                if self.touch:
                    fetch(pieces[used].hva, self.lines_touched(pieces[used].length), True)
                left -= pieces[used].length
                used += 1
            if self.touch:
                self.begin(pair, pieces[0].hva, length - AT_FRAME, prime, stamp)
                stamp = 0
                if self.touch == Touch.FRAME:
                    write_payload(pieces, used, self.template, pair.sequence)
                pair.sequence += not prime
            (<DriverVirtqueue>side.ring).add_chain(pieces, used, 0)
            bytes += length - AT_FRAME
        return bytes

    cdef inline uint32_t next_length(self, Pair *pair, uint16_t id, bint prime) noexcept nogil:
        """Of the next frame, with its virtio header."""
        cdef uint32_t size
        if self.touch == Touch.NONE:
            return pair.tx.lengths[id]
        if prime:
            return AT_FRAME + SHORT
        size = self.sizes[pair.size_at]
        pair.size_at = pair.size_at + 1 if pair.size_at + 1 < self.size_count else 0
        return AT_FRAME + size

    cdef inline uint32_t lines_touched(self, uint32_t length) noexcept nogil:
        """Of a buffer; the first one always is."""
        return 1 if self.touch == Touch.HEADER else max(lines_of(min(length, self.room)),
                                                        <uint32_t>1)

    cdef void address(self, Pair *pair, bint prime) noexcept nogil:
        """The header of the frames that follow, as far as their flow decides it."""
        cdef uint32_t flow = pair.flow
        pair.next.destination = 0xffffffffffff if self.broadcast else station(pair.peer, flow)
        pair.next.source = station(pair.port, flow)
        pair.next.kind = kind_of(PRIME if prime else OURS, <uint16_t>(pair - self.pairs), flow)

    cdef inline void begin(self, Pair *pair, uint8_t *at, uint32_t size, bint prime,
                           uint64_t stamp) noexcept nogil:
        """Writes the next frame's header."""
        pair.next.sequence = pair.sequence
        pair.next.stamp = stamp
        pair.next.size = size
        write_header(at, &pair.next)
        if self.macs > 1:
            pair.flow = pair.flow + 1 if pair.flow + 1 < self.macs else 0
            self.address(pair, prime)

    cdef void prepare(self, Pair *pair) noexcept nogil:
        """Writes all buffers once, so that no page is missing later."""
        cdef Segment piece
        cdef uint32_t i, size
        memset(pair.rx.buffers, 0, <uint64_t>pair.rx.size * self.stride)
        memset(pair.tx.buffers, 0, <uint64_t>pair.tx.size * self.stride)
        self.address(pair, False)
        for i in range(pair.tx.size):
            size = self.sizes[i % self.size_count]
            pair.tx.lengths[i] = AT_FRAME + size
            piece.hva = buffer_of(&pair.tx, i, self.stride)
            piece.length = min(AT_FRAME + size, self.room)
            self.begin(pair, piece.hva, size, False, 0)
            write_payload(&piece, 1, self.template, 0)
        pair.flow = 0

    # Receiving.

    cdef int receive(self, Pair *pair, uint64_t now) noexcept nogil:
        cdef Side *side = &pair.rx
        cdef UsedEntry used[BURST]
        cdef uint16_t ids[BURST]
        cdef int count = self.collect(pair, side, used), spare, i
        if self.broken:
            return 0
        spare = (<DriverVirtqueue>side.ring).reserve(ids, BURST)
        if self.touch:
            self.look_at(pair, used, count, ticks() if self.stamps else now)
        else:
            for i in range(count):
                pair.count.received_bytes += used[i].length - AT_FRAME
            pair.count.received += count
        if spare:
            self.post(side, ids, spare)
            if (<DriverVirtqueue>side.ring).publish():
                self.kick(pair, side)
        return count

    cdef void look_at(self, Pair *pair, const UsedEntry *used, int count,
                      uint64_t now) noexcept nogil:
        cdef uint8_t *at
        cdef uint32_t lines
        cdef int i, ahead = 0, flying = 0
        for i in range(count):
            flying -= self.lines_touched(used[i].length)
            while ahead < count and flying < LINES_AHEAD:
                at = buffer_of(&pair.rx, <uint16_t>used[ahead].id, self.stride)
                lines = self.lines_touched(used[ahead].length)
                fetch(at, 1, self.dirty)
                fetch(at + LINE, lines - 1, False)
                flying += lines
                ahead += 1
            at = buffer_of(&pair.rx, <uint16_t>used[i].id, self.stride)
            if not (self.plain and self.is_plain(pair, at, used[i].length, now)):
                self.look(pair, at, used[i].length, now)
            if self.dirty:
                # What a guest's stack does, which builds its own data there.
                write_once_u64(at, 0x5555555555555555)
                write_once_u32(at + 8, 0x55555555)

    cdef void post(self, Side *side, uint16_t *ids, int count) noexcept nogil:
        """Gives the device all buffers that are free; these, to begin with."""
        cdef Segment pieces[BURST]
        cdef int i
        while count:
            for i in range(count):
                pieces[i].gpa = side.gpa + <uint64_t>ids[i] * self.stride
                pieces[i].length = self.room
            (<DriverVirtqueue>side.ring).add_burst(ids, pieces, count, True)
            count = (<DriverVirtqueue>side.ring).reserve(ids, BURST)

    cdef inline bint is_plain(self, Pair *pair, const uint8_t *at, uint32_t length,
                              uint64_t now) noexcept nogil:
        """A frame of which all is right has come, and is counted. False: look()."""
        cdef uint64_t kind = read_once_u64(at + AT_TYPE)
        cdef uint32_t stream = kind >> 16 & 0xffff
        cdef Pair *source
        if unlikely(<uint16_t>kind != OURS or stream >= <uint32_t>self.count
                    or kind >> 32 >= self.macs or length < AT_PAYLOAD or length > self.room
                    or read_once_u32(at + AT_SIZE) != length - AT_FRAME):
            return False
        source = &self.pairs[stream]
        if unlikely(source.peer != pair.port and not self.broadcast):
            return False
        source.delivered += 1
        source.heard_at = now
        pair.count.received += 1
        pair.count.received_bytes += length - AT_FRAME
        return True

    cdef void look(self, Pair *pair, const uint8_t *at, uint32_t length,
                   uint64_t now) noexcept nogil:
        """A buffer of a frame has come; `length` counts the virtio header of the first."""
        cdef uint64_t kind, sequence
        cdef uint32_t stream, size
        cdef Pair *source
        if unlikely(pair.left):
            self.look_on(pair, at, length, now)
            return
        kind = read_once_u64(at + AT_TYPE)
        stream = kind >> 16 & 0xffff
        pair.source = NULL
        if unlikely(self.pieces > 1):
            pair.left = max(read_once_u16(at + AT_BUFFERS), <uint16_t>1) - 1
        if unlikely(<uint16_t>kind != OURS or stream >= <uint32_t>self.count
                    or length < AT_PAYLOAD):
            if <uint16_t>kind == PRIME:
                pair.count.primed += 1
            else:
                pair.count.foreign += 1
            return
        source = &self.pairs[stream]
        if unlikely(source.peer != pair.port and not self.broadcast):
            pair.count.stray += 1
            return
        size = read_once_u32(at + AT_SIZE)
        sequence = read_once_u64(at + AT_SEQUENCE)
        pair.good = length <= self.room
        if self.touch == Touch.FRAME and pair.good:
            pair.good = is_payload(at + AT_PAYLOAD, length - AT_PAYLOAD, sequence % TEMPLATES,
                                   self.template)
        pair.came = length - AT_FRAME
        if unlikely(pair.left):
            pair.source = source
            pair.kind, pair.size, pair.arriving = kind, size, sequence
            pair.stamp = read_once_u64(at + AT_STAMP)
            return
        self.arrived(pair, source, size, read_once_u64(at + AT_STAMP), kind >> 32, sequence, now)

    cdef void look_on(self, Pair *pair, const uint8_t *at, uint32_t length,
                      uint64_t now) noexcept nogil:
        """A later buffer of a frame in several."""
        cdef uint64_t place = pair.arriving % TEMPLATES + pair.came - (AT_PAYLOAD - AT_FRAME)
        pair.left -= 1
        if pair.source == NULL:
            return
        if length > self.room:
            pair.good = 0
        elif self.touch == Touch.FRAME and pair.good:
            pair.good = is_payload(at, length, place, self.template)
        pair.came += length
        if pair.left == 0:
            self.arrived(pair, pair.source, pair.size, pair.stamp, pair.kind >> 32,
                         pair.arriving, now)

    cdef void arrived(self, Pair *pair, Pair *source, uint32_t size, uint64_t stamp,
                      uint64_t flow, uint64_t sequence, uint64_t now) noexcept nogil:
        """The whole frame is there."""
        cdef uint64_t place
        source.delivered += 1
        source.heard_at = now
        pair.count.received += 1
        pair.count.received_bytes += pair.came
        if stamp and self.stamps:
            self.histogram[bin_of(now - stamp)] += 1
        if unlikely(size != pair.came or not pair.good or flow >= self.macs):
            pair.count.corrupt += 1
        elif self.verify:
            place = <uint64_t>(source - self.pairs)
            if self.broadcast:
                place += <uint64_t>pair.port * self.count
            place = place * self.macs + flow
            if sequence < self.seen[place]:
                pair.count.disordered += 1
            else:
                self.seen[place] = sequence + 1

    # Control's side. -----------------------------------------------------------------------

    def run(self) -> None:
        """Runs until stop(), or until a ring breaks; the caller's thread is the generator."""
        start_watchdog()
        with nogil:
            self.loop()

    def stop(self) -> None:
        """Ends run()."""
        store_release_u32(&self.stopping, 1)

    def enter(self, int phase) -> None:
        """What the loop does from now on."""
        store_release_u32(&self.phase, phase)

    @property
    def teaching(self) -> bool:
        """Whether frames that teach a switch are still to be sent."""
        cdef int i
        for i in range(self.count):
            if read_once_u32(&self.pairs[i].primes):
                return True
        return False

    @property
    def broken_pair(self) -> int | None:
        """The pair whose ring the device has broken."""
        return self.broken - 1 if self.broken else None

    def ticks(self) -> dict:
        """Of the loop so far: all, those of turns that moved something, and how long one is."""
        return {"total": self.total_ticks, "busy": self.busy_ticks, "per_us": self.rate_us,
                "room": self.busy_turns * 2 * self.burst * self.count}

    def counters(self) -> list:
        """Of each pair, since the start."""
        cdef int i
        return [
            {"port": self.pairs[i].port, "peer": self.pairs[i].peer,
             "sends": bool(self.pairs[i].sends), **self.pairs[i].count}
            for i in range(self.count)
        ]

    def latencies(self) -> list:
        """(ticks, count) of each bin in use, in order."""
        cdef int i
        return [(value_of(i), self.histogram[i]) for i in range(BINS) if self.histogram[i]]

    def forget_latencies(self) -> None:
        """What comes now counts; a frame that arrives meanwhile may be lost to the count."""
        memset(self.histogram, 0, BINS * sizeof(uint64_t))


def clock_rate() -> float:
    """Ticks a microsecond of the clock that all figures in ticks are of."""
    return ticks_per_us()


def binned(uint64_t value) -> int:
    """What the histogram makes of a time."""
    return value_of(bin_of(value))
