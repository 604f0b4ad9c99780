"""Virtqueues, both sides: the back-end's `Virtqueue`, the driver's `DriverVirtqueue`.

Callers move bursts of chains; they find all they need here. How a ring is laid out is
known to `ring.split`, how a chain is checked to `ring.chain`.
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from vhostpy.ring.chain cimport (
    BURST, CHAIN_BAD_INDEX, CHAIN_BAD_INDIRECT, CHAIN_BAD_ORDER, CHAIN_FAULTS, CHAIN_OK,
    CHAIN_TOO_LONG, CHAIN_TOO_MANY_SEGMENTS, CHAIN_UNMAPPED, CHAIN_ZERO_LENGTH, RING_BROKEN,
    SCRATCH_BYTES, SCRATCH_SEGMENTS, Chain, ChainFault, Scratch,
)
from vhostpy.system.calls cimport Calls
from vhostpy.ring.driver cimport DriverVirtqueue
from vhostpy.ring.state cimport Ring, UsedEntry
from vhostpy.ring.inflight cimport InflightQueue
from vhostpy.ring.tracker cimport Tracker
from vhostpy.memory.guest cimport DirtyLog, GuestMemory, Segment
from vhostpy.ring.positions cimport KeptPosition


@cython.final
cdef class Virtqueue:
    # The back-end's side. Published (`live`): the workers own it. Held: control does.
    cdef Ring *ring
    cdef Calls call_costs                              # of its socket
    cdef readonly GuestMemory memory
    cdef readonly DirtyLog log
    cdef readonly uint64_t features
    cdef tuple uvas                                    # of descriptors, avail, used
    cdef readonly InflightQueue inflight_queue         # what remembers chains, or None
    cdef Tracker *tracker                              # its, or NULL
    cdef readonly KeptPosition kept                    # where its position is kept, or None

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
    cdef void set_lead(self, uint8_t length) noexcept nogil
    # The first bytes of a chain that its owner does not read: pop() prefetches what follows.
    cdef void set_ends_in_status(self) noexcept nogil
    # Its chains' last writable byte says how it went: pop() finds that of a faulty one too.
    cdef void refuse(self, const Chain *chains, int count) noexcept nogil
    # rewind(); and as the first of them cannot be answered, nothing more is taken: whoever
    # comes next begins with it.
    cdef bint arm(self) noexcept nogil
    # Asks the driver for kicks; True when chains are already there (do not sleep).
    cdef void disarm(self) noexcept nogil
    cdef readonly int64_t inflight                     # popped and not yet pushed
    cdef void condemn(self) noexcept nogil
    # Its driver costs others too much: the ring is broken, as one whose indexes jumped.
    cdef bint has_again(self) noexcept nogil
    # There are chains that a killed back-end had: pop() returns them first.

    cdef int pop_any(self, Chain *chains, int limit, Scratch *scratch) noexcept nogil
    cdef int pop_tracked(self, Chain *chains, int limit, Scratch *scratch) noexcept nogil
    cdef int pop_again(self, Chain *chains, int limit, Scratch *scratch) noexcept nogil
    cdef void rewind_any(self, const Chain *chains, int count) noexcept nogil
    cdef void publish_any(self) noexcept nogil
