"""virtio-blk's data path: requests of one virtqueue, to a storage and back.

A chain becomes a Slot: what must be known after the chain's segments are gone (they live
in the worker's scratch for one burst). Order of completion is free. Everything that a
guest wrote is copied once, checked, and only the copy is used.

No chain goes back without an answer: its driver would read what was in its status byte
before. Where that byte cannot be found, the chain stays the driver's and its ring is broken.

Source: virtio 1.3, "Block Device / Device Operation".
"""
cimport cython
from libc.errno cimport EFAULT
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from vhostpy.system.hw cimport atomic_add_i64, load_acquire_u32, store_release_u32, ticks, unlikely
from vhostpy.runtime.pollable cimport Conduct
from vhostpy._ring cimport BURST, CHAIN_OK
from vhostpy.runtime.timer cimport open_timer, set_timer
from vhostpy.memory.guest cimport GuestMemory, poison
from vhostpy.backends.blk.clear cimport clear_requests
from vhostpy.backends.blk.request cimport (
    HEADER, S_IOERR, S_OK, S_UNSUPP, SECTOR, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT,
    T_SECURE_ERASE, T_WRITE_ZEROES, UNDER_WAY, gather, reserve,
)
from vhostpy.backends.blk.counters cimport counters_of
from vhostpy.backends.blk.latency cimport count_latency, latency_bins
from vhostpy.backends.storage.storage cimport Op

import os

from vhostpy._ring import ChainFault
from vhostpy.backends.storage import storage as storages
from vhostpy.protocol.names import fault_name

cdef enum:
    SLOTS_MAX = 1024        # under way at a time; a slot may grow to 6 KiB
    # Twice what we offer: a region's end may cut a segment.
    IOV_LIMIT = 254

SEG_MAX = 126               # for the config space


