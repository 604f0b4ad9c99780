"""The packet generator: a driver's queue pairs, filled and emptied by one thread."""
cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.ring.state cimport UsedEntry
from vhostpy.load.frame cimport Header
from vhostpy.memory.guest cimport Segment

cdef struct Side:
    # One virtqueue, and a buffer for each id of a descriptor.
    void *ring             # borrowed DriverVirtqueue
    uint8_t *buffers
    uint64_t gpa           # of the same
    uint32_t *lengths      # by id: bytes of its frame, where frames are written once
    uint32_t size          # of the queue
    int kick_fd

cdef struct Counters:
    uint64_t sent
    uint64_t sent_bytes
    uint64_t received
    uint64_t received_bytes
    uint64_t primed        # frames that taught a switch, not counted elsewhere
    uint64_t foreign       # not ours
    uint64_t stray         # ours, for another port
    uint64_t corrupt
    uint64_t disordered    # or a second time
    uint64_t kicks

cdef struct Pair:
    # A queue pair: a stream that is sent, and the receiver of another.
    Side tx
    Side rx
    uint32_t port
    uint32_t peer          # port that it sends to
    uint32_t sends
    uint32_t flow          # the next MAC pair
    uint32_t size_at       # the next of the sizes
    uint32_t primes        # frames still to send to teach a switch
    Header next            # of the next frame: what does not differ from the one before
    uint64_t sequence
    uint64_t written_off   # in flight, and not waited for any more
    uint64_t heard_at      # ticks() when the last frame arrived, in a closed loop
    double paced_at        # ticks at which all frames so far were due
    # A frame that is arriving in several buffers.
    uint32_t left          # buffers to come
    uint32_t came          # bytes of the frame
    uint32_t size          # of the frame, as it says itself
    uint32_t good
    Pair *source           # whose it is; NULL: not of interest
    uint64_t kind          # its type, stream and flow
    uint64_t arriving      # its sequence
    uint64_t stamp
    uint64_t delivered     # of what it sent; written by who receives
    Counters count


@cython.final
cdef class NetGenerator:
    cdef Pair *pairs
    cdef list keep         # what the pairs borrow
    cdef int count         # pairs
    cdef uint32_t phase    # written by control, read by the loop
    cdef uint32_t stopping
    cdef readonly int broken       # 1 + index of the pair whose ring cannot be trusted
    cdef readonly bint deaf        # a kick fd of it blocks us
    # Settings, fixed while the loop runs.
    cdef int touch
    cdef bint dirty
    cdef bint verify
    cdef bint stamps
    cdef bint broadcast
    cdef bint plain        # of a frame no more than its header counts
    cdef uint32_t room     # bytes of a buffer
    cdef uint32_t stride   # from one to the next
    cdef uint32_t pieces   # buffers of the longest frame
    cdef uint32_t macs
    cdef uint32_t burst
    cdef uint32_t window   # most frames in flight in each direction; 0: an open loop
    cdef double ticks_per_frame    # 0: as fast as possible
    cdef uint32_t *sizes
    cdef uint32_t size_count
    cdef uint8_t *template
    cdef uint64_t *seen    # by receiver (broadcast), stream and MAC: the next sequence
    cdef uint64_t *histogram
    cdef uint64_t busy_ticks
    cdef uint64_t busy_turns       # that moved something
    cdef uint64_t total_ticks
    cdef double rate_us    # ticks a microsecond

    cdef _wire(self, Side *side, object queue, object gpa)
    cdef void loop(self) noexcept nogil
    cdef int turn(self, Pair *pair, uint32_t phase, uint64_t now) noexcept nogil
    cdef int collect(self, Pair *pair, Side *side, UsedEntry *used) noexcept nogil
    cdef void kick(self, Pair *pair, Side *side) noexcept nogil
    cdef uint32_t allowance(self, Pair *pair, uint32_t phase, uint64_t now) noexcept nogil
    cdef int send(self, Pair *pair, uint32_t limit, bint prime) noexcept nogil
    cdef uint64_t send_whole(self, Pair *pair, uint32_t count, bint prime) noexcept nogil
    cdef uint64_t send_long(self, Pair *pair, uint32_t count, bint prime) noexcept nogil
    cdef uint32_t next_length(self, Pair *pair, uint16_t id, bint prime) noexcept nogil
    cdef uint32_t lines_touched(self, uint32_t length) noexcept nogil
    cdef int receive(self, Pair *pair, uint64_t now) noexcept nogil
    cdef void look_at(self, Pair *pair, const UsedEntry *used, int count,
                      uint64_t now) noexcept nogil
    cdef void post(self, Side *side, uint16_t *ids, int count) noexcept nogil
    cdef void look(self, Pair *pair, const uint8_t *at, uint32_t length,
                   uint64_t now) noexcept nogil
    cdef void look_on(self, Pair *pair, const uint8_t *at, uint32_t length,
                      uint64_t now) noexcept nogil
    cdef void arrived(self, Pair *pair, Pair *source, uint32_t size, uint64_t stamp,
                      uint64_t flow, uint64_t sequence, uint64_t now) noexcept nogil
    cdef bint is_plain(self, Pair *pair, const uint8_t *at, uint32_t length,
                       uint64_t now) noexcept nogil
    cdef void prepare(self, Pair *pair) noexcept nogil
    cdef void address(self, Pair *pair, bint prime) noexcept nogil
    cdef void begin(self, Pair *pair, uint8_t *at, uint32_t size, bint prime,
                    uint64_t stamp) noexcept nogil
