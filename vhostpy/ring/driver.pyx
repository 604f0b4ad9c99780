"""The driver's end of a virtqueue: adds chains, kicks, collects what was used.

The mirror image of `_ring`'s Virtqueue, so that each can be read, and tested, against the
other. The layout is chosen once a burst.
"""
cimport cython
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free

from vhostpy.ring.chain cimport BURST
from vhostpy.ring.packed cimport (
    packed_add, packed_add_burst, packed_add_table, packed_collect, packed_driver_arm,
    packed_driver_disarm, packed_driver_publish, packed_driver_start, packed_reserve,
)
from vhostpy._spec cimport DescriptorFlag, Feature
from vhostpy.ring.split cimport (
    split_add, split_add_burst, split_add_table, split_collect, split_driver_arm,
    split_driver_disarm, split_driver_publish, split_driver_start, split_reserve,
)
from vhostpy.memory.guest cimport translate
from vhostpy.system.notify cimport signal_eventfd, start_watchdog

import struct

from vhostpy.errors import LEAVE_NON_BLOCKING, ProtocolError
from vhostpy.ring.parts import (
    alignments_of, check_base, check_size, first_base, is_packed, sizes_of,
)


cdef uint8_t *whole_of(GuestMemory memory, uint64_t gpa, uint64_t length) except NULL:
    cdef Segment segment
    cdef uint32_t hint = 0
    if translate(&memory.map, gpa, length, &segment, 1, &hint) != 1:
        raise ValueError(f"{length} bytes at {gpa:#x} are not in one piece of memory")
    return segment.hva


def table_of(readable, writable, packed: bool) -> bytes:
    """An indirect table of these pieces."""
    count = len(readable) + len(writable)
    entries = []
    for i, (gpa, length) in enumerate([*readable, *writable]):
        flags = DescriptorFlag.DESC_WRITE if i >= len(readable) else 0
        next = (i + 1) % count
        if packed:
            entries.append(struct.pack("<QIHH", gpa, length, 0, flags))
        else:
            flags |= DescriptorFlag.DESC_NEXT if next else 0
            entries.append(struct.pack("<QIHH", gpa, length, flags, next))
    return b"".join(entries)


