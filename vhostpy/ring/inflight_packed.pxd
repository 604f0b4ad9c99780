"""Packed rings' chains in memory that outlives us: what `Virtqueue` and recovery call."""
from libc.stdint cimport uint16_t
from vhostpy.ring.chain cimport Chain
from vhostpy.ring.state cimport Ring
from vhostpy.ring.tracker cimport Tracker

cdef enum:
    # "Inflight I/O tracking": struct QueueRegionPacked, DescStatePacked.
    PACKED_HEADER = 32
    PACKED_ENTRY = 32

cdef int packed_track_take(Tracker *tracker, const Ring *ring, uint16_t position,
                           Chain *chains, int count) noexcept nogil
# Before any work on them is done; they lie in the ring from `position` on. Returns how many
# there was room for: fewer only where a driver offers more descriptors than it has.
cdef void packed_track_again(Tracker *tracker, const Ring *ring, uint16_t position,
                             Chain *chains, int count) noexcept nogil
# They were taken from `again` from `position` on: sets their `entry`.
cdef void packed_track_rewind(Tracker *tracker, const Chain *chains, int count) noexcept nogil
cdef void packed_track_publishing(Tracker *tracker, const Ring *ring) noexcept nogil
# Before the driver sees what was pushed.
cdef void packed_track_published(Tracker *tracker, const Ring *ring) noexcept nogil
# After it: the chains are the driver's.

# Control's; the ring is held.
cdef void packed_track_begin(Tracker *tracker, const Ring *ring) noexcept
# In a region that nobody has used.
cdef list packed_recover(Tracker *tracker, Ring *ring)
# Finishes or undoes what a killed back-end had begun, sets the ring where it goes on, and
# returns the entries of each chain to be taken again, oldest chain first.
cdef void packed_put_again(Tracker *tracker, uint16_t slot, uint16_t entry, bint more) noexcept
# Puts an entry's descriptor into `again`; `more`: its chain goes on.
