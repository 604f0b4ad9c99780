"""What the switch and a port say to each other: frames, verbs, counters.

A port is where frames come from and go to: a virtio-net device, an uplink. The
switch knows ports only by this interface; ports do not know the switch.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy.memory.guest cimport Segment
from vhostpy.runtime.pollable cimport Conduct, Turn
from vhostpy._ring cimport Scratch

cdef enum:
    SNAPSHOT = 32          # first bytes of a frame, read once; decisions look only at them
    ETHERNET_HEADER = 14

# Why a frame was dropped; each is a counter of the port that is named behind it.
cpdef enum Drop:
    DROP_BAD_CHAIN = 0         # sender: see the port's chain faults for the reason
    DROP_TOO_SHORT = 1         # sender: shorter than a virtio-net and an Ethernet header
    DROP_TOO_LONG = 2          # sender: longer than 64 KiB with its header
    DROP_BAD_SOURCE = 3        # sender: source MAC is a group address
    DROP_NO_DESTINATION = 4    # sender: nobody else is on the switch
    DROP_REFLECTED = 5         # sender: the destination is behind the sender's own port
    DROP_DISABLED = 6          # sender: its queue is started but not enabled
    DROP_RECEIVER_FULL = 7     # receiver: no buffers within --full-wait
    DROP_RECEIVER_DOWN = 8     # receiver: no receive queue is live
    DROP_BUFFER_TOO_SMALL = 9  # receiver: its buffers can't hold the frame
    DROP_BUFFER_FAULT = 10     # receiver: its buffer is not guest memory, or malformed
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

# A port's counters for one queue pair. `from_*` written by the worker that polls the
# queue, `to_*` by whoever holds the receive queue's lock; read by control at any time.
cdef struct QueueCounters:
    uint64_t from_guest_packets
    uint64_t from_guest_bytes
    uint64_t to_guest_packets
    uint64_t to_guest_bytes
    uint64_t drops[DROPS]
    uint64_t chain_faults[8]
    uint64_t padding[7]

cdef class Port:
    cdef readonly object name
    cdef public int index            # in the switch's table; -1 outside one
    cdef readonly Conduct conduct    # as a sender
    cdef readonly Conduct reception  # and as a receiver
    cdef uint32_t slow               # writing to it has blocked a worker: ask `reception`
    cdef int receive(self, int queue, Frame *burst, int limit, Scratch *scratch) noexcept nogil
    # Takes up to `limit` (<= BURST) frames that the guest sent on transmit queue `queue`,
    # in order; 0 when none; < 0 when the queue is broken and control should look at it.
    cdef void release(self, int queue, const Frame *burst, int count) noexcept nogil
    # The oldest `count` frames are done with: their buffers go back to the sender, but it
    # may not see the last ones of them yet.
    cdef void show_released(self, int queue) noexcept nogil
    # Now it sees all of them, unless control holds the queue.
    cdef void put_back(self, int queue, const Frame *burst, int count) noexcept nogil
    # The youngest `count` frames could not be placed: receive() returns them again.
    cdef void skip(self, int queue, int count, Scratch *scratch) noexcept nogil
    # Control's, of a queue that no worker has any more: the oldest `count` frames, which
    # were put back, are done with.
    cdef int transmit(self, int queue, Frame **frames, int count, Turn *turn) noexcept nogil
    # Gives frames to the guest's receive queue `queue` (modulo the enabled pairs), in
    # order; copies; keeps nothing. Returns how many were taken (delivered, or dropped
    # for a reason other than fullness and counted by the port): less than `count` means
    # that the receiver is full. Charges `turn.steps`; frames and bytes are the caller's to
    # charge.
    cdef void count_drop(self, int queue, int reason, int count) noexcept nogil
    cdef bint arm(self, int queue) noexcept nogil
    # Asks the sender for kicks on `queue`; True: frames are there already, do not sleep.
    cdef void disarm(self, int queue) noexcept nogil
