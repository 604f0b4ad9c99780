"""The I/O generator: a driver's requests to one disk, from one thread."""
cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef struct Slot:
    # One request: its place in memory, and what is under way there.
    uint64_t started       # ticks()
    uint64_t block
    uint32_t generation    # written, or expected to be read; 0: not looked at
    uint32_t write

cdef struct Counters:
    uint64_t reads         # that came back well
    uint64_t writes
    uint64_t failed        # came back with another status than OK
    uint64_t corrupt       # read something else than had been written
    uint64_t kicks

cdef struct BlkQueue:
    void *ring             # borrowed DriverVirtqueue
    uint8_t *control       # of each slot: header, status, indirect table
    uint64_t control_gpa
    uint8_t *data          # of each slot: a block
    uint64_t data_gpa
    uint32_t *owner        # by chain id: its slot
    uint32_t *free         # slots, as a stack
    uint32_t free_count
    Slot *slots
    int kick_fd
    Counters count


@cython.final
cdef class BlkGenerator:
    cdef BlkQueue *queues
    cdef list keep         # what the queues borrow
    cdef int count         # queues
    cdef uint32_t depth
    cdef int burst         # requests that come back, and go, in one turn of a queue
    cdef uint32_t phase    # written by control, read by the loop
    cdef uint32_t stopping
    cdef readonly int broken       # 1 + index of the queue whose ring cannot be trusted
    cdef readonly bint deaf        # its kick fd blocks us
    # Settings, fixed while the loop runs.
    cdef bint random
    cdef bint verify
    cdef bint indirect
    cdef bint packed
    cdef uint64_t read_share       # of 2**32
    cdef uint32_t block_bytes
    cdef uint64_t blocks
    cdef uint8_t *template
    # The loop's.
    cdef uint64_t cursor           # of a sequence: the next block
    cdef uint64_t done             # blocks of a whole pass that were submitted
    cdef uint64_t noise            # random state
    cdef uint32_t *generations     # by block, with BUSY; NULL: nothing is verified
    cdef uint64_t moved_at         # ticks() when a request came back last
    cdef uint64_t busy_ticks
    cdef uint64_t total_ticks
    cdef double rate_us            # ticks a microsecond
    cdef uint64_t *histograms[2]   # of reads and writes

    cdef _wire(self, BlkQueue *queue, object started, object control_gpa, object data_gpa)
    cdef void loop(self) noexcept nogil
    cdef int complete(self, BlkQueue *queue) noexcept nogil
    cdef int submit(self, BlkQueue *queue, uint32_t phase) noexcept nogil
    cdef bint choose(self, Slot *slot, uint32_t phase) noexcept nogil
    cdef bint claim(self, Slot *slot, uint32_t phase) noexcept nogil
    cdef int offer(self, BlkQueue *queue, uint32_t index) noexcept nogil
    cdef uint64_t entry(self, uint32_t length, uint16_t flags, uint16_t next) noexcept nogil
    cdef void fill(self, uint8_t *data, uint64_t block, uint32_t generation) noexcept nogil
    cdef bint intact(self, const uint8_t *data, uint64_t block,
                     uint32_t generation) noexcept nogil
