"""What a port knows of one queue pair: its virtqueues, and what their worker and the lock's
holder remember."""
from libc.stdint cimport uint32_t, uint64_t
from vhostpy.vswitch.port cimport QueueCounters
from vhostpy._ring cimport CHAIN_FAULTS, Chain, Scratch
from vhostpy.backends.net.release cimport Release

cdef enum:
    # Receive buffers that one transmit() may use: enough for the longest frame in
    # buffers of 64 bytes. A guest with smaller ones gets no long frames.
    WINDOW = 1024

cdef struct Pair:
    # Control's, read by workers; one cache line.
    void *rx               # borrowed Virtqueue; NULL: not started
    void *tx
    uint32_t rx_enabled
    uint32_t tx_enabled
    uint64_t padding[5]
    # The worker's that polls tx.
    QueueCounters sent
    uint64_t bad_chains[CHAIN_FAULTS]
    Release release
    uint64_t padding3[5]
    # The worker's that holds the lock, where several can; one cache line, then more.
    uint32_t lock
    int have               # chains popped for this transmit()
    int next               # of them, used or given up
    int faulty             # descriptors of chains that nobody can use, in it
    Scratch scratch
    uint32_t logging
    int costly             # unusable chains that are COSTLY, since it was wired
    uint32_t padding2[2]
    QueueCounters received
    uint64_t bad_buffers[CHAIN_FAULTS]
    uint32_t written[WINDOW]
    Chain chains[WINDOW]
