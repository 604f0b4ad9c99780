"""What the switch and a port say to each other: frames, verbs, counters.

A port is where frames come from and go to: a virtio-net device, an uplink. The
switch knows ports only by this interface; ports do not know the switch.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.memory.guest cimport Segment
from vhostpy.runtime.pollable cimport Conduct, Turn
from vhostpy._ring cimport Scratch

cdef enum:
    SNAPSHOT = 32          # first bytes of a frame, read once; decisions look only at them
    ETHERNET_HEADER = 14

# Why a frame was dropped; each is a counter of the port that is named behind it.
cpdef enum Drop:
    DROP_BAD_CHAIN = 0         # sender: its buffers make no frame; the port knows why
    DROP_TOO_SHORT = 1         # sender: shorter than a virtio-net and an Ethernet header
    DROP_TOO_LONG = 2          # sender: longer than 64 KiB with its header
    DROP_BAD_SOURCE = 3        # sender: source MAC is a group address
    DROP_NO_DESTINATION = 4    # sender: no other port is on the switch
    DROP_REFLECTED = 5         # sender: the destination is behind the sender's own port
    DROP_DISABLED = 6          # sender: its queue is started but not enabled
    DROP_RECEIVER_FULL = 7     # receiver: no buffers within --full-wait
    DROP_RECEIVER_DOWN = 8     # receiver: no receive queue is live
    DROP_BUFFER_TOO_SMALL = 9  # receiver: its buffers can't hold the frame
    DROP_BUFFER_FAULT = 10     # receiver: its buffer cannot be written to, or is malformed
    DROP_STOPPED = 11          # sender: its queue stopped while the frame waited for a
    #                            receiver, and later ones had been delivered already
    DROP_RECEIVER_SLOW = 12    # receiver: writing to its memory blocked a worker, again
    DROPS = 13

# virtio 1.3, "Device Operation" of the network device: struct virtio_net_hdr
cdef struct NetHeader:
    uint8_t flags
    uint8_t gso_type
    uint16_t hdr_len
    uint16_t gso_size
    uint16_t csum_start
    uint16_t csum_offset

cdef struct Frame:
    # A view of a frame in its sender's buffers; valid until release() or put_back().
    uint8_t head[SNAPSHOT]   # the first bytes (all, if it is shorter)
    Segment *segments        # the whole frame, first byte included; header excluded
    uint32_t length          # bytes, virtio-net header excluded
    uint16_t count           # of segments
    uint16_t fault           # Drop + 1 if the port already knows that it must be dropped; 0
    uint32_t cookie          # the port's own
    NetHeader header         # as the sender wrote it; zeros where no offload is negotiated
    uint16_t vlan            # of the forwarding key: the port says it; 0 where it has none

# A port's counters for one direction of a queue: written by the worker that polls it, or by
# the one that holds the receive queue's lock; read by control at any time.
cdef struct QueueCounters:
    uint64_t frames_in       # from the port into the switch
    uint64_t bytes_in
    uint64_t frames_out      # from the switch to the port
    uint64_t bytes_out
    uint64_t drops[DROPS]
    uint64_t padding[7]


cdef inline void charge(Turn *turn, Frame **frames, int count) noexcept nogil:
    """Output of these frames as they are."""
    cdef int64_t size = 0
    cdef int i
    for i in range(count):
        size += frames[i].length
    turn.frames -= count
    turn.bytes -= size


cdef class Port:
    cdef readonly object name
    cdef public int index            # in the switch's table; -1 outside one
    cdef readonly Conduct conduct    # as a sender
    cdef readonly Conduct reception  # and as a receiver
    cdef uint32_t slow               # writing to it has blocked a worker: ask `reception`
    cdef int receive(self, int queue, Frame *burst, int limit, Turn *turn) noexcept nogil
    # Takes up to `limit` (<= BURST) frames that came in on `queue`, in order, with what they
    # need of `turn.scratch`; 0 when none; < 0 when the queue is broken and control should
    # look at it. Called in every turn: a port that holds buffers back sees the time by it.
    cdef void release(self, int queue, const Frame *burst, int count) noexcept nogil
    # The oldest `count` frames are done with: their buffers are the sender's again. When it
    # sees them is the port's own business; all of them once arm() has returned.
    cdef void put_back(self, int queue, const Frame *burst, int count) noexcept nogil
    # The youngest `count` frames could not be placed: receive() returns them again.
    cdef void skip(self, int queue, int count, Scratch *scratch) noexcept nogil
    # Control's, of a queue that no worker has any more: the oldest `count` frames, which
    # were put back, are done with.
    cdef int transmit(self, int queue, Frame **frames, int count, Turn *turn) noexcept nogil
    # Gives frames to the other end, in order, on the receive queue that belongs to the
    # sender's `queue`; copies; keeps nothing, of `turn.scratch` neither. Returns how many were
    # taken (delivered, or dropped for a reason other than fullness and counted by the port):
    # less than `count` means that the receiver is full. Charges the turn for those, by what
    # leaves the switch: frames and bytes (a segment each, where it makes some), and steps for
    # descriptors walked and for what else takes time. One call may overdraw the turn; the
    # next one is the next turn's.
    cdef void count_drop(self, int queue, int reason, int count) noexcept nogil
    cdef bint arm(self, int queue) noexcept nogil
    # The worker may sleep: the sender sees all buffers that were released, and is asked for
    # kicks on `queue`. True: frames are there already, do not sleep.
    cdef void disarm(self, int queue) noexcept nogil
