"""Split rings' chains in memory that outlives us: what `Virtqueue` and recovery call."""
from libc.stdint cimport uint16_t
from vhostpy.ring.chain cimport Chain
from vhostpy.ring.state cimport Ring
from vhostpy.ring.tracker cimport Tracker

cdef enum:
    # "Inflight I/O tracking": struct QueueRegionSplit, DescStateSplit.
    SPLIT_HEADER = 16
    SPLIT_ENTRY = 16

cdef void split_track_take(Tracker *tracker, const Chain *chains, int count) noexcept nogil
# Before any work on them is done.
cdef void split_track_rewind(Tracker *tracker, const Chain *chains, int count) noexcept nogil
cdef void split_track_push(Tracker *tracker, const Chain *chains, int count) noexcept nogil
# Before used.idx moves: who comes after us finds the chains that it covers.
cdef void split_track_published(Tracker *tracker, uint16_t used_idx) noexcept nogil
# After used.idx has moved: the chains are the driver's.

# Control's. The ring is held, and its used_idx is the driver's.
cdef void split_track_begin(Tracker *tracker, const Ring *ring) noexcept
# In a region that nobody has used.
cdef list split_recover(Tracker *tracker, Ring *ring)
# Finishes what a killed back-end had begun, sets the ring where it goes on, and returns
# the heads of chains to be taken again, oldest first.
