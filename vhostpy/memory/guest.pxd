"""Guest memory: regions, translation, generations, dirty log.

Knows addresses and bytes; knows no ring, no message and no socket.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from vhostpy.memory.mapping cimport Mapping, poison

cdef enum:
    # Results of translate() besides a count of segments > 0.
    TRANSLATE_FAULT = -1   # some byte is not guest memory
    TRANSLATE_MISS = -2    # behind an IOMMU and not known yet (never returned without one)
    TRANSLATE_FULL = -3    # more pieces than `limit`

cdef struct Segment:
    # A piece of guest memory that is contiguous for us.
    uint8_t *hva
    uint64_t gpa           # the dirty log speaks of guest addresses
    uint32_t length

cdef struct Region:
    uint64_t gpa
    uint64_t size
    uint64_t uva           # the front-end's address of the same bytes
    uint8_t *hva

cdef struct Reach:
    # In the order of the front-end's addresses, which may overlap: how far a region reaches
    # that begins at or below `uva`, and which one reaches farthest.
    uint64_t uva
    uint64_t last
    uint32_t region

cdef struct MemoryMap:
    # Immutable once a worker may see it. Regions ascend by gpa and do not overlap.
    uint32_t count
    Region *regions

cdef struct LogMap:
    # One bit a page of PAGE_LOG bytes, shared with the front-end, which clears bits.
    uint8_t *bits
    uint64_t size          # bytes of `bits`

cdef int translate(const MemoryMap *map, uint64_t gpa, uint64_t length,
                   Segment *out, int limit, uint32_t *hint) noexcept nogil
# The host ranges of `length` > 0 bytes at `gpa`: the count of segments written to
# `out`, or a TRANSLATE_* result. Ranges may span adjacent regions. `*hint` is the
# index of the region that served last (any value is safe) and is updated.

cdef inline uint8_t *translate_whole(const MemoryMap *map, uint64_t gpa, uint64_t length,
                                     uint32_t *hint) noexcept nogil:
    # The fast case: all bytes in the region that served last. NULL: ask translate().
    cdef uint32_t index = hint[0]
    cdef const Region *region
    cdef uint64_t offset
    if index >= map.count:
        return NULL
    region = &map.regions[index]
    offset = gpa - region.gpa             # wraps to huge when below
    if offset >= region.size or length > region.size - offset:
        return NULL
    return region.hva + offset

cdef void log_mark(const LogMap *log, uint64_t gpa, uint64_t length) noexcept nogil
# Sets the bits of all pages of [gpa, gpa + length): tests each bit first and sets it
# atomically; pages past the end of the log are ignored (CVE-2019-14835). The caller
# has put one full fence between its stores to guest memory and this.

cdef class RegionInfo:
    # What the front-end said about a region, and where it is mapped. Frozen.
    cdef readonly uint64_t gpa
    cdef readonly uint64_t size
    cdef readonly uint64_t uva
    cdef readonly Mapping mapping

cdef class GuestMemory:
    # A generation: an immutable set of regions, and a count of who still uses it.
    # Freed while `references` > 0, it leaks its mappings rather than pull them away.
    cdef MemoryMap map
    cdef Reach *reaches         # as many as regions
    cdef int64_t references     # asynchronous requests under way; atomic
    cdef readonly tuple mappings
    cdef readonly tuple regions  # of RegionInfo, in the order of gpa
    cdef readonly uint64_t number
    cdef const Region *region_of_uva(self, uint64_t uva, uint64_t length) noexcept nogil
    # A region that holds `length` > 0 bytes at the front-end's address `uva`; NULL: none does.
    cdef uint8_t *hva_of_uva(self, uint64_t uva, uint64_t length) noexcept nogil
    # Where `length` > 0 bytes at the front-end's address `uva` are; NULL unless one
    # region holds them all. Where regions alias, any of them may serve.
    cdef _order_by_uva(self, list ordered)
    cdef list segments_of(self, object gpa, object length, uint32_t hint)

cdef class DirtyLog:
    # The shared log of one SET_LOG_BASE.
    cdef LogMap map
    cdef readonly Mapping mapping
