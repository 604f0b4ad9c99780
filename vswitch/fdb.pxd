"""The forwarding table: (VLAN, MAC) -> port, learned, aged, limited.

Knows keys and port numbers; knows no frame, port object or ring.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t

cdef enum:
    FDB_UNKNOWN = -1

cdef inline uint64_t fdb_key(uint16_t vlan, const uint8_t *mac) noexcept nogil:
    # 12 bits of VLAN id, 48 of MAC (network order, first byte highest).
    return (<uint64_t>(vlan & 0xfff) << 48 | <uint64_t>mac[0] << 40 | <uint64_t>mac[1] << 32
            | <uint64_t>mac[2] << 24 | <uint64_t>mac[3] << 16 | <uint64_t>mac[4] << 8 | mac[5])

cdef struct Entry          # private to fdb.pyx

cdef class ForwardingTable:
    cdef Entry *entries
    cdef uint64_t bucket_mask
    cdef uint32_t lock           # writers
    cdef uint32_t now_s          # control's clock, advanced by tick()
    cdef readonly uint32_t limit
    cdef readonly uint32_t count
    cdef readonly uint32_t age_s
    cdef uint32_t *port_counts
    cdef uint32_t port_limit
    cdef readonly uint64_t learned, moved, aged, refused, evicted
    cdef int lookup(self, uint64_t key) noexcept nogil
    # The port index behind a key, or FDB_UNKNOWN (also when the entry has aged out).
    cdef void learn(self, uint64_t key, int port) noexcept nogil
    # Any worker, concurrently; cheap when nothing changes.
