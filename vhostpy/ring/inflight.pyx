"""Which chains a back-end has, in memory that outlives it: for whoever comes after a kill.

The front-end keeps that memory and hands it over again with each connection. What lies in
a queue's region, and in which order it is stored, is known to `inflight_split` and
`inflight_packed`; here is where regions lie, how chains that were under way come again,
and a note that a device leaves for its next life. The memory is shared with the front-end,
so what is read from it is checked.

Source: vhost-user, "Inflight I/O tracking".
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from vhostpy.ring.chain cimport DESCRIPTOR_SIZE
from vhostpy.system.hw cimport (
    read_once_u16, read_once_u64, read_once_u8, store_release_u16, write_once_u16,
    write_once_u64,
)
from vhostpy.ring.inflight_packed cimport (
    PACKED_ENTRY, PACKED_HEADER, packed_put_again, packed_recover, packed_track_begin,
)
from vhostpy.ring.inflight_split cimport SPLIT_ENTRY, SPLIT_HEADER, split_recover, split_track_begin
from vhostpy.ring.tracker cimport REGION_DESC_NUM, REGION_VERSION

from vhostpy.system.account import COMMON, Account
from vhostpy.errors import ProtocolError

cdef enum:
    ALIGNMENT = 64      # of each queue's region, as QEMU's own back-end has it
    VERSION = 1
    AVAIL_ENTRIES = 4   # of a split ring's avail: flags, idx, ring[]
    # A front-end asks for the queue size that it offers, and a guest's firmware may take
    # more: SeaBIOS takes 256 of QEMU's 128. This is what QEMU lets it take.
    QUEUE_SIZE_USUAL = 1024
    # Behind the regions of all queues: one word, so that a kill finds it old or new. Less
    # than ALIGNMENT, so it moves no region, whoever made the memory.
    NOTE_BYTES = 8

NOTE_MARK = int.from_bytes(b"vhostpy", "big") << 8      # and the note in the last byte


def region_bytes(queue_size: int) -> int:
    """What one queue needs, of either layout."""
    return align(PACKED_HEADER + PACKED_ENTRY * queue_size)


def area_bytes(num_queues: int, queue_size: int) -> int:
    """What to give a front-end that asks for so many queues of that size."""
    return num_queues * region_bytes(max(queue_size, QUEUE_SIZE_USUAL)) + NOTE_BYTES


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class InflightArea:
    """The memory of all queues, as the front-end hands it over."""

    def __init__(
        self,
        fd: int,
        offset: int,
        size: int,
        num_queues: int,
        queue_size: int,
        account: Account = COMMON,
    ) -> None:
        if offset % 8:
            raise ProtocolError(f"inflight: memory at offset {offset}, no multiple of 8")
        least = num_queues * align(SPLIT_HEADER + SPLIT_ENTRY * queue_size)
        if size < least:
            raise ProtocolError(
                f"inflight: {num_queues} queues of {queue_size} need {least} bytes, "
                f"there are {size}")
        self.mapping = Mapping(fd, offset, size, account)
        self.num_queues = num_queues
        # So also where another back-end has made the memory, by the document's rules.
        self.region_bytes = size // num_queues // ALIGNMENT * ALIGNMENT

    @property
    def poisoned(self) -> bool:
        """It was truncated: its session is to be ended."""
        return self.mapping.poisoned

    @property
    def note(self) -> int:
        """What a device of ours left for its next life, 1 to 255; 0: nothing."""
        word = self._note_word() or 0
        return word & 0xff if word & ~0xff == NOTE_MARK else 0

    @note.setter
    def note(self, value: int) -> None:
        # What another back-end may have put there stays.
        if self._note_word() == 0 or self.note:
            write_word(self.mapping, self._note_at, NOTE_MARK | value)

    @property
    def _note_at(self) -> int:
        return self.num_queues * self.region_bytes

    def _note_word(self) -> int | None:
        """None: there is no room for it."""
        if self.mapping.size - self._note_at < NOTE_BYTES:
            return None
        return read_word(self.mapping, self._note_at)

    def queue(self, index: int) -> InflightQueue:
        """The region of one queue."""
        if not 0 <= index < self.num_queues:
            raise ValueError(f"queue {index} of {self.num_queues}")
        return InflightQueue(self.mapping, index * self.region_bytes, self.region_bytes)


cdef void touch(const uint8_t *start, uint64_t size) noexcept nogil:
    cdef uint64_t at
    for at in range(0, size, 4096):
        read_once_u8(start + at)
    read_once_u8(start + size - 1)


cdef uint64_t read_word(Mapping mapping, uint64_t offset):
    cdef uint64_t value
    with nogil:         # a page fault may last
        value = read_once_u64(mapping.data + offset)
    return value


cdef write_word(Mapping mapping, uint64_t offset, uint64_t value):
    with nogil:
        write_once_u64(mapping.data + offset, value)


cdef class InflightQueue:
    def __cinit__(self, Mapping mapping not None, uint64_t offset, uint64_t size_bytes):
        if size_bytes < ALIGNMENT or offset + size_bytes > mapping.size:
            raise ValueError(f"{size_bytes} bytes at {offset} of {mapping.size}")
        self.mapping = mapping
        self.tracker.region = mapping.data + offset
        self.size_bytes = size_bytes
        self.taken_before = []

    def __dealloc__(self):
        self.forget()

    def forget(self):
        free(self.tracker.batch)
        free(self.tracker.next)
        free(self.tracker.last)
        free(self.tracker.again)
        free(self.tracker.again_entries)
        self.tracker.batch = self.tracker.next = self.tracker.last = NULL
        self.tracker.again = NULL
        self.tracker.again_entries = NULL

    cdef start(self, Ring *ring):
        cdef Tracker *tracker = &self.tracker
        cdef bint packed = ring.control.packed
        cdef uint16_t version
        # What follows has the interpreter's lock: no page fault is to last there.
        with nogil:
            touch(tracker.region, self.size_bytes)
            if packed:
                touch(ring.control.desc, DESCRIPTOR_SIZE * ring.control.size)
            else:
                touch(ring.control.used, 4 + 8 * ring.control.size)
        version = read_once_u16(tracker.region + REGION_VERSION)
        cdef uint32_t size = ring.control.size, room
        if packed:
            room = (self.size_bytes - PACKED_HEADER) // PACKED_ENTRY
        else:
            room = (self.size_bytes - SPLIT_HEADER) // SPLIT_ENTRY
        if version:
            size = read_once_u16(tracker.region + REGION_DESC_NUM)
        if version > VERSION or not ring.control.size <= size <= room:
            raise ProtocolError(
                f"inflight: memory of version {version} for {size} descriptors in a region for "
                f"{room}, expected version {VERSION} for a queue of {ring.control.size}")
        self.forget()
        tracker.size = size
        tracker.pushed = tracker.pushed_slots = tracker.again_left = 0
        tracker.batch = <uint16_t *>calloc(size, sizeof(uint16_t))
        tracker.next = <uint16_t *>calloc(size, sizeof(uint16_t))
        tracker.last = <uint16_t *>calloc(size, sizeof(uint16_t))
        tracker.again = <uint8_t *>calloc(ring.control.size, DESCRIPTOR_SIZE)
        tracker.again_entries = <uint16_t *>calloc(ring.control.size, sizeof(uint16_t))
        if (tracker.batch == NULL or tracker.next == NULL or tracker.last == NULL
                or tracker.again == NULL or tracker.again_entries == NULL):
            raise MemoryError
        self.taken_before = []
        if version == VERSION:
            if packed:
                self.taken_before = packed_recover(tracker, ring)
                self.put_again_packed()
            else:
                self.taken_before = split_recover(tracker, ring)
                self.put_again_split()
            return
        # Zeroed memory, as the front-end got it.
        if packed:
            packed_track_begin(tracker, ring)
        else:
            split_track_begin(tracker, ring)
        write_once_u64(tracker.region, 0)       # features
        write_once_u16(tracker.region + REGION_DESC_NUM, <uint16_t>size)
        store_release_u16(tracker.region + REGION_VERSION, VERSION)

    def put_again_split(self):
        """An avail ring, as the driver's."""
        cdef uint16_t i, head
        for i, head in enumerate(self.taken_before):
            write_once_u16(self.tracker.again + AVAIL_ENTRIES + 2 * i, head)
        self.tracker.again_first = self.tracker.again_next = 0
        self.tracker.again_left = <uint32_t>len(self.taken_before)

    def put_again_packed(self):
        """A descriptor ring in its first round, with its wrap counter set."""
        cdef uint16_t slot = 0, entry
        cdef int left
        for entries in self.taken_before:
            self.tracker.again_entries[slot] = entries[0]
            left = <int>len(entries)
            for entry in entries:
                left -= 1
                packed_put_again(&self.tracker, slot, entry, left > 0)
                slot += 1
        self.tracker.again_first = self.tracker.again_next = 0x8000
        self.tracker.again_left = <uint32_t>len(self.taken_before)
