"""Virtqueues: bursts of chains, between the driver's memory and ours.

The back-end's end. It knows bytes and addresses; it knows no device, no message, and
nothing of what is in a buffer. Its methods choose the layout once per burst.

The other end is hostile: whatever lies in shared memory is read once, checked, and only
the copy is used.
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from vhostpy.system.calls cimport Calls
from vhostpy.ring.chain cimport scratch_free, scratch_make
from vhostpy.ring.state cimport (
    BROKEN_BUFFERS, BROKEN_CHAIN, WorkerSide, break_ring, break_ring_for, call_driver,
    log_collect, log_flush,
)
from vhostpy.system.hw cimport (
    aligned_alloc, load_acquire_u32, read_once_u64, store_release_u32, unlikely,
)
from vhostpy.ring.inflight_packed cimport (
    packed_track_again, packed_track_published, packed_track_publishing, packed_track_rewind,
    packed_track_take,
)
from vhostpy.ring.inflight_split cimport (
    split_track_published, split_track_push, split_track_rewind, split_track_take,
)
from vhostpy.ring.packed cimport (
    OWNER, packed_arm, packed_disarm, packed_distance, packed_pop, packed_publish, packed_push,
    packed_rewind, packed_start,
)
from vhostpy._spec cimport Feature
from vhostpy.ring.tracker cimport track_push
from vhostpy.ring.split cimport (
    split_arm, split_disarm, split_pop, split_publish, split_push, split_start,
)

from typing import NamedTuple

from vhostpy.ring import chain as _chain, driver as _driver
from vhostpy.errors import GuestError, ProtocolError
from vhostpy.ring.parts import (
    alignments_of, check_base, check_size, first_base, part_names, sizes_of,
)
from vhostpy.system.notify import is_unix_socket

# Python's names for what the .pxd takes from there (`import` can't say it: they are types).
globals().update(ChainFault=_chain.ChainFault, DriverVirtqueue=_driver.DriverVirtqueue)


class Taken(NamedTuple):
    """A chain that `take` returned: guest addresses and lengths of its pieces."""

    id: int
    readable: list
    writable: list
    fault: int
    slots: int = 1
    entry: int = 0      # where it is remembered (packed)


cdef object taken_of(const Chain *chain):
    cdef int i
    pieces = [(chain.segments[i].gpa, chain.segments[i].length)
              for i in range(chain.readable + chain.writable)]
    return Taken(chain.id, pieces[:chain.readable], pieces[chain.readable:],
                 ChainFault(chain.fault), chain.slots, chain.entry)


@cython.final
cdef class Virtqueue:
    """The back-end's end of one virtqueue.

    The workers' while `live`, else control's: all that changes it from Python wants it
    held, and workers quiescent since. `call_fd` stays its giver's: a Unix socket, or an
    eventfd that was made O_NONBLOCK, since calling the driver must never block a worker.
    """

    def __cinit__(self, GuestMemory memory not None, object size, object features, *,
                  object desc_uva, object avail_uva, object used_uva, object base=None,
                  int call_fd=-1, Calls calls=None, DirtyLog log=None,
                  object used_log_gpa=None):
        check_size(size, features)
        self.ring = <Ring *>aligned_alloc(64, (sizeof(Ring) + 63) & ~63)
        if self.ring == NULL:
            raise MemoryError
        memset(self.ring, 0, sizeof(Ring))
        self.ring.control.size = size
        self.call_costs = calls if calls is not None else Calls()
        self.ring.costs = &self.call_costs.costs
        self.features = features
        self.ring.control.packed = features >> Feature.RING_PACKED & 1
        self.ring.control.in_order = features >> Feature.IN_ORDER & 1
        self.ring.control.event_idx = features >> Feature.EVENT_IDX & 1
        self.ring.control.indirect = features >> Feature.INDIRECT_DESC & 1
        self._set_call_fd(call_fd)
        self._place(memory, (desc_uva, avail_uva, used_uva))
        self.set_log(log, used_log_gpa)
        self.base = first_base(features) if base is None else base

    def __dealloc__(self):
        free(self.ring)

    # Workers' side. ----------------------------------------------------------------------

    cdef bint is_live(self) noexcept nogil:
        # Pairs with set_live(): what control changed before is seen.
        return load_acquire_u32(&self.ring.control.live)

    cdef int pop(self, Chain *chains, int limit, Scratch *scratch) noexcept nogil:
        cdef int count
        if self.tracker != NULL:
            count = self.pop_tracked(chains, limit, scratch)
        else:
            count = self.pop_any(chains, limit, scratch)
        if count > 0:
            self.inflight += count
        return count

    cdef int pop_any(self, Chain *chains, int limit, Scratch *scratch) noexcept nogil:
        if self.ring.control.packed:
            return packed_pop(self.ring, chains, limit, scratch)
        return split_pop(self.ring, chains, limit, scratch)

    cdef int pop_tracked(self, Chain *chains, int limit, Scratch *scratch) noexcept nogil:
        cdef Ring *ring = self.ring
        cdef Tracker *tracker = self.tracker
        cdef uint16_t position = ring.worker.last_avail
        cdef int count, tracked
        if unlikely(tracker.again_left > 0):
            return self.pop_again(chains, limit, scratch)
        tracker.again_last = 0
        count = self.pop_any(chains, limit, scratch)
        if count <= 0:
            return count
        if not ring.control.packed:
            split_track_take(tracker, chains, count)
            return count
        tracked = packed_track_take(tracker, ring, position, chains, count)
        if unlikely(tracked < count):
            packed_rewind(ring, chains + tracked, count - tracked)
            break_ring(ring)
            return tracked if tracked else RING_BROKEN
        return count

    cdef int pop_again(self, Chain *chains, int limit, Scratch *scratch) noexcept nogil:
        # The same ring, but for where its chains are named.
        cdef Ring *ring = self.ring
        cdef Tracker *tracker = self.tracker
        cdef uint8_t *desc = ring.control.desc
        cdef uint8_t *avail = ring.control.avail
        cdef uint16_t last_avail = ring.worker.last_avail, avail_idx = ring.worker.avail_idx
        cdef uint16_t used_idx = ring.worker.used_idx
        cdef uint16_t position = tracker.again_next
        cdef int count
        if ring.control.packed:
            ring.control.desc = tracker.again
        else:
            ring.control.avail = tracker.again
        ring.worker.last_avail = position
        ring.worker.avail_idx = <uint16_t>(position + tracker.again_left)
        ring.worker.used_idx = tracker.again_first
        count = self.pop_any(chains, limit, scratch)
        tracker.again_next = ring.worker.last_avail
        tracker.again_last = 1
        if count > 0:
            tracker.again_left -= count
            if ring.control.packed:
                packed_track_again(tracker, ring, position, chains, count)
        ring.control.desc, ring.control.avail = desc, avail
        ring.worker.last_avail, ring.worker.avail_idx = last_avail, avail_idx
        ring.worker.used_idx = used_idx
        return count

    cdef void condemn(self) noexcept nogil:
        break_ring_for(self.ring, BROKEN_BUFFERS)

    cdef bint has_again(self) noexcept nogil:
        return (self.tracker != NULL and self.tracker.again_left > 0
                and not self.ring.worker.broken)

    cdef void rewind(self, const Chain *chains, int count) noexcept nogil:
        cdef WorkerSide *worker = &self.ring.worker
        cdef Tracker *tracker = self.tracker
        cdef uint16_t last_avail = worker.last_avail
        self.inflight -= count
        if tracker != NULL and tracker.again_last:      # they stay marked
            worker.last_avail = tracker.again_next
            self.rewind_any(chains, count)
            tracker.again_next = worker.last_avail
            tracker.again_left += count
            worker.last_avail = last_avail
            return
        self.rewind_any(chains, count)
        if tracker != NULL:
            if self.ring.control.packed:
                packed_track_rewind(tracker, chains, count)
            else:
                split_track_rewind(tracker, chains, count)

    cdef void rewind_any(self, const Chain *chains, int count) noexcept nogil:
        if self.ring.control.packed:
            packed_rewind(self.ring, chains, count)
        else:
            self.ring.worker.last_avail = <uint16_t>(self.ring.worker.last_avail - count)

    cdef void refuse(self, const Chain *chains, int count) noexcept nogil:
        cdef uint32_t why = BROKEN_CHAIN + chains[0].fault
        self.rewind(chains, count)
        break_ring_for(self.ring, why)

    cdef void push(self, const Chain *chains, const uint32_t *written, int count) noexcept nogil:
        cdef int i
        if self.ring.control.packed:
            if self.tracker != NULL:
                for i in range(count):
                    track_push(self.tracker, chains[i].entry, chains[i].slots)
            packed_push(self.ring, chains, written, count)
        else:
            if self.tracker != NULL:
                split_track_push(self.tracker, chains, count)
            split_push(self.ring, chains, written, count)
        self.inflight -= count

    cdef void publish(self) noexcept nogil:
        cdef Tracker *tracker = self.tracker
        if tracker == NULL or tracker.pushed == 0:
            self.publish_any()
        elif self.ring.control.packed:
            packed_track_publishing(tracker, self.ring)
            packed_publish(self.ring)
            packed_track_published(tracker, self.ring)
        else:
            split_publish(self.ring)
            split_track_published(tracker, self.ring.worker.used_idx)

    cdef void publish_any(self) noexcept nogil:
        if self.ring.control.packed:
            packed_publish(self.ring)
        else:
            split_publish(self.ring)

    cdef uint32_t unpublished(self) noexcept nogil:
        cdef WorkerSide *worker = &self.ring.worker
        if self.ring.control.packed:
            return packed_distance(worker.used_idx, worker.used_next, self.ring.control.size)
        return <uint16_t>(worker.used_next - worker.used_idx)

    cdef void log_written(self, const Segment *segments, int count) noexcept nogil:
        cdef int i
        if self.ring.control.log != NULL:
            for i in range(count):
                log_collect(self.ring, segments[i].gpa, segments[i].length)

    cdef bint logging(self) noexcept nogil:
        return self.ring.control.log != NULL

    cdef uint32_t size(self) noexcept nogil:
        return self.ring.control.size

    cdef void set_lead(self, uint8_t length) noexcept nogil:
        self.ring.control.lead = length

    cdef void set_ends_in_status(self) noexcept nogil:
        self.ring.control.ends_in_status = 1

    cdef bint arm(self) noexcept nogil:
        if self.has_again():
            return True
        return packed_arm(self.ring) if self.ring.control.packed else split_arm(self.ring)

    cdef void disarm(self) noexcept nogil:
        if self.ring.control.packed:
            packed_disarm(self.ring)
        else:
            split_disarm(self.ring)

    # Control's side. ---------------------------------------------------------------------

    @property
    def live(self) -> bool:
        return self.is_live()

    def set_live(self, bint live) -> None:
        """Gives the ring to the workers, or asks for it back (wait for quiescence then)."""
        store_release_u32(&self.ring.control.live, live)

    @property
    def base(self) -> int:
        """Where the ring goes on, as GET_VRING_BASE tells it; setting it starts it anew there.

        Split: the next avail index; used entries go on where the driver's own used.idx
        stands. Packed: position of the next chain in bits 0-15, of the next used descriptor
        in bits 16-31. A lie harms only the driver: indexes stay in the ring.
        """
        cdef WorkerSide *worker = &self.ring.worker
        if self.ring.control.packed:
            return worker.last_avail | <uint32_t>worker.used_idx << 16
        return worker.last_avail

    @base.setter
    def base(self, value):
        cdef WorkerSide *worker = &self.ring.worker
        self._want_held()
        check_base(value, self.ring.control.size, self.features)
        cdef uint32_t start = value
        with nogil:     # it looks at used.idx: a page fault may last
            if self.ring.control.packed:
                packed_start(self.ring, start)
            else:
                split_start(self.ring, start)
        worker.signalled_valid = 0
        worker.kicks_wanted = 1
        worker.broken = 0
        self.inflight = 0

    def __getattr__(self, name):
        # At C level `size` is a method, which hides it from a property of that name.
        if name == "size":
            return self.ring.control.size
        raise AttributeError(f"Virtqueue has no {name!r}")

    @property
    def broken(self) -> bool:
        """Nothing more is taken from it; so it stays until `base` is set."""
        return self.ring.worker.broken != 0

    def break_off(self) -> None:
        """Nothing is taken from it, and that is reported, until `base` is set."""
        self._want_held()
        break_ring(self.ring)

    @property
    def unanswerable(self):
        """What is wrong with the chain that broke it, which its next life begins with;
        CHAIN_OK: nothing but that no byte of it can be written. None: no chain did."""
        cdef uint32_t why = self.ring.worker.broken
        return ChainFault(why - BROKEN_CHAIN) if why >= BROKEN_CHAIN else None

    @property
    def condemned(self) -> bool:
        """It is broken for what its unusable buffers have cost others."""
        return self.ring.worker.broken == BROKEN_BUFFERS

    @property
    def deaf(self) -> bool:
        """The call fd blocks whoever writes to it: the driver is called no more."""
        return self.ring.worker.deaf != 0

    @property
    def unwritten(self) -> bool:
        """Of a packed ring: no driver has made its first descriptor available yet."""
        cdef uint64_t rest
        if not self.ring.control.packed:
            return False
        with nogil:         # a page fault may last
            rest = read_once_u64(self.ring.control.desc + 8)
        return not rest >> 48 & OWNER

    @property
    def used_index(self) -> int:
        """Up to where the driver sees used entries; packed: a position."""
        return self.ring.worker.used_idx

    @property
    def calls(self) -> int:
        """Used buffer notifications sent so far."""
        return self.ring.worker.calls

    def remap(self, GuestMemory memory not None) -> None:
        """The same ring in a new generation of guest memory.

        If it was broken by a chain outside the old one, that is tried once more: QEMU takes a
        region out and puts it back, while the guest runs.
        """
        self._want_held()
        self._place(memory, self.uvas)
        if self.unanswerable == CHAIN_UNMAPPED:
            self.ring.worker.broken = 0

    def set_addresses(self, *, desc_uva: int, avail_uva: int, used_uva: int) -> None:
        """New addresses of the ring's three parts; indexes go on."""
        self._want_held()
        self._place(self.memory, (desc_uva, avail_uva, used_uva))

    def set_log(self, DirtyLog log, used_log_gpa) -> None:
        """Logs writes to guest memory from now on, those to the used ring at
        `used_log_gpa`; None: not at all."""
        cdef uint64_t gpa = 0
        self._want_held()
        if used_log_gpa is not None:
            length = sizes_of(self.ring.control.size, self.features)[2]
            if not 0 <= used_log_gpa <= (1 << 64) - length:
                raise ProtocolError(
                    f"used ring logged at {used_log_gpa:#x}: {length} bytes go beyond 2**64"
                )
            gpa = used_log_gpa
        if self.ring.control.log != NULL:
            log_flush(self.ring)
        self.ring.worker.logged = 0
        self.log = log
        self.ring.control.log = &log.map if log is not None else NULL
        self.ring.used_log_gpa = gpa
        self.ring.control.log_used = log is not None and used_log_gpa is not None

    def track(self, InflightQueue queue) -> None:
        """Remembers its chains there from now on. Those that were under way at a kill come
        again, in their order, before those that the driver adds."""
        self._want_held()
        self.tracker = NULL
        self.inflight_queue = queue
        if queue is None:
            return
        queue.start(self.ring)
        self.tracker = &queue.tracker

    def keep(self, KeptPosition position) -> None:
        """Stores where it stands there, from now on and at each publish; None: nowhere."""
        self._want_held()
        self.kept = position
        self.ring.worker.kept = NULL
        if position is not None:
            position.start(self.ring.worker.used_idx)
            self.ring.worker.kept = &position.entry.pair

    @property
    def again(self) -> int:
        """Chains that were under way at a kill and will yet be taken again."""
        return self.tracker.again_left if self.has_again() else 0

    def set_call(self, int fd) -> None:
        """A new fd to call the driver by, or -1. It is signalled once: a call may have
        gone to the old one while nobody listened."""
        self._want_held()
        self._set_call_fd(fd)
        self.ring.worker.deaf = 0
        self.ring.worker.dear_calls = 0
        self.notify()

    def notify(self) -> None:
        """Calls the driver, whether it asked for it or not."""
        with nogil:
            call_driver(self.ring)

    def _set_call_fd(self, int fd):
        self.ring.control.call_fd = fd
        self.ring.control.call_is_socket = is_unix_socket(fd)

    def _want_held(self):
        if self.is_live():
            raise RuntimeError("the virtqueue is live: set_live(False), then wait for the workers")

    def _place(self, GuestMemory memory, uvas):
        # Changes nothing unless all three parts are where they may be.
        cdef uint64_t uva, length
        cdef uint8_t *parts[3]
        cdef int i
        names, alignments = part_names(self.features), alignments_of(self.features)
        lengths = sizes_of(self.ring.control.size, self.features)
        for i in range(3):
            if not 0 <= uvas[i] < 1 << 64:
                raise ProtocolError(f"{names[i]} at {uvas[i]:#x}: beyond 2**64")
            uva, length = uvas[i], lengths[i]
            parts[i] = memory.hva_of_uva(uva, length)
            if parts[i] == NULL:
                raise ProtocolError(
                    f"{names[i]}: {length} bytes at {uva:#x} are not in one memory region"
                )
            # Ours too: a region's offset in its file need not be aligned.
            if uva % alignments[i] or <uint64_t>parts[i] % alignments[i]:
                raise ProtocolError(f"{names[i]} at {uva:#x}: not aligned to {alignments[i]}")
        self.ring.control.desc, self.ring.control.avail = parts[0], parts[1]
        self.ring.control.used = parts[2]
        self.ring.desc_log_gpa = memory.gpa(uvas[0])
        self.ring.control.map = &memory.map
        self.ring.worker.hint = 0
        self.ring.worker.signalled_valid = 0
        self.memory = memory
        self.uvas = tuple(uvas)

    # Doors, for tests and devices written in Python. --------------------------------------

    def take(self, int limit=BURST) -> list:
        """Available chains, in order; raises GuestError where the ring is broken."""
        cdef Chain chains[BURST]
        cdef Scratch scratch
        cdef int count, i
        if not 0 <= limit <= BURST:
            raise ValueError(f"limit {limit}: 0 to {BURST}")
        scratch_make(&scratch)
        try:
            with nogil:
                count = self.pop(chains, limit, &scratch)
            if count < 0:
                raise GuestError("the ring is broken: its indexes jumped")
            return [taken_of(&chains[i]) for i in range(count)]
        finally:
            scratch_free(&scratch)

    def put_back(self, chains) -> None:
        """Un-takes the youngest chains, which these are, oldest first."""
        cdef Chain burst[BURST]
        cdef int count = len(chains), i
        if count > min(self.inflight, <int64_t>BURST):
            raise ValueError(f"{count} chains to put back, {self.inflight} are out")
        memset(burst, 0, sizeof(burst))
        for i in range(count):
            burst[i].id, burst[i].slots = chains[i].id, chains[i].slots
            burst[i].entry = chains[i].entry
        self.rewind(burst, count)

    def give(self, items, *, bint publish=True) -> None:
        """Gives chains back: (taken, bytes written) pairs."""
        cdef Chain chain
        cdef uint32_t written
        memset(&chain, 0, sizeof(chain))
        for taken, count in items:
            chain.id, chain.slots, chain.entry = taken.id, taken.slots, taken.entry
            written = count
            self.push(&chain, &written, 1)
        if publish:
            self.publish_pushed()

    def release(self, chains, *, bint publish=True) -> None:
        """Gives chains back at once, nothing written: with IN_ORDER by one used entry."""
        cdef Chain burst[BURST]
        cdef int count = len(chains), i
        if count > BURST:
            raise ValueError(f"{count} chains, at most {BURST}")
        memset(burst, 0, sizeof(burst))
        for i in range(count):
            burst[i].id, burst[i].slots = chains[i].id, chains[i].slots
            burst[i].entry = chains[i].entry
        self.push(burst, NULL, count)
        if publish:
            self.publish_pushed()

    def publish_pushed(self) -> None:
        """What give() held back becomes visible."""
        with nogil:
            self.publish()

    def read(self, taken) -> bytes:
        """What the driver put into the chain's readable pieces."""
        return b"".join([self.memory.read(gpa, length) for gpa, length in taken.readable])

    def write(self, taken, data: bytes) -> int:
        """Fills the chain's writable pieces; how much went in."""
        cdef Segment segment
        done = 0
        for gpa, length in taken.writable:
            piece = data[done:done + length]
            if piece:
                self.memory.write(gpa, piece)
                segment.hva, segment.gpa, segment.length = NULL, gpa, len(piece)
                self.log_written(&segment, 1)
                done += len(piece)
        return done

    def want_kicks(self) -> bool:
        """`arm`: True when chains are there already."""
        return self.arm()

    def refuse_kicks(self) -> None:
        self.disarm()
