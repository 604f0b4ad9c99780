"""What each end of a virtqueue keeps: its own state, in cache lines by who writes it.

`Ring` is the back-end's end, `DriverRing` the driver's; split or packed, both look like
this. How a ring lies in shared memory is known to `_split` and `_packed`.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.memory cimport LogMap, MemoryMap

cdef enum:
    # Where guest memory was written, until the dirty log is marked.
    LOGGED_RANGES = 128

cdef struct WorkerSide:
    # Written by the worker that works on the ring.
    uint16_t last_avail     # the next chain to take
    uint16_t avail_idx      # the driver's avail.idx when it was last loaded
    uint16_t used_next      # the next used entry to write
    uint16_t used_idx       # what used.idx says
    uint16_t signalled      # used_idx at the last decision about a call
    uint8_t signalled_valid  # False: the driver may have missed something, so call
    uint8_t kicks_wanted
    uint32_t hint           # for translate()
    uint32_t logged         # ranges collected
    uint32_t broken
    uint64_t calls          # written to call_fd
    uint64_t deaf           # call_fd blocks: it is not written to any more
    uint64_t padding[3]

cdef struct ControlSide:
    # Written by control while the ring is held.
    uint8_t *desc
    uint8_t *avail
    uint8_t *used
    const MemoryMap *map
    const LogMap *log       # NULL: not logged
    uint64_t used_log_gpa
    uint32_t live
    int call_fd
    uint32_t size
    uint8_t event_idx
    uint8_t indirect
    uint8_t log_used        # the used ring is logged, at used_log_gpa
    uint8_t unused

cdef struct LoggedRange:
    uint64_t gpa
    uint64_t length

cdef struct Ring:
    WorkerSide worker       # one cache line each
    ControlSide control
    LoggedRange ranges[LOGGED_RANGES]

cdef struct DriverRing:
    uint8_t *desc
    uint8_t *avail
    uint8_t *used
    uint16_t *links         # by descriptor: the next of its chain, or of the free ones
    uint16_t *counts        # by head: descriptors that the device has; 0: none
    uint32_t size
    uint32_t free_count
    uint16_t free_head
    uint16_t avail_next     # the next avail entry to write
    uint16_t avail_idx      # what avail.idx says
    uint16_t last_used      # the next used entry to read
    uint16_t used_idx       # the device's used.idx when it was last loaded
    uint8_t event_idx
    uint8_t broken
    int kick_fd

cdef struct UsedEntry:
    uint32_t id             # what add_chain() returned
    uint32_t length         # bytes that the device says it wrote

cdef void log_flush(Ring *ring) noexcept nogil
# Marks what was collected. The stores come first, or the front-end may copy the page
# between the bit and them.
cdef void log_collect(Ring *ring, uint64_t gpa, uint64_t length) noexcept nogil
# Guest memory was written there: to be marked by the next log_flush().
cdef void call_driver(Ring *ring) noexcept nogil
cdef void break_ring(Ring *ring) noexcept nogil
# What the driver says of its ring makes no sense: nothing more is taken from it.
