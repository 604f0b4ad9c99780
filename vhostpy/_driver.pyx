"""The driver's end of a virtqueue: adds chains, kicks, collects what was used.

The mirror image of `_ring`'s Virtqueue, so that each can be read, and tested, against the
other. The layout is chosen once a burst.
"""
cimport cython
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free

from vhostpy._chain cimport BURST
from vhostpy._spec cimport DescriptorFlag, Feature
from vhostpy._split cimport (
    split_add, split_add_table, split_collect, split_driver_arm, split_driver_disarm,
    split_driver_publish, split_driver_start,
)
from vhostpy.memory cimport translate
from vhostpy.notify cimport signal_eventfd

from vhostpy.errors import ProtocolError
from vhostpy.layout import alignments_of, check_size, sizes_of


cdef uint8_t *whole_of(GuestMemory memory, uint64_t gpa, uint64_t length) except NULL:
    cdef Segment segment
    cdef uint32_t hint = 0
    if translate(&memory.map, gpa, length, &segment, 1, &hint) != 1:
        raise ValueError(f"{length} bytes at {gpa:#x} are not in one piece of memory")
    return segment.hva


@cython.final
cdef class DriverVirtqueue:
    """The driver's end of one virtqueue, which it lays out anew in `memory`.

    Serves `load`, `check` and the tests. It trusts the back-end as little as that trusts it.
    """

    def __cinit__(self, GuestMemory memory not None, object size, object features, *,
                  object desc_gpa, object avail_gpa, object used_gpa, object base=0,
                  int kick_fd=-1):
        cdef DriverRing *ring
        cdef uint32_t i
        check_size(size, features)
        self.ring = ring = <DriverRing *>calloc(1, sizeof(DriverRing))
        if ring == NULL:
            raise MemoryError
        ring.size = ring.free_count = size
        ring.links = <uint16_t *>calloc(ring.size, sizeof(uint16_t))
        ring.counts = <uint16_t *>calloc(ring.size, sizeof(uint16_t))
        if ring.links == NULL or ring.counts == NULL:
            raise MemoryError
        self.memory = memory
        self.features = features
        ring.event_idx = features >> Feature.EVENT_IDX & 1
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
        split_driver_start(ring, base)
        split_driver_arm(ring)

    def __dealloc__(self):
        if self.ring != NULL:
            free(self.ring.links)
            free(self.ring.counts)
            free(self.ring)

    cdef int add_chain(self, const Segment *pieces, int readable, int writable) noexcept nogil:
        return split_add(self.ring, pieces, readable, writable)

    cdef int add_table(self, uint64_t gpa, uint32_t length) noexcept nogil:
        return split_add_table(self.ring, gpa, length)

    cdef bint publish(self) noexcept nogil:
        return split_driver_publish(self.ring)

    cdef int collect(self, UsedEntry *out, int limit) noexcept nogil:
        return split_collect(self.ring, out, limit)

    # Doors. ------------------------------------------------------------------------------

    @staticmethod
    def ring_bytes(size: int) -> tuple[int, int, int]:
        """Bytes of the three parts, whatever will be negotiated."""
        return sizes_of(size, 1 << Feature.EVENT_IDX)

    @property
    def size(self) -> int:
        return self.ring.size

    @property
    def free(self) -> int:
        """Free descriptors."""
        return self.ring.free_count

    @property
    def base(self) -> int:
        """The next avail index."""
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
            table = b"".join([
                gpa.to_bytes(8, "little") + length.to_bytes(4, "little")
                + ((DescriptorFlag.DESC_NEXT if i + 1 < count else 0)
                   | (DescriptorFlag.DESC_WRITE if i >= len(readable) else 0)
                   ).to_bytes(2, "little")
                + ((i + 1) % count).to_bytes(2, "little")
                for i, (gpa, length) in enumerate([*readable, *writable])
            ])
            self.memory.write(indirect_gpa, table)
            head = self.add_table(indirect_gpa, len(table))
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

    def kick(self, *, bint force=False) -> bool:
        """Publishes what was added; kicks if the device asks for it, and says whether."""
        cdef bint wanted = self.publish() or force
        if wanted and self.ring.kick_fd >= 0:
            with nogil:
                signal_eventfd(self.ring.kick_fd)
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
        return split_driver_arm(self.ring)

    def disarm(self) -> None:
        """Wants no calls."""
        split_driver_disarm(self.ring)