@cython.final
cdef class DriverVirtqueue:
    """The driver's end of one virtqueue, which it lays out anew in `memory`.

    Serves `load`, `check` and the tests. It trusts the back-end as little as that trusts it.
    """

    def __cinit__(self, GuestMemory memory not None, object size, object features, *,
                  object desc_gpa, object avail_gpa, object used_gpa, object base=None,
                  int kick_fd=-1, bint fifo=False):
        cdef DriverRing *ring
        cdef uint32_t i
        check_size(size, features)
        base = first_base(features) if base is None else base
        check_base(base, size, features)
        self.ring = ring = <DriverRing *>calloc(1, sizeof(DriverRing))
        if ring == NULL:
            raise MemoryError
        ring.size = ring.free_count = size
        ring.links = <uint16_t *>calloc(ring.size, sizeof(uint16_t))
        ring.counts = <uint16_t *>calloc(ring.size, sizeof(uint16_t))
        ring.rooms = <uint32_t *>calloc(ring.size, sizeof(uint32_t))
        if ring.links == NULL or ring.counts == NULL or ring.rooms == NULL:
            raise MemoryError
        self.memory = memory
        self.features = features
        ring.packed = features >> Feature.RING_PACKED & 1
        ring.in_order = features >> Feature.IN_ORDER & 1
        ring.event_idx = features >> Feature.EVENT_IDX & 1
        # With IN_ORDER descriptors are used in ring order.
        ring.fifo = fifo or ring.in_order
        ring.kick_fd = kick_fd
        lengths = sizes_of(size, features)
        for gpa, length, alignment in zip(
            (desc_gpa, avail_gpa, used_gpa), lengths, alignments_of(features), strict=True
        ):
            if gpa % alignment:
                raise ValueError(f"ring part at {gpa:#x}: not aligned to {alignment}")
            memory.write(gpa, bytes(length))
        ring.desc = whole_of(memory, desc_gpa, lengths[0])
        ring.avail = whole_of(memory, avail_gpa, lengths[1])
        ring.used = whole_of(memory, used_gpa, lengths[2])
        for i in range(ring.size):
            ring.links[i] = <uint16_t>(i + 1)
        ring.free_tail = <uint16_t>(ring.size - 1)
        if ring.packed:
            packed_driver_start(ring, base)
        else:
            split_driver_start(ring, base)
        self.arm()

    def __dealloc__(self):
        if self.ring != NULL:
            free(self.ring.links)
            free(self.ring.counts)
            free(self.ring.rooms)
            free(self.ring)

    cdef int add_chain(self, const Segment *pieces, int readable, int writable) noexcept nogil:
        if self.ring.packed:
            return packed_add(self.ring, pieces, readable, writable)
        return split_add(self.ring, pieces, readable, writable)

    cdef int add_table(self, uint64_t gpa, uint32_t length, uint32_t writable) noexcept nogil:
        if self.ring.packed:
            return packed_add_table(self.ring, gpa, length, writable)
        return split_add_table(self.ring, gpa, length, writable)

    cdef int reserve(self, uint16_t *ids, int limit) noexcept nogil:
        if self.ring.packed:
            return packed_reserve(self.ring, ids, limit)
        return split_reserve(self.ring, ids, limit)

    cdef void add_burst(self, const uint16_t *ids, const Segment *pieces, int count,
                        bint writable) noexcept nogil:
        if self.ring.packed:
            packed_add_burst(self.ring, ids, pieces, count, writable)
        else:
            split_add_burst(self.ring, ids, pieces, count, writable)

    cdef bint publish(self) noexcept nogil:
        if self.ring.packed:
            return packed_driver_publish(self.ring)
        return split_driver_publish(self.ring)

    cdef int collect(self, UsedEntry *out, int limit) noexcept nogil:
        if self.ring.packed:
            return packed_collect(self.ring, out, limit)
        return split_collect(self.ring, out, limit)

    # Doors. ------------------------------------------------------------------------------

    @staticmethod
    def ring_bytes(size: int) -> tuple[int, int, int]:
        """Bytes of the three parts, whatever will be negotiated."""
        return sizes_of(size, 1 << Feature.EVENT_IDX)    # a packed ring needs less

    @property
    def size(self) -> int:
        return self.ring.size

    @property
    def free(self) -> int:
        """Free descriptors."""
        return self.ring.free_count

    @property
    def base(self) -> int:
        """Where the ring goes on, as Virtqueue.base; all of it was used."""
        if self.ring.packed:
            return self.ring.avail_next | <uint32_t>self.ring.last_used << 16
        return self.ring.avail_next

    def add(self, readable, writable, indirect_gpa=None) -> int:
        """Adds a chain of (GPA, length) pieces, by an indirect table there if asked; its id.

        The device sees it at the next kick(). Raises BufferError where the ring is full.
        """
        cdef Segment *pieces
        cdef int count = len(readable) + len(writable), i, head
        if count == 0:
            raise ValueError("a chain without a piece")
        if indirect_gpa is not None:
            table = table_of(readable, writable, is_packed(self.features))
            self.memory.write(indirect_gpa, table)
            head = self.add_table(indirect_gpa, len(table), sum(n for _, n in writable))
        else:
            pieces = <Segment *>calloc(count, sizeof(Segment))
            if pieces == NULL:
                raise MemoryError
            try:
                for i, (gpa, length) in enumerate([*readable, *writable]):
                    pieces[i].gpa, pieces[i].length = gpa, length
                head = self.add_chain(pieces, len(readable), len(writable))
            finally:
                free(pieces)
        if head < 0:
            raise BufferError(f"a chain of {count}, {self.ring.free_count} descriptors are free")
        return head

    def add_many(self, pieces, bint writable) -> list:
        """Adds (GPA, length) pieces, each a chain, while descriptors are free; their ids."""
        cdef Segment burst[BURST]
        cdef uint16_t ids[BURST]
        cdef int count, i
        result = []
        for start in range(0, len(pieces), BURST):
            part = pieces[start:start + BURST]
            for i, (gpa, length) in enumerate(part):
                burst[i].gpa, burst[i].length = gpa, length
            count = self.reserve(ids, len(part))
            self.add_burst(ids, burst, count, writable)
            result += [ids[i] for i in range(count)]
        return result

    def kick(self, *, bint force=False) -> bool:
        """Publishes what was added; kicks if the device asks for it, and says whether.

        Raises ProtocolError where the kick fd, which the back-end holds too, would block us.
        """
        cdef bint wanted = self.publish() or force, done = True
        if wanted and self.ring.kick_fd >= 0:
            with nogil:
                start_watchdog()
                done = signal_eventfd(self.ring.kick_fd)
        if not done:
            raise ProtocolError("the back-end makes us wait at its kick fd", LEAVE_NON_BLOCKING)
        return wanted

    def used(self) -> list:
        """(id, bytes written) of chains that came back; ProtocolError if the back-end lies."""
        cdef UsedEntry out[BURST]
        cdef int count = BURST, i
        result = []
        while count == BURST:
            with nogil:
                count = self.collect(out, BURST)
            for i in range(count):
                result.append((out[i].id, out[i].length))
        if count < 0 and not result:
            raise ProtocolError(f"used entry {self.ring.last_used}: not a chain that is out")
        return result

    def arm(self) -> bool:
        """Asks for calls; True when used chains are there already."""
        if self.ring.packed:
            return packed_driver_arm(self.ring)
        return split_driver_arm(self.ring)

    def disarm(self) -> None:
        """Wants no calls."""
        if self.ring.packed:
            packed_driver_disarm(self.ring)
        else:
            split_driver_disarm(self.ring)
