"""What a ring's worker keeps of the memory in which its chains are remembered.

A region is one queue's part of that memory. Its entries stand for chains, by the head's
index (split), or for descriptors, in the order in which they were taken (packed).
Source: vhost-user, "Inflight I/O tracking".
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    # Of both layouts' regions: uint64_t features, uint16_t version, uint16_t desc_num.
    REGION_VERSION = 8
    REGION_DESC_NUM = 10

cdef struct Tracker:
    # The worker's while its ring is live. `region` is shared with the front-end, so it is
    # only written, until another back-end recovers by it.
    uint8_t *region
    uint64_t counter        # of the next chain: "used to preserve the order"
    uint32_t size           # entries
    # Chains given back since the last publish, by their first entries.
    uint16_t *batch
    uint32_t pushed
    uint32_t pushed_slots   # packed: entries of theirs
    uint16_t batch_head     # split: the last of them, as the region says it
    # Packed: entries that are free, and those of a chain, are linked.
    uint16_t *next
    uint16_t *last          # by a chain's first entry: its last
    uint32_t free_count
    uint16_t free_head
    # Chains to be taken again: an avail ring of our own (split), or a descriptor ring
    # (packed), from which pop() takes before it looks at the driver's.
    uint8_t *again
    uint16_t *again_entries  # packed: first entries, by the index of a chain's first slot
    uint32_t again_left     # chains
    uint16_t again_first    # position in it of the first, and of the next
    uint16_t again_next
    uint8_t again_last      # the last burst came from there


cdef inline void track_push(Tracker *tracker, uint16_t entry, uint16_t slots) noexcept nogil:
    # A driver that offers chains twice could have more given back than it has.
    if tracker.pushed < tracker.size:
        tracker.batch[tracker.pushed] = entry
        tracker.pushed += 1
        tracker.pushed_slots += slots
