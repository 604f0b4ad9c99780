"""Which chains a back-end has, in memory that outlives it: for whoever comes after a kill.

Order of stores ("Inflight I/O tracking"): a chain is marked, with its number, before it is
worked on; chains given back are linked before used.idx moves, and unmarked behind it. So
a kill between any two stores leaves either a chain that is marked and will be done again,
or one that the driver has.

Source: vhost-user, "Inflight I/O tracking". The region is shared with the front-end.
"""
from libc.stdlib cimport calloc, free

from vhostpy._hw cimport read_once_u8, read_once_u16, read_once_u64, write_once_u16, write_once_u64

from vhostpy.errors import ProtocolError

cdef enum:
    ALIGNMENT = 64      # of each queue's region, as QEMU's own back-end has it
    VERSION = 1
    AVAIL_ENTRIES = 4   # of a split ring's avail: flags, idx, ring[]


def region_bytes(queue_size: int) -> int:
    """What one queue needs."""
    return -(-(REGION_DESC + DESC_BYTES * queue_size) // ALIGNMENT) * ALIGNMENT


class InflightArea:
    """The memory of all queues, as the front-end hands it over."""

    def __init__(self, fd: int, offset: int, size: int, num_queues: int, queue_size: int) -> None:
        if offset % 8:
            raise ProtocolError(f"inflight: memory at offset {offset}, no multiple of 8")
        if num_queues * region_bytes(queue_size) > size:
            raise ProtocolError(
                f"inflight: {num_queues} queues of {queue_size} need "
                f"{num_queues * region_bytes(queue_size)} bytes, there are {size}")
        self.mapping = Mapping(fd, offset, size)
        self.num_queues = num_queues
        self.queue_size = queue_size

    @property
    def poisoned(self) -> bool:
        """It was truncated: its session is to be ended."""
        return self.mapping.poisoned

    def queue(self, index: int) -> InflightQueue:
        """The region of one queue."""
        if not 0 <= index < self.num_queues:
            raise ValueError(f"queue {index} of {self.num_queues}")
        return InflightQueue(self.mapping, index * region_bytes(self.queue_size), self.queue_size)


cdef class InflightQueue:
    def __cinit__(self, Mapping mapping not None, uint64_t offset, uint32_t size):
        if not 0 < size <= 32768 or offset + region_bytes(size) > mapping.size:
            raise ValueError(f"{size} chains at {offset} of {mapping.size} bytes")
        self.mapping = mapping
        self.tracker.region = mapping.data + offset
        self.tracker.size = size
        self.tracker.batch = <uint16_t *>calloc(size, sizeof(uint16_t))
        self.taken_before = []

    def __dealloc__(self):
        free(self.tracker.batch)
        free(self.tracker.again)

    cdef recover(self, uint16_t used_idx):
        cdef Tracker *tracker = &self.tracker
        cdef uint8_t *region = tracker.region
        cdef uint8_t *state
        cdef uint16_t version = read_once_u16(region + REGION_VERSION)
        cdef uint16_t head, count
        cdef uint32_t i
        self.taken_before = []
        tracker.pushed = 0
        tracker.again_next = tracker.again_end = 0
        if version == 0:
            # Zeroed memory, as the front-end got it.
            write_once_u64(region, 0)       # features
            write_once_u16(region + REGION_DESC_NUM, <uint16_t>tracker.size)
            write_once_u16(region + REGION_USED_IDX, used_idx)
            store_release_u16(region + REGION_VERSION, VERSION)
            return
        if version != VERSION or read_once_u16(region + REGION_DESC_NUM) != tracker.size:
            raise ProtocolError(
                f"inflight: version {version} of {read_once_u16(region + REGION_DESC_NUM)} "
                f"descriptors, expected {VERSION} of {tracker.size}")
        # Killed after used.idx had moved, before the chains were unmarked.
        count = <uint16_t>(used_idx - read_once_u16(region + REGION_USED_IDX))
        head = read_once_u16(region + REGION_BATCH_HEAD)
        for _ in range(min(<uint32_t>count, tracker.size)):
            if head >= tracker.size:
                break
            state = region + REGION_DESC + DESC_BYTES * head
            store_release_u16(state + DESC_INFLIGHT, 0)
            head = read_once_u16(state + DESC_NEXT)
        store_release_u16(region + REGION_USED_IDX, used_idx)
        found = []
        for i in range(tracker.size):
            state = region + REGION_DESC + DESC_BYTES * i
            if read_once_u8(state + DESC_INFLIGHT):
                found.append((read_once_u64(state + DESC_COUNTER), i))
        found.sort()
        tracker.counter = (found[len(found) - 1][0] + 1) & 0xffffffffffffffff if found else 0
        self.taken_before = [id_ for _, id_ in found]
        if found:
            self.put_again()

    def put_again(self):
        cdef uint16_t i, id_
        cdef uint32_t mask = 1
        while mask < len(self.taken_before):
            mask *= 2
        free(self.tracker.again)
        self.tracker.again = <uint8_t *>calloc(1, AVAIL_ENTRIES + 2 * mask)
        if self.tracker.again == NULL:
            raise MemoryError
        for i, id_ in enumerate(self.taken_before):
            write_once_u16(self.tracker.again + AVAIL_ENTRIES + 2 * i, id_)
        self.tracker.again_end = <uint16_t>len(self.taken_before)
