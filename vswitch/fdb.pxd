"""The forwarding table: (VLAN, MAC) -> port, learned, aged, limited.

Knows keys and port numbers; knows no frame, port object or ring.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t

from libc.string cimport memcpy

cdef extern from "<arpa/inet.h>" nogil:
    uint32_t ntohl(uint32_t)
    uint16_t ntohs(uint16_t)

cdef enum:
    FDB_UNKNOWN = -1
    FDB_PORTS_MAX = 4096   # port numbers are below this

cdef inline uint64_t fdb_key(uint16_t vlan, const uint8_t *mac) noexcept nogil:
    # 12 bits of VLAN id, 48 of MAC (network order, first byte highest).
    cdef uint32_t high
    cdef uint16_t low
    memcpy(&high, mac, 4)
    memcpy(&low, mac + 4, 2)
    return <uint64_t>(vlan & 0xfff) << 48 | <uint64_t>ntohl(high) << 16 | ntohs(low)

cdef struct Address:
    # A key and where the table looks for it: hashed once, when its buckets are prefetched.
    uint64_t key
    uint64_t hash

cdef struct Entry          # private to fdb.pyx

cdef class ForwardingTable:
    cdef Entry *table           # buckets of four
    cdef uint64_t bucket_mask
    cdef uint64_t seed           # secret: a guest can't choose MACs that share a bucket
    cdef uint32_t lock           # writers
    cdef uint32_t now_s          # control's clock, advanced by tick()
    cdef uint64_t changes        # moves on when any answer of lookup() may have changed
    cdef uint64_t hand           # where the search for an entry to evict goes on
    cdef uint64_t swept          # where tick() goes on
    cdef readonly uint32_t limit
    cdef readonly uint32_t count
    cdef readonly uint32_t age_s
    cdef uint32_t *port_counts   # entries of each port
    cdef uint32_t ports_in_use   # that have entries
    cdef readonly uint64_t learned, moved, aged, refused, evicted

    cdef void prepare(self, Address *address, uint64_t key) noexcept nogil
    # Fills the address in, and fetches what lookup() and learn() will look at.
    cdef int lookup(self, const Address *address) noexcept nogil
    # The port behind it, or FDB_UNKNOWN (also when the entry has aged out).
    cdef void learn(self, const Address *address, int port) noexcept nogil
    # Any worker, concurrently; cheap when nothing changes. Never a group address.

    cdef Entry *bucket(self, uint64_t key, int choice) noexcept nogil
    cdef Entry *find(self, uint64_t key, uint64_t hash) noexcept nogil
    cdef Entry *place_for(self, uint64_t key) noexcept nogil
    cdef bint make_room(self, uint64_t key, int port, bint here) noexcept nogil
    cdef bint evict_from(self, Entry *bucket, uint32_t share) noexcept nogil
    cdef void fill(self, Entry *entry, uint64_t key, int port) noexcept nogil
    cdef void empty(self, Entry *entry) noexcept nogil
    cdef void renew(self, Entry *entry, int port) noexcept nogil
    cdef void count_entry(self, int port, int change) noexcept nogil
    cdef void note(self, uint64_t key, int port) noexcept nogil
    cdef bint is_old(self, uint64_t value) noexcept nogil
    cdef bint empty_if_old(self, Entry *entry) noexcept nogil
    cdef void sweep(self, uint64_t count) noexcept nogil
