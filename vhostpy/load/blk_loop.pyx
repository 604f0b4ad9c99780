"""The I/O generator: a driver's requests to one disk, from one thread.

Keeps `depth` requests under way in each queue. To verify it keeps a generation for each
block: what is written carries the block's number and generation in every sector, what is
read is compared with the last that was written. No two requests touch one block at a time,
so that what a read may return is certain.

A turn takes back, and gives, a small part of the depth. All that is there at once would make
the two ends wait for each other by turns: at depth 16 and 64 neither was busy for more than
60 % of the time, whatever a request cost it. Each chain's descriptors are written anew, as a
guest's driver does.

Source: virtio 1.3, "Block Device / Device Operation".
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from vhostpy.system.hw cimport (
    cpu_pause, load_acquire_u32, load_acquire_u64, prefetch_write, read_once_u8, read_once_u64,
    store_release_u32, ticks, ticks_per_us, unlikely, write_once_u64,
)
from vhostpy._ring cimport DriverVirtqueue, UsedEntry
from vhostpy._spec cimport DescriptorFlag, Feature
from vhostpy.load.histogram cimport BINS, bin_of, value_of
from vhostpy.memory.guest cimport Segment, translate
from vhostpy.system.notify cimport signal_eventfd, start_watchdog

cdef enum:
    # virtio_blk_req: type, reserved, sector; then the data, then a byte of status.
    HEADER_BYTES = 16
    AT_STATUS = 16
    AT_TABLE = 64
    TABLE_BYTES = 48        # three descriptors
    CONTROL_STRIDE = 128
    TYPE_IN = 0
    TYPE_OUT = 1
    STATUS_OK = 0
    STATUS_NONE = 0xff      # ours: the device wrote nothing

    SECTOR = 512
    SECTOR_MARK = 16        # block, generation and sector, at each sector's beginning
    TEMPLATES = 256
    BUSY = 0x80000000       # in a generation: a request is under way there
    PIECES = 3              # header, data, status
    PARTS = 8               # of the depth: one goes while the device works on the others
    BURST_MOST = 16
    PICKS = 8               # random blocks that are tried until one is not busy

cpdef enum BlkPhase:
    REST = 0                # waits for what is under way
    FILL = 1                # writes each block once
    RUN = 2                 # the pattern
    CHECK = 3               # reads each block that was written

CONTROL_BYTES = CONTROL_STRIDE
BLOCKS_MAX = 0xffffffff
VERIFY_BLOCKS_MAX = 1 << 27


cdef inline uint8_t *control_of(BlkQueue *queue, uint32_t index) noexcept nogil:
    return queue.control + <uint64_t>index * CONTROL_STRIDE


cdef inline uint64_t next_random(uint64_t *state) noexcept nogil:
    # xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators"
    cdef uint64_t x = state[0]
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    state[0] = x
    return x * <uint64_t>0x2545F4914F6CDD1DULL


@cython.final
cdef class BlkGenerator:
    """Requests on all queues; `run` on a thread, the rest from another.

    `queues`: (frontend.Queue, GPA of depth * CONTROL_BYTES, GPA of depth blocks) of each.
    """

    def __cinit__(self, queues, *, int depth, uint32_t block_bytes, uint64_t blocks,
                  double read_share, bint random, bint verify=False, bint indirect=False,
                  uint64_t seed=1):
        cdef int i
        if not queues or depth < 1 or not 0 <= read_share <= 1:
            raise ValueError("queues, depth or read_share")
        if block_bytes == 0 or block_bytes % SECTOR or not 0 < blocks <= BLOCKS_MAX:
            raise ValueError(f"{blocks} blocks of {block_bytes} bytes")
        if verify and blocks > VERIFY_BLOCKS_MAX:
            raise ValueError(f"{blocks} blocks are too many to verify")
        self.depth, self.block_bytes, self.blocks = depth, block_bytes, blocks
        self.random, self.verify, self.indirect = random, verify, indirect
        self.read_share = <uint64_t>(read_share * 4294967296.0)
        self.noise = seed * 0x9E3779B97F4A7C15 | 1
        self.burst = max(1, min(depth // PARTS, BURST_MOST))
        self.rate_us = ticks_per_us()
        self.count = len(queues)
        self.queues = <BlkQueue *>calloc(self.count, sizeof(BlkQueue))
        self.template = <uint8_t *>calloc(1, block_bytes + TEMPLATES)
        for i in range(2):
            self.histograms[i] = <uint64_t *>calloc(BINS, sizeof(uint64_t))
        if verify:
            self.generations = <uint32_t *>calloc(blocks, sizeof(uint32_t))
        if (self.queues == NULL or self.template == NULL or self.histograms[0] == NULL
                or self.histograms[1] == NULL or (verify and self.generations == NULL)):
            raise MemoryError
        from random import Random

        noise = Random(seed).randbytes(block_bytes + TEMPLATES)
        memcpy(self.template, <const uint8_t *>noise, block_bytes + TEMPLATES)
        self.keep = []
        for i, (queue, control_gpa, data_gpa) in enumerate(queues):
            self._wire(&self.queues[i], queue, control_gpa, data_gpa)

    cdef _wire(self, BlkQueue *queue, object started, object control_gpa, object data_gpa):
        cdef DriverVirtqueue ring = started.ring
        cdef Segment control, data
        cdef uint32_t hint = 0, i
        queue.owner = <uint32_t *>calloc(ring.size, sizeof(uint32_t))
        queue.free = <uint32_t *>calloc(self.depth, sizeof(uint32_t))
        queue.slots = <Slot *>calloc(self.depth, sizeof(Slot))
        if queue.owner == NULL or queue.free == NULL or queue.slots == NULL:
            raise MemoryError
        if (translate(&ring.memory.map, control_gpa, <uint64_t>self.depth * CONTROL_STRIDE,
                      &control, 1, &hint) != 1
                or translate(&ring.memory.map, data_gpa, <uint64_t>self.depth * self.block_bytes,
                             &data, 1, &hint) != 1):
            raise ValueError("a queue's buffers are not in one piece of memory")
        queue.control, queue.control_gpa = control.hva, control_gpa
        queue.data, queue.data_gpa = data.hva, data_gpa
        queue.kick_fd = -1 if started.kick is None else started.kick.fileno()
        memset(queue.control, 0, <uint64_t>self.depth * CONTROL_STRIDE)
        for i in range(self.depth):
            queue.free[i] = i
            self.fill(queue.data + <uint64_t>i * self.block_bytes, i, 0)
        queue.free_count = self.depth
        ring.disarm()
        queue.ring = <void *>ring
        self.packed = ring.features >> Feature.RING_PACKED & 1
        self.keep.append(started)

    def __dealloc__(self):
        cdef int i
        if self.queues != NULL:
            for i in range(self.count):
                free(self.queues[i].owner)
                free(self.queues[i].free)
                free(self.queues[i].slots)
        free(self.queues)
        free(self.template)
        free(self.histograms[0])
        free(self.histograms[1])
        free(self.generations)

    # The loop. -----------------------------------------------------------------------------

    cdef void loop(self) noexcept nogil:
        cdef uint64_t now = ticks(), after, started = now
        cdef uint32_t phase = BlkPhase.REST, wanted
        cdef int found, i
        self.moved_at = now
        while not load_acquire_u32(&self.stopping):
            wanted = load_acquire_u32(&self.phase)
            if wanted != phase:
                phase = wanted
                self.done = 0
                self.cursor = 0
            found = 0
            for i in range(self.count):
                found += self.complete(&self.queues[i])
                if self.queues[i].free_count:
                    found += self.submit(&self.queues[i], phase)
                if unlikely(self.broken):
                    return
            after = ticks()
            if found:
                self.busy_ticks += after - now
                self.moved_at = after
            else:
                cpu_pause()
            self.total_ticks = after - started
            now = after

    cdef int complete(self, BlkQueue *queue) noexcept nogil:
        cdef UsedEntry used[BURST_MOST]
        cdef int count = (<DriverVirtqueue>queue.ring).collect(used, self.burst), i
        cdef uint32_t index, status
        cdef uint64_t now
        cdef uint8_t *control
        cdef Slot *slot
        if count <= 0:
            if unlikely(count < 0):
                self.broken = 1 + <int>(queue - self.queues)
            return 0
        # The device has written these lines, and the next request will be: all are fetched at
        # once, not one after the other.
        for i in range(count):
            control = control_of(queue, queue.owner[used[i].id])
            prefetch_write(control)
            if self.indirect:
                prefetch_write(control + AT_TABLE)
        now = ticks()
        for i in range(count):
            index = queue.owner[used[i].id]
            slot = &queue.slots[index]
            queue.free[queue.free_count] = index
            queue.free_count += 1
            status = read_once_u8(control_of(queue, index) + AT_STATUS)
            self.histograms[slot.write][bin_of(now - slot.started)] += 1
            if unlikely(status != STATUS_OK):
                queue.count.failed += 1
            elif slot.write:
                queue.count.writes += 1
            else:
                queue.count.reads += 1
                if slot.generation and not self.intact(
                        queue.data + <uint64_t>index * self.block_bytes, slot.block,
                        slot.generation):
                    queue.count.corrupt += 1
            if self.verify:
                # A write that failed may have been done in part: nobody knows what is there.
                if slot.write:
                    self.generations[slot.block] = slot.generation if status == STATUS_OK else 0
                else:
                    self.generations[slot.block] &= ~<uint32_t>BUSY
        return count

    cdef int submit(self, BlkQueue *queue, uint32_t phase) noexcept nogil:
        cdef uint16_t ids[PIECES * BURST_MOST]
        cdef uint64_t now
        cdef uint32_t index
        cdef int count = 0, limit
        cdef Slot *slot
        if phase == BlkPhase.REST:
            return 0
        limit = min(<int>queue.free_count, self.burst)
        # Fetches what the chains will be written to.
        (<DriverVirtqueue>queue.ring).reserve(ids, limit * (1 if self.indirect else PIECES))
        now = ticks()
        while count < limit:
            index = queue.free[queue.free_count - 1]
            slot = &queue.slots[index]
            if not self.choose(slot, phase):
                break
            slot.started = now
            if self.offer(queue, index) < 0:
                break
            queue.free_count -= 1
            count += 1
        if count and (<DriverVirtqueue>queue.ring).publish() and queue.kick_fd >= 0:
            queue.count.kicks += 1
            if unlikely(not signal_eventfd(queue.kick_fd)):
                self.deaf = True
                self.broken = 1 + <int>(queue - self.queues)
        return count

    cdef bint choose(self, Slot *slot, uint32_t phase) noexcept nogil:
        """What the next request is, and where; False where none may start now."""
        cdef uint64_t noise
        cdef int _pick
        if phase != BlkPhase.RUN:
            slot.write = phase == BlkPhase.FILL
            while self.done < self.blocks:
                slot.block = self.done
                if phase == BlkPhase.FILL or self.generations[self.done] & ~<uint32_t>BUSY:
                    if not self.claim(slot, phase):
                        return False        # comes free when what is under way has ended
                    self.done += 1
                    return True
                self.done += 1
            return False
        noise = next_random(&self.noise)
        slot.write = <uint32_t>noise >= self.read_share
        if self.random:
            for _pick in range(PICKS):
                slot.block = ((noise >> 32) * self.blocks) >> 32
                if self.claim(slot, phase):
                    return True
                noise = next_random(&self.noise)
            return False
        slot.block = self.cursor
        if not self.claim(slot, phase):
            return False
        self.cursor = self.cursor + 1 if self.cursor + 1 < self.blocks else 0
        return True

    cdef bint claim(self, Slot *slot, uint32_t phase) noexcept nogil:
        """Nobody else touches the block until the request comes back."""
        cdef uint32_t generation
        slot.generation = 0
        if not self.verify:
            return True
        generation = self.generations[slot.block]
        if generation & BUSY:
            return False
        if slot.write:
            generation = generation + 1 if generation + 1 < BUSY else 1
        slot.generation = generation
        self.generations[slot.block] = generation | BUSY
        return True

    cdef int offer(self, BlkQueue *queue, uint32_t index) noexcept nogil:
        cdef Slot *slot = &queue.slots[index]
        cdef uint8_t *control = control_of(queue, index)
        cdef uint64_t control_gpa = queue.control_gpa + <uint64_t>index * CONTROL_STRIDE
        cdef uint64_t data_gpa = queue.data_gpa + <uint64_t>index * self.block_bytes
        cdef Segment pieces[PIECES]
        cdef int id
        write_once_u64(control, TYPE_OUT if slot.write else TYPE_IN)
        write_once_u64(control + 8, slot.block * (self.block_bytes // SECTOR))
        (<uint8_t *>control)[AT_STATUS] = STATUS_NONE
        if slot.write and self.verify:
            self.fill(queue.data + <uint64_t>index * self.block_bytes, slot.block,
                      slot.generation)
        if self.indirect:
            write_once_u64(control + AT_TABLE, control_gpa)
            write_once_u64(control + AT_TABLE + 8, self.entry(HEADER_BYTES, 0, 1))
            write_once_u64(control + AT_TABLE + 16, data_gpa)
            write_once_u64(control + AT_TABLE + 24, self.entry(
                self.block_bytes, 0 if slot.write else DescriptorFlag.DESC_WRITE, 2))
            write_once_u64(control + AT_TABLE + 32, control_gpa + AT_STATUS)
            write_once_u64(control + AT_TABLE + 40, self.entry(1, DescriptorFlag.DESC_WRITE, 0))
            id = (<DriverVirtqueue>queue.ring).add_table(
                control_gpa + AT_TABLE, TABLE_BYTES, 1 + (0 if slot.write else self.block_bytes))
        else:
            pieces[0].gpa, pieces[0].length = control_gpa, HEADER_BYTES
            pieces[1].gpa, pieces[1].length = data_gpa, self.block_bytes
            pieces[2].gpa, pieces[2].length = control_gpa + AT_STATUS, 1
            id = (<DriverVirtqueue>queue.ring).add_chain(
                pieces, 2 if slot.write else 1, 1 if slot.write else 2)
        if id >= 0:
            queue.owner[id] = index
        return id

    cdef uint64_t entry(self, uint32_t length, uint16_t flags, uint16_t next) noexcept nogil:
        """The second half of a descriptor in an indirect table; `next` 0: it is the last."""
        if self.packed:
            return length | <uint64_t>flags << 48
        if next:
            flags |= DescriptorFlag.DESC_NEXT
        return length | <uint64_t>flags << 32 | <uint64_t>next << 48

    cdef void fill(self, uint8_t *data, uint64_t block, uint32_t generation) noexcept nogil:
        cdef uint32_t at = 0
        memcpy(data, self.template + (block + generation) % TEMPLATES, self.block_bytes)
        while at < self.block_bytes:
            write_once_u64(data + at, block)
            write_once_u64(data + at + 8, generation | <uint64_t>at << 32)
            at += SECTOR

    cdef bint intact(self, const uint8_t *data, uint64_t block,
                     uint32_t generation) noexcept nogil:
        cdef const uint8_t *wanted = self.template + (block + generation) % TEMPLATES
        cdef uint32_t at = 0
        while at < self.block_bytes:
            if (read_once_u64(data + at) != block
                    or read_once_u64(data + at + 8) != (generation | <uint64_t>at << 32)
                    or memcmp(data + at + SECTOR_MARK, wanted + at + SECTOR_MARK,
                              SECTOR - SECTOR_MARK) != 0):
                return False
            at += SECTOR
        return True

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
        if phase in (BlkPhase.CHECK, BlkPhase.FILL) and not self.verify:
            raise ValueError("nothing is verified")
        store_release_u32(&self.phase, phase)

    @property
    def progress(self) -> float:
        """Of a whole pass: the share that was submitted."""
        return self.done / self.blocks

    @property
    def under_way(self) -> int:
        """Requests that the device has."""
        cdef int i
        return sum([self.depth - self.queues[i].free_count for i in range(self.count)])

    @property
    def silent_s(self) -> float:
        """Seconds since a request last came back or went."""
        # Read before the clock, and compared with a sign: the loop moves it meanwhile, on a
        # processor whose clock may be ahead.
        cdef uint64_t moved_at = load_acquire_u64(&self.moved_at)
        return max(0.0, <double><int64_t>(ticks() - moved_at)) / self.rate_us / 1e6

    @property
    def broken_pair(self) -> int | None:
        """The queue whose ring the device has broken."""
        return self.broken - 1 if self.broken else None

    def ticks(self) -> dict:
        """Of the loop so far: all, those of turns that moved something, and how long one is."""
        return {"total": self.total_ticks, "busy": self.busy_ticks, "per_us": self.rate_us}

    def counters(self) -> list:
        """Of each queue, since the start."""
        cdef int i
        return [self.queues[i].count for i in range(self.count)]

    def latencies(self, bint writes) -> list:
        """(ticks, count) of each bin in use, in order."""
        cdef int i
        return [(value_of(i), self.histograms[writes][i])
                for i in range(BINS) if self.histograms[writes][i]]

    def forget_latencies(self) -> None:
        """What comes now counts; a request that ends meanwhile may be lost to the count."""
        memset(self.histograms[0], 0, BINS * sizeof(uint64_t))
        memset(self.histograms[1], 0, BINS * sizeof(uint64_t))
