"""What a guest wants discarded, zeroed or erased: ranges in its data, as requests."""
from libc.stdint cimport uint64_t
from vhostpy.memory.guest cimport Segment
from vhostpy.backends.blk.request cimport Slot

cdef int clear_requests(Slot *slot, Segment *data, int count, uint64_t size, int op,
                        uint64_t size_bytes, bint read_only) noexcept nogil
# How many requests the ranges became: one is the slot's `request`, more are its `parts`;
# or a status, negative. `size_bytes`: the disk's.
