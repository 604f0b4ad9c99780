"""Virtqueues, both sides: the back-end's `Virtqueue`, the driver's `DriverVirtqueue`.

Callers move bursts of chains; only this module knows how a ring is laid out.
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.memory cimport DirtyLog, GuestMemory, LogMap, MemoryMap, Segment

cdef enum:
    BURST = 64             # chains moved by one call, at most
    SCRATCH_SEGMENTS = 4096

    # A result of pop(): the ring itself cannot be trusted any more (avail.idx jumped).
    RING_BROKEN = -1

# Why a chain is unusable; such a chain comes out of pop() with no segments, so that
# its owner gives it back, unused and in order, and counts it under this name.
cpdef enum ChainFault:
    CHAIN_OK = 0
    CHAIN_BAD_INDEX = 1          # head or next beyond the queue's size
    CHAIN_TOO_LONG = 2           # a loop, or more descriptors than the queue has
    CHAIN_ZERO_LENGTH = 3
    CHAIN_UNMAPPED = 4
    CHAIN_BAD_INDIRECT = 5       # nested, with NEXT, empty, not a multiple of 16, not negotiated
    CHAIN_BAD_ORDER = 6          # readable after writable
    CHAIN_TOO_MANY_SEGMENTS = 7  # more pieces than a scratch holds
    CHAIN_FAULTS = 8

cdef struct Chain:
    Segment *segments      # readable ones first, then writable ones; in the scratch
    uint16_t readable      # count of segments
    uint16_t writable
    uint16_t id            # what used entries name: head index (split), buffer id (packed)
    uint16_t slots         # places it takes in the descriptor ring (packed), else 1
    uint32_t readable_bytes
    uint32_t writable_bytes
    uint32_t fault         # ChainFault

cdef struct Scratch:
    # Segments of the chains that are out; reset by whoever starts a turn.
    Segment *segments
    uint32_t used
    uint32_t limit

cdef struct Ring          # private to _ring.pyx

@cython.final
cdef class Virtqueue:
    # The back-end's side. Published (`live`): the workers own it. Held: control does.
    cdef Ring *ring
    cdef readonly GuestMemory memory
    cdef readonly DirtyLog log
    cdef readonly uint64_t features
    cdef tuple uvas                                    # of descriptors, avail, used

    # Workers' side. --------------------------------------------------------------
    cdef bint is_live(self) noexcept nogil
    cdef int pop(self, Chain *chains, int limit, Scratch *scratch) noexcept nogil
    # Takes up to `limit` (<= BURST) available chains, in order; 0: none; RING_BROKEN.
    # Returns short when the scratch is full.
    cdef void rewind(self, const Chain *chains, int count) noexcept nogil
    # Un-takes the youngest `count` chains: the next pop() returns them again.
    cdef void push(self, const Chain *chains, const uint32_t *written, int count) noexcept nogil
    # Writes used entries, not yet visible to the driver. `written`: bytes written
    # into each chain; NULL means 0 for all.
    cdef void publish(self) noexcept nogil
    # Makes pushed entries visible and notifies the driver if it asks for it. Marks
    # logged pages first. Cheap if nothing was pushed.
    cdef uint32_t unpublished(self) noexcept nogil     # pushed entries not yet visible
    cdef void log_written(self, const Segment *segments, int count) noexcept nogil
    # Guest memory was written there: to be logged before the next publish().
    cdef bint logging(self) noexcept nogil             # False: log_written() need not be called
    cdef uint32_t size(self) noexcept nogil
    cdef bint arm(self) noexcept nogil
    # Asks the driver for kicks; True when chains are already there (do not sleep).
    cdef void disarm(self) noexcept nogil
    cdef readonly int64_t inflight                     # popped and not yet pushed

cdef struct DriverRing    # private to _ring.pyx

cdef struct UsedEntry:
    uint32_t id            # what add_chain() returned
    uint32_t length        # bytes that the device says it wrote

@cython.final
cdef class DriverVirtqueue:
    # The driver's side of the same ring, in memory that this process owns.
    cdef DriverRing *ring
    cdef readonly GuestMemory memory
    cdef readonly uint64_t features
    cdef int add_chain(self, const Segment *pieces, int readable, int writable) noexcept nogil
    # Adds a chain of readable, then writable pieces (`gpa` and `length` count); its id,
    # or -1 when too few descriptors are free. Not visible to the device before publish().
    cdef int add_table(self, uint64_t gpa, uint32_t length) noexcept nogil
    # The same for an indirect table that lies at `gpa` already.
    cdef bint publish(self) noexcept nogil
    # Makes added chains visible; True when the device asks for a kick.
    cdef int collect(self, UsedEntry *out, int limit) noexcept nogil
    # Chains that the device gave back, up to `limit`; RING_BROKEN if it gives back what
    # it does not have.
