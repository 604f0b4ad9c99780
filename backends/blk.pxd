"""virtio-blk's data path: requests of one virtqueue, to a storage and back."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from vhostpy._ring cimport Chain, Virtqueue
from vhostpy.worker cimport Pollable, Turn
from vhostpy.backends.storage._storage cimport Channel, Request, Storage

cdef struct BlkCounters:
    uint64_t reads
    uint64_t read_bytes
    uint64_t writes
    uint64_t write_bytes
    uint64_t flushes
    uint64_t discards
    uint64_t write_zeroes
    uint64_t get_ids
    uint64_t io_errors         # the storage said no
    uint64_t bad_requests      # the guest's request made no sense: IOERR
    uint64_t unsupported       # unknown or not offered: UNSUPP
    uint64_t bad_chains        # no status byte could be found
    uint64_t chain_faults[8]

cdef struct Slot           # private to blk.pyx: a request under way

cdef class DiskQueue(Pollable):
    # One virtqueue of one disk.
    cdef Virtqueue virtqueue
    cdef Storage storage
    cdef Channel channel
    cdef Slot *slots
    cdef BlkCounters counts
    cdef uint32_t draining
