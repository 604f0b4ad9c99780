"""Guest memory: regions, translation, generations, dirty log.

Knows addresses and bytes; knows no ring, no message and no socket.
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_INCREF
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from vhostpy.system.hw cimport atomic_add_i64, atomic_or_u8, read_once_u8, unlikely
from vhostpy._spec cimport Limit
from vhostpy.memory.mapping cimport MAPPED_MAX, size_text

from vhostpy.system.account import COMMON
from vhostpy.errors import GuestError, ProtocolError

# The longest Segment: its length is 32 bits, and pieces stay page-aligned.
cdef uint64_t PIECE_MAX = 0xFFFFF000
cdef int64_t generations = 0
cdef int64_t generations_leaked = 0


def leaked_generations() -> int:
    """Generations that went while requests were under way in them."""
    return generations_leaked


@cython.final
cdef class RegionInfo:
    """A region of guest memory (vhost-user, "Memory region description")."""

    def __cinit__(self, gpa: int, size: int, uva: int, Mapping mapping not None):
        for name, value in (("guest address", gpa), ("user address", uva), ("size", size)):
            if not 0 <= value < 2**64:
                raise ProtocolError(f"region: {name} {value} is not within 64 bits")
        what = f"region of {size_text(size)} at guest address {gpa:#x}"
        if size == 0:
            raise ProtocolError(f"{what}: zero size")
        if gpa + size > 2**64 or uva + size > 2**64:
            raise ProtocolError(f"{what}, user address {uva:#x}: wraps at 2**64")
        if size > mapping.size:
            raise ProtocolError(f"{what}: only {size_text(mapping.size)} are mapped")
        self.gpa = gpa
        self.size = size
        self.uva = uva
        self.mapping = mapping

    def __eq__(self, other):
        if not isinstance(other, RegionInfo):
            return NotImplemented
        return (self.gpa, self.size, self.uva, self.mapping) == (
            other.gpa, other.size, other.uva, other.mapping)

    def __hash__(self):
        return hash((self.gpa, self.size, self.uva))

    def __repr__(self):
        return f"RegionInfo(gpa={self.gpa:#x}, size={self.size:#x}, uva={self.uva:#x})"


# translate() and log_mark() read only what control has checked: bounds, order, overlap.

cdef inline uint32_t region_of(const MemoryMap *map, uint64_t gpa) noexcept nogil:
    """Index of the region that holds `gpa`; map.count: none does."""
    cdef uint32_t low = 0, high = map.count, middle
    while low < high:                     # the first region that starts above gpa
        middle = (low + high) >> 1
        if map.regions[middle].gpa <= gpa:
            low = middle + 1
        else:
            high = middle
    if low == 0 or gpa - map.regions[low - 1].gpa >= map.regions[low - 1].size:
        return map.count
    return low - 1


cdef int translate(const MemoryMap *map, uint64_t gpa, uint64_t length,
                   Segment *out, int limit, uint32_t *hint) noexcept nogil:
    cdef uint32_t index = hint[0]
    cdef const Region *region
    cdef uint64_t offset, piece
    cdef int count = 0
    if index >= map.count or gpa - map.regions[index].gpa >= map.regions[index].size:
        index = region_of(map, gpa)
    while True:
        if unlikely(index >= map.count):
            return TRANSLATE_FAULT
        region = &map.regions[index]
        offset = gpa - region.gpa         # huge, if there is a hole before this region
        if unlikely(offset >= region.size):
            return TRANSLATE_FAULT
        if unlikely(count >= limit):
            return TRANSLATE_FULL
        piece = min(min(region.size - offset, length), PIECE_MAX)
        out[count].hva = region.hva + offset
        out[count].gpa = gpa
        out[count].length = <uint32_t>piece
        count += 1
        length -= piece
        if length == 0:
            hint[0] = index
            return count
        gpa += piece                      # wraps only at the end of the last region
        if offset + piece == region.size:
            index += 1


cdef void log_mark(const LogMap *log, uint64_t gpa, uint64_t length) noexcept nogil:
    cdef uint64_t page = gpa >> 12        # PAGE_LOG
    cdef uint64_t last = gpa + (length - 1)
    cdef uint8_t *byte
    cdef uint8_t bit
    if length == 0:
        return
    if last < gpa:                        # wraps at 2**64
        last = ~<uint64_t>0
    last >>= 12
    while page <= last:
        if unlikely(page >> 3 >= log.size):
            return                        # CVE-2019-14835: no bit past the log
        byte = log.bits + (page >> 3)
        bit = <uint8_t>(1 << (page & 7))
        # An unconditional locked or costs 13-31 cycles, the test 1-4.
        if not read_once_u8(byte) & bit:
            atomic_or_u8(byte, bit)
        page += 1


@cython.final
@cython.no_gc_clear
cdef class GuestMemory:
    """One immutable generation of a front-end's memory table.

    Regions may alias in the front-end's addresses (some boards show RAM twice), not
    in the guest's. Raises ProtocolError on overlap, or more than 509 regions.
    """

    def __cinit__(self, regions):
        cdef RegionInfo info, previous = None
        cdef uint32_t i
        ordered = []
        for info in regions:
            if info is None:
                raise TypeError("a region must be a RegionInfo")
            ordered.append(info)
        ordered.sort(key=lambda region: region.gpa)
        if len(ordered) > Limit.MEM_SLOTS_MAX:
            raise ProtocolError(
                f"memory table: {len(ordered)} regions, at most {<int>Limit.MEM_SLOTS_MAX}")
        for info in ordered:
            # RegionInfo holds gpa + size <= 2**64; differences of 64 bits don't wrap.
            if previous is not None and info.gpa - previous.gpa < previous.size:
                raise ProtocolError(f"memory table: {info!r} overlaps {previous!r}")
            previous = info
        self.map.regions = <Region *>malloc(max(len(ordered), 1) * sizeof(Region))
        if self.map.regions == NULL:
            raise MemoryError
        for i in range(<uint32_t>len(ordered)):
            info = ordered[i]
            self.map.regions[i].gpa = info.gpa
            self.map.regions[i].size = info.size
            self.map.regions[i].uva = info.uva
            self.map.regions[i].hva = info.mapping.data
        self.map.count = <uint32_t>len(ordered)
        self._order_by_uva(ordered)
        self.regions = tuple(ordered)
        self.mappings = tuple([info.mapping for info in ordered])
        self.number = <uint64_t>atomic_add_i64(&generations, 1)

    cdef _order_by_uva(self, list ordered):
        """A ring's parts are found by bisection: a table change looks at those of all rings."""
        cdef Reach *reach
        cdef const Region *region
        cdef uint64_t last
        cdef uint32_t i, at
        self.reaches = <Reach *>malloc(max(len(ordered), 1) * sizeof(Reach))
        if self.reaches == NULL:
            raise MemoryError
        addresses = [info.uva for info in ordered]
        for i, at in enumerate(sorted(range(len(ordered)), key=addresses.__getitem__)):
            region, reach = &self.map.regions[at], &self.reaches[i]
            last = region.uva + (region.size - 1)
            reach.uva, reach.last, reach.region = region.uva, last, at
            if i and self.reaches[i - 1].last > last:
                reach.last, reach.region = self.reaches[i - 1].last, self.reaches[i - 1].region

    def __dealloc__(self):
        if self.references > 0 and self.mappings is not None:
            # The kernel or a library may still write there: a leak, not a crash.
            Py_INCREF(self.mappings)
            atomic_add_i64(&generations_leaked, 1)
            return
        free(self.map.regions)
        free(self.reaches)

    def __repr__(self):
        return f"<GuestMemory {self.number}: {list(self.regions or ())}>"

    cdef const Region *region_of_uva(self, uint64_t uva, uint64_t length) noexcept nogil:
        cdef uint32_t low = 0, high = self.map.count, middle
        cdef const Region *region
        cdef uint64_t offset
        while low < high:                     # the first that begins above uva
            middle = (low + high) >> 1
            if self.reaches[middle].uva <= uva:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return NULL
        # If any holds them all, so does the one that reaches farthest.
        region = &self.map.regions[self.reaches[low - 1].region]
        offset = uva - region.uva
        if offset < region.size and length - 1 < region.size - offset:
            return region
        return NULL

    cdef uint8_t *hva_of_uva(self, uint64_t uva, uint64_t length) noexcept nogil:
        cdef const Region *region = self.region_of_uva(uva, length)
        return NULL if region == NULL else region.hva + (uva - region.uva)

    @property
    def in_use(self) -> int:
        """Asynchronous requests under way: while there are any, keep the generation."""
        return atomic_add_i64(&self.references, 0)

    def hold(self) -> None:
        """A request starts that may touch guest memory after its caller has returned."""
        atomic_add_i64(&self.references, 1)

    def drop(self) -> None:
        """It has ended. Raises ValueError if nobody holds."""
        if atomic_add_i64(&self.references, -1) < 0:
            atomic_add_i64(&self.references, 1)
            raise ValueError(f"guest memory {self.number} is not held")

    @property
    def poisoned(self) -> bool:
        """Some of it was truncated: its session is to be ended."""
        return any(mapping.poisoned for mapping in self.mappings)

    def poison(self) -> None:
        """Poisons all of it, e.g. after a system call's EFAULT that names no address."""
        cdef Mapping mapping
        for mapping in self.mappings:
            poison(mapping.data)

    def hva(self, uva: int, length: int) -> int:
        """Our address of `length` bytes at the front-end's `uva`, within one region.

        Raises ProtocolError if any byte is in no region.
        """
        cdef uint8_t *found = NULL
        if 0 <= uva < 2**64 and 0 < length < 2**64:
            found = self.hva_of_uva(uva, length)
        if found == NULL:
            raise ProtocolError(
                f"user address {uva:#x}, {length} bytes: not within one memory region")
        return <uint64_t>found

    def gpa(self, uva: int) -> int:
        """The guest's address of the front-end's `uva`. Raises ProtocolError in no region."""
        cdef const Region *region = NULL
        if 0 <= uva < 2**64:
            region = self.region_of_uva(uva, 1)
        if region == NULL:
            raise ProtocolError(f"{uva:#x} is in no memory region")
        return region.gpa + (<uint64_t>uva - region.uva)

    cdef list segments_of(self, object gpa, object length, uint32_t hint):
        """(HVA, bytes) pairs, found as the workers find them."""
        cdef Segment *segments
        cdef uint8_t *whole
        cdef int limit, count, i
        count = TRANSLATE_FAULT
        if 0 <= gpa < 2**64 and 0 < length <= MAPPED_MAX:
            whole = translate_whole(&self.map, gpa, length, &hint)
            if whole != NULL:
                return [(<uint64_t>whole, length)]
            limit = <int>(self.map.count + length // PIECE_MAX + 1)
            segments = <Segment *>malloc(limit * sizeof(Segment))
            if segments == NULL:
                raise MemoryError
            count = translate(&self.map, gpa, length, segments, limit, &hint)
            try:
                if count > 0:
                    return [(<uint64_t>segments[i].hva, segments[i].length)
                            for i in range(count)]
            finally:
                free(segments)
        raise GuestError(f"guest address {gpa:#x}, {length} bytes: not all is guest memory")

    def translate(self, gpa: int, length: int, hint: int = 0) -> list[tuple[int, int]]:
        """Host ranges for `length` > 0 bytes at guest address `gpa`.

        Returns (HVA, bytes) pairs in order; several where regions meet. `hint` is the
        index of the region to look at first, and may be anything within 32 bits.
        Raises GuestError if any byte is unmapped or gpa + length passes 2**64.
        Source: vhost-user, "Memory region description".
        """
        return self.segments_of(gpa, length, hint)

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of guest memory. Raises GuestError as translate() does."""
        cdef uint64_t address, piece, offset = 0
        cdef char *target
        segments = self.segments_of(gpa, length, 0)
        data = PyBytes_FromStringAndSize(NULL, length)
        target = PyBytes_AS_STRING(data)
        for address, piece in segments:
            with nogil:
                memcpy(target + offset, <const void *>address, piece)
            offset += piece
        return data

    def write(self, gpa: int, data: bytes) -> None:
        """Copies into guest memory; all or nothing. Raises GuestError as translate() does."""
        cdef uint64_t address, piece, offset = 0
        cdef const char *source
        data = bytes(data)
        if not data:
            return
        source = PyBytes_AS_STRING(data)
        for address, piece in self.segments_of(gpa, len(data), 0):
            with nogil:
                memcpy(<void *>address, source + offset, piece)
            offset += piece


@cython.final
cdef class DirtyLog:
    """The front-end's log of dirty pages (vhost-user, "Migration")."""

    def __cinit__(self, fd: int, offset: int, size: int, account=COMMON):
        self.mapping = Mapping(fd, offset, size, account)
        self.map.size = self.mapping.size
        self.map.bits = self.mapping.data

    @property
    def poisoned(self) -> bool:
        """The log was truncated: its session is to be ended."""
        return self.mapping.poisoned

    def mark(self, gpa: int, length: int) -> None:
        """Sets the bits of all pages of [gpa, gpa + length) that the log covers."""
        if not (0 <= gpa < 2**64 and 0 <= length < 2**64):
            raise ValueError(f"[{gpa:#x}, +{length:#x}) is not within 64 bits")
        cdef uint64_t first = gpa, bytes_ = length
        with nogil:
            log_mark(&self.map, first, bytes_)

    def pages(self) -> list[int]:
        """Numbers of the pages whose bits are set."""
        cdef uint64_t i
        cdef int bit
        cdef uint8_t byte
        found = []
        for i in range(self.map.size):
            byte = read_once_u8(self.map.bits + i)
            for bit in range(8):
                if byte >> bit & 1:
                    found.append(i * 8 + bit)
        return found