@cython.final
cdef class DiskQueue(Pollable):
    """One virtqueue of one disk. A worker polls it; the methods with names are control's."""

    def __cinit__(self, Virtqueue virtqueue not None, Storage storage not None, *,
                  bytes serial=b"", bint read_only=False, bint write_through=False,
                  Workers workers=None, Limits limits=None, Conduct conduct=None):
        cdef uint32_t i
        self.timer_fd = -1
        if len(serial) > SERIAL_BYTES:
            raise ValueError(f"serial of {len(serial)} bytes, at most {<int>SERIAL_BYTES}")
        memset(self.serial, 0, SERIAL_BYTES)
        for i in range(<uint32_t>len(serial)):
            self.serial[i] = serial[i]
        virtqueue.set_ends_in_status()
        if conduct is not None:
            self.conduct = conduct
        self.virtqueue = virtqueue
        self.storage = storage
        self.workers = workers
        self.limits = limits if limits is not None else Limits()
        self.read_only = read_only or storage.read_only
        self.write_through = write_through
        self.last = &self.first
        self.slot_count = min(virtqueue.size(), <uint32_t>SLOTS_MAX)
        self.slots = <Slot *>calloc(self.slot_count, sizeof(Slot))
        self.free_slots = <uint16_t *>calloc(self.slot_count, sizeof(uint16_t))
        self.latency = <Latency *>calloc(1, sizeof(Latency))
        if self.slots == NULL or self.free_slots == NULL or self.latency == NULL:
            raise MemoryError
        # A stack with slot 0 on top: a shallow queue touches few slots.
        for i in range(self.slot_count):
            self.free_slots[i] = <uint16_t>(self.slot_count - 1 - i)
        self.free_count = self.slot_count
        self.channel = storage.channel()

    def __dealloc__(self):
        cdef uint32_t i
        free(self.latency)
        if self.slots == NULL:
            return              # it was refused, and its fd is still 0
        if self.timer_fd >= 0:
            close(self.timer_fd)
        if self.free_count < self.slot_count:
            return              # the storage still writes there: a leak, not a crash
        for i in range(self.slot_count):
            free(self.slots[i].iov)
            free(self.slots[i].gpas)
            free(self.slots[i].parts)
        free(self.slots)
        free(self.free_slots)

    # The worker's. ---------------------------------------------------------------------

    cdef int poll(self, Turn *turn) noexcept nogil:
        cdef int found = 0
        if unlikely(load_acquire_u32(&self.abandoned)):
            return self.reap()
        if not self.virtqueue.is_live():
            return 0            # what completes meanwhile waits in the channel
        if self.free_count < self.slot_count:
            found = self.complete()
        if not load_acquire_u32(&self.draining):
            found += self.take_limited(turn) if self.limits.on else self.take(turn)
        elif self.virtqueue.has_again():
            found += self.take(turn)    # a drain waits for these: no limit holds it up
        found += self.submit()
        if self.free_count < self.slot_count:
            # A storage that is done at once, answers at once.
            found += self.complete()
            if self.free_count < self.slot_count and self.channel.completion_fd < 0:
                found += 1      # it works only when polled
        if self.virtqueue.unpublished():
            self.virtqueue.publish()
        self.under_way = self.free_count < self.slot_count
        return found

    cdef bint arm(self) noexcept nogil:
        if load_acquire_u32(&self.abandoned):
            return self.channel.arm()
        if not self.virtqueue.is_live():
            return False        # whoever makes it live nudges
        if self.channel.arm():
            return True
        if load_acquire_u32(&self.draining) or self.free_count == 0 or self.first != NULL:
            return False        # a completion comes first
        if self.limits.on and self.sleeps_for_limits():
            return False
        return self.virtqueue.arm()

    cdef void disarm(self) noexcept nogil:
        self.channel.disarm()
        if not load_acquire_u32(&self.abandoned) and self.virtqueue.is_live():
            self.virtqueue.disarm()

    cdef int take_limited(self, Turn *turn) noexcept nogil:
        """take(), as much as the disk's limits allow now."""
        cdef int taken
        cdef int32_t frames = turn.frames
        cdef int64_t size = turn.bytes, may_frames, may_size
        if not self.limits.clip(turn):
            return 0
        may_frames = turn.frames
        may_size = turn.bytes
        taken = self.take(turn)
        self.limits.charge(may_frames - turn.frames, may_size - turn.bytes)
        # The turn's budget is what it was, less what was taken.
        turn.frames += frames - <int32_t>may_frames
        turn.bytes += size - may_size
        return taken

    cdef bint sleeps_for_limits(self) noexcept nogil:
        """The timer wakes it, not the guest: a kick would find that nothing may pass."""
        cdef int64_t wait_ns = self.limits.wait_ns(<int64_t>ticks())
        if wait_ns == 0 or self.timer_fd < 0:
            return False
        set_timer(self.timer_fd, wait_ns)
        return True

    cdef int take(self, Turn *turn) noexcept nogil:
        """Pops chains while the budget, the slots and the storage last; how many."""
        cdef Chain chains[BURST]
        cdef int count, i, total = 0
        cdef bint cut = False
        while (turn.frames > 0 and turn.bytes > 0 and turn.steps > 0 and self.free_count > 0
               and self.first == NULL and not cut):
            turn.scratch.used = turn.scratch.steps = 0      # the burst before is in its slots
            count = min(BURST, <int>self.free_count)
            count = self.virtqueue.pop(chains, min(count, turn.frames), turn.scratch)
            turn.steps -= <int32_t>turn.scratch.steps
            if count <= 0:
                # RING_BROKEN: control looks at Virtqueue.broken.
                if count < 0 and not self.told_broken and self.workers is not None:
                    self.told_broken = True
                    self.workers.sound_bell()
                break
            for i in range(count):
                if turn.bytes <= 0:
                    self.virtqueue.rewind(&chains[i], count - i)
                    count = i
                    cut = True
                    break
                if unlikely(not self.begin(&chains[i], turn)):
                    self.virtqueue.refuse(&chains[i], count - i)
                    count = i
                    cut = True
                    break
            total += count
            if self.started:
                # Before the storage sees them.
                atomic_add_i64(&self.virtqueue.memory.references, self.started)
                self.started = 0
            self.submit()
            if count < BURST:
                break
        return total

    cdef bint begin(self, Chain *chain, Turn *turn) noexcept nogil:
        """A chain: answered at once, or a slot that the storage works on. False: nobody can."""
        cdef uint64_t header[2]
        cdef uint32_t kind, written = 1
        cdef uint64_t size
        cdef Segment *last
        cdef Segment *data
        cdef uint8_t *status
        cdef uint64_t status_gpa
        cdef uint8_t value = S_IOERR
        cdef int used
        cdef Slot *slot
        turn.frames -= 1
        if unlikely(chain.fault != CHAIN_OK or chain.writable == 0):
            return self.fail(chain)
        # The status is the last writable byte, wherever the driver cuts its pieces.
        last = &chain.segments[chain.readable + chain.writable - 1]
        last.length -= 1
        status = last.hva + last.length
        status_gpa = last.gpa + last.length
        if last.length == 0:
            chain.writable -= 1
        if unlikely(chain.readable_bytes < HEADER):
            self.counts.bad_requests += 1
            self.answer(chain, status, status_gpa, S_IOERR, 1)
            return True
        used = gather(chain.segments, chain.readable, header, HEADER)
        kind = <uint32_t>header[0]
        slot = &self.slots[self.free_slots[self.free_count - 1]]
        slot.status = status
        slot.status_gpa = status_gpa
        slot.result = 0
        slot.pending = 0
        slot.flushed = 0
        slot.taken_at = turn.now
        slot.chain = chain[0]
        slot.chain.segments = NULL      # gone with this burst
        if kind == T_IN:
            data = chain.segments + chain.readable
            size = chain.writable_bytes - 1
            turn.bytes -= <int64_t>size
            value = self.begin_transfer(slot, data, chain.writable, size, header[1], Op.READ)
        elif kind == T_OUT:
            size = chain.readable_bytes - HEADER
            turn.bytes -= <int64_t>size
            if not self.read_only:
                value = self.begin_transfer(slot, chain.segments + used, chain.readable - used,
                                            size, header[1], Op.WRITE)
        elif kind == T_FLUSH:
            slot.op = Op.FLUSH
            slot.request.size = slot.request.offset = 0
            slot.request.iov_count = 0
            slot.request.op = Op.FLUSH
            slot.request.flags = 0
            self.enqueue(slot, &slot.request)
            value = UNDER_WAY
        elif kind == T_GET_ID:
            written += self.get_id(chain.segments + chain.readable, chain.writable)
            value = S_OK
        elif kind == T_DISCARD and self.storage.can_discard:
            value = self.begin_clear(slot, chain.segments + used, chain.readable - used,
                                     chain.readable_bytes - HEADER, Op.DISCARD)
        elif kind == T_WRITE_ZEROES and self.storage.can_write_zeroes:
            value = self.begin_clear(slot, chain.segments + used, chain.readable - used,
                                     chain.readable_bytes - HEADER, Op.WRITE_ZEROES)
        elif kind == T_SECURE_ERASE and self.storage.can_secure_erase:
            if chain.readable_bytes > HEADER:
                value = self.begin_clear(slot, chain.segments + used, chain.readable - used,
                                         chain.readable_bytes - HEADER, Op.SECURE_ERASE)
            else:
                # Linux takes the type's lowest bit for the direction of its data, and so has
                # these ranges where a device writes. That none reads there is but a SHOULD.
                value = self.begin_clear(slot, chain.segments + chain.readable, chain.writable,
                                         chain.writable_bytes - 1, Op.SECURE_ERASE)
        else:
            value = S_UNSUPP
        if value == UNDER_WAY:
            self.free_count -= 1
            slot.memory = <void *>self.virtqueue.memory
            self.started += 1
            return True
        if value == S_IOERR:
            self.counts.bad_requests += 1
        elif value == S_UNSUPP:
            self.counts.unsupported += 1
        self.answer(chain, status, status_gpa, value, written)
        return True

    cdef bint fail(self, const Chain *chain) noexcept nogil:
        """Answers a chain that nobody can use; False: not even that."""
        if chain.fault == CHAIN_OK:
            self.counts.bad_chains += 1
            return False
        self.counts.chain_faults[chain.fault & 7] += 1
        if chain.segments == NULL:
            return False
        if self.first_fault == CHAIN_OK:
            self.first_fault = chain.fault
            if self.workers is not None:
                self.workers.sound_bell()
        self.answer(chain, chain.segments.hva, chain.segments.gpa, S_IOERR, 1)
        return True

    cdef uint8_t begin_transfer(self, Slot *slot, Segment *data, int count, uint64_t size,
                                uint64_t sector, int op) noexcept nogil:
        cdef uint64_t capacity = self.storage.size_bytes // SECTOR
        cdef int i
        if (size % SECTOR or sector > capacity or size // SECTOR > capacity - sector
                or count > IOV_LIMIT or not reserve(slot, count)):
            return S_IOERR
        for i in range(count):
            slot.iov[i].iov_base = data[i].hva
            slot.iov[i].iov_len = data[i].length
            slot.gpas[i] = data[i].gpa
        slot.op = op
        slot.request.op = op
        slot.request.flags = 0
        slot.request.offset = sector * SECTOR
        slot.request.size = size
        slot.request.iov = slot.iov
        slot.request.iov_count = count
        self.enqueue(slot, &slot.request)
        return UNDER_WAY

    cdef uint8_t begin_clear(self, Slot *slot, Segment *data, int count, uint64_t size,
                             int op) noexcept nogil:
        cdef int total, i
        total = clear_requests(slot, data, count, size, op, self.storage.size_bytes,
                               self.read_only)
        for i in range(total):
            self.enqueue(slot, &slot.parts[i] if total > 1 else &slot.request)
        return UNDER_WAY if total > 0 else <uint8_t>-total

    cdef uint32_t get_id(self, const Segment *data, int count) noexcept nogil:
        cdef uint32_t done = 0, piece
        cdef Segment written
        cdef int i
        self.counts.get_ids += 1
        for i in range(count):
            piece = min(data[i].length, <uint32_t>SERIAL_BYTES - done)
            if piece == 0:
                break
            memcpy(data[i].hva, &self.serial[done], piece)
            written = data[i]
            written.length = piece
            self.virtqueue.log_written(&written, 1)
            done += piece
        return done

    cdef void enqueue(self, Slot *slot, Request *request) noexcept nogil:
        slot.pending += 1
        request.owner = slot
        request.next = NULL
        self.last[0] = request
        self.last = &request.next

    cdef int submit(self) noexcept nogil:
        """Hands requests to the storage until it takes no more; how many."""
        cdef Request *burst[BURST]
        cdef Request *next
        cdef int count, taken, total = 0
        while self.first != NULL:
            count = 0
            next = self.first
            while next != NULL and count < BURST:
                burst[count] = next
                next = next.next
                count += 1
            # `next` of those it takes is the storage's from here on.
            taken = self.channel.submit(burst, count)
            total += taken
            if taken < count:
                self.first = burst[taken]
                break
            self.first = next
        if self.first == NULL:
            self.last = &self.first
        return total

    cdef int complete(self) noexcept nogil:
        """Answers what the storage has done; how many requests came back."""
        cdef Request *done[BURST]
        cdef Request *request
        cdef Slot *slot
        cdef void *memory = NULL
        cdef int64_t ended = 0
        cdef int count, i
        count = self.channel.poll(done, BURST)
        if count > 0:
            self.now = ticks()
        for i in range(count):
            request = done[i]
            slot = <Slot *>request.owner
            slot.pending -= 1
            if unlikely(request.result < 0):
                self.note_error(slot, request)
            if slot.pending > 0:
                continue
            if (self.write_through and slot.result == 0 and not slot.flushed
                    and (slot.op == Op.WRITE or slot.op == Op.WRITE_ZEROES)):
                # The driver was told that a completed write is on stable storage.
                slot.flushed = 1
                slot.request.op = Op.FLUSH
                slot.request.size = 0
                self.enqueue(slot, &slot.request)
                continue
            self.finish(slot)
            if slot.memory != memory:
                if ended:
                    atomic_add_i64(&(<GuestMemory>memory).references, -ended)
                memory = slot.memory
                ended = 0
            ended += 1
            self.release(slot)
        if ended:
            # Last: the generation may be gone at once.
            atomic_add_i64(&(<GuestMemory>memory).references, -ended)
        if self.first != NULL:
            self.submit()
        return count

    cdef void finish(self, Slot *slot) noexcept nogil:
        cdef uint64_t size = 0 if slot.parts != NULL else slot.request.size
        cdef uint32_t written = 1
        cdef int i
        count_latency(self.latency, slot.op, self.now - slot.taken_at)
        if slot.op == Op.READ:
            self.counts.reads += 1
            self.counts.read_bytes += size
            if slot.result == 0:
                written += <uint32_t>size
            if self.virtqueue.logging():
                self.log_slot(slot)     # after an error too: part may have been written
        elif slot.op == Op.WRITE:
            self.counts.writes += 1
            for i in range(slot.request.iov_count):
                self.counts.write_bytes += slot.iov[i].iov_len
        elif slot.op == Op.FLUSH:
            self.counts.flushes += 1
        elif slot.op == Op.DISCARD:
            self.counts.discards += 1
        elif slot.op == Op.WRITE_ZEROES:
            self.counts.write_zeroes += 1
        else:
            self.counts.secure_erases += 1
        self.answer(&slot.chain, slot.status, slot.status_gpa,
                    S_OK if slot.result == 0 else S_IOERR, written)

    cdef void note_error(self, Slot *slot, Request *request) noexcept nogil:
        cdef int i
        if request.result == -EFAULT and slot.op <= Op.WRITE:
            # Guest memory that was there when the chain was taken: its file has shrunk.
            for i in range(slot.request.iov_count):
                poison(slot.iov[i].iov_base)
        self.counts.io_errors += 1
        if slot.result == 0:
            slot.result = request.result
        if self.first_error == 0:
            self.first_error_op = request.op
            self.first_error_offset = request.offset
            self.first_error = request.result
            if self.workers is not None:
                self.workers.sound_bell()

    cdef void log_slot(self, Slot *slot) noexcept nogil:
        cdef Segment segment
        cdef int i
        for i in range(slot.request.iov_count):
            segment.hva = <uint8_t *>slot.iov[i].iov_base
            segment.gpa = slot.gpas[i]
            segment.length = <uint32_t>slot.iov[i].iov_len
            self.virtqueue.log_written(&segment, 1)

    cdef void answer(self, const Chain *chain, uint8_t *status, uint64_t gpa, uint8_t value,
                     uint32_t written) noexcept nogil:
        cdef Segment segment
        status[0] = value
        if self.virtqueue.logging():
            segment.hva = status
            segment.gpa = gpa
            segment.length = 1
            self.virtqueue.log_written(&segment, 1)
        self.virtqueue.push(chain, &written, 1)

    cdef void release(self, Slot *slot) noexcept nogil:
        if slot.parts != NULL:
            free(slot.parts)
            slot.parts = NULL
        self.free_slots[self.free_count] = <uint16_t>(slot - self.slots)
        self.free_count += 1

    cdef int reap(self) noexcept nogil:
        """After abandon(): what comes back is forgotten, the guest is not touched."""
        cdef Request *done[BURST]
        cdef Request *request
        cdef Slot *slot
        cdef int count, i
        while self.first != NULL:           # never reached the storage
            request = self.first
            self.first = request.next
            slot = <Slot *>request.owner
            slot.pending -= 1
            if slot.pending == 0:
                atomic_add_i64(&(<GuestMemory>slot.memory).references, -1)
                self.release(slot)
        self.last = &self.first
        count = self.channel.poll(done, BURST)
        for i in range(count):
            slot = <Slot *>done[i].owner
            slot.pending -= 1
            if slot.pending == 0:
                atomic_add_i64(&(<GuestMemory>slot.memory).references, -1)
                self.release(slot)
        return count

    # Control's. ------------------------------------------------------------------------

    @property
    def inflight(self) -> int:
        """Requests that are neither answered nor forgotten."""
        return self.slot_count - self.free_count

    def drain(self) -> None:
        """Takes nothing more. `inflight` can only fall, once the workers were waited for."""
        store_release_u32(&self.draining, 1)

    def abandon(self) -> None:
        """The ring is not ours any more: requests that still run end unanswered.

        Wants the ring held. Generations of guest memory that they use stay alive with
        this queue; go on polling until nothing is in flight, then close().
        """
        cdef uint32_t i
        if self.virtqueue.is_live():
            raise RuntimeError("the virtqueue is live")
        if self.abandoned:
            return
        self.kept = []
        for i in range(self.slot_count):
            if self.slots[i].pending > 0 and self.slots[i].memory != NULL:
                memory = <object>self.slots[i].memory
                if memory not in self.kept:
                    self.kept.append(memory)
        store_release_u32(&self.abandoned, 1)

    def close(self) -> None:
        """Nothing is in flight and no worker polls it."""
        if self.home is not None or self.inflight:
            raise RuntimeError(f"{self.inflight} requests under way")
        self.channel.close()

    def set_write_through(self, bint on) -> None:
        """A write is answered when it is on stable storage."""
        store_release_u32(&self.write_through, on)

    def open_timer(self) -> int:
        """The fd that is to wake it while it is limited; watched by whoever polls it."""
        if self.timer_fd < 0:
            self.timer_fd = open_timer()
        return self.timer_fd

    def latency_bins(self) -> dict:
        """How long requests took, for vhostpy.backends.blk.latency."""
        return latency_bins(self.latency)

    @property
    def error(self) -> str | None:
        """The first I/O error, in words."""
        if self.first_error == 0:
            return None
        op = storages.Op(self.first_error_op).name.lower()
        return f"{op} at byte {self.first_error_offset}: {os.strerror(-self.first_error)}"

    @property
    def fault(self) -> str | None:
        """What was wrong with the first chain that was answered for nothing else."""
        return fault_name(ChainFault(self.first_fault)) if self.first_fault else None

    def counters(self) -> dict:
        """What happened so far; stable names."""
        return counters_of(&self.counts)
