"""What a disk's queue has done so far, as its worker counts it."""
from libc.stdint cimport uint64_t

cdef struct BlkCounters:
    uint64_t reads
    uint64_t read_bytes
    uint64_t writes
    uint64_t write_bytes
    uint64_t flushes
    uint64_t discards
    uint64_t write_zeroes
    uint64_t secure_erases
    uint64_t get_ids
    uint64_t io_errors         # the storage said no
    uint64_t bad_requests      # the guest's request made no sense: IOERR
    uint64_t unsupported       # unknown or not offered: UNSUPP
    uint64_t bad_chains        # nothing of it is writable, so no status byte: the ring is broken
    uint64_t chain_faults[8]   # IOERR; where the status byte was not found, the ring is broken

cdef dict counters_of(const BlkCounters *counts)
# By stable names, while the worker goes on counting.
