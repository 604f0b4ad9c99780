"""The forwarding table: (VLAN, MAC) -> port, learned, aged, limited.

Knows keys and port numbers; knows no frame, port object or ring.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t

from libc.string cimport memcpy
from vhostpy._hw cimport load_acquire_u64, prefetch_read, read_once_u32, read_once_u64

cdef extern from *:
    """
    /* Set in every stored key: MAC 0 on VLAN 0 is a key too. */
    #define VHOSTPY_FDB_OCCUPIED (1ull << 63)
    """
    uint64_t OCCUPIED "VHOSTPY_FDB_OCCUPIED"
    int lowest_bit "__builtin_ctz" (uint32_t) nogil

cdef extern from "<arpa/inet.h>" nogil:
    uint32_t ntohl(uint32_t)
    uint16_t ntohs(uint16_t)

cdef enum:
    FDB_UNKNOWN = -1
    FDB_PORTS_MAX = 4096   # port numbers are below this
    PLACES = 4             # in a bucket

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

cdef struct Entry:
    uint64_t key           # with OCCUPIED; 0: a free place
    uint64_t value         # port << 32 | second when it was last seen

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

    cdef void learn_slowly(self, const Address *address, int port) noexcept nogil
    # Any worker, concurrently. Never a group address.

    cdef Entry *bucket(self, uint64_t key, int choice) noexcept nogil
    cdef Entry *place_for(self, uint64_t key) noexcept nogil
    cdef bint make_room(self, uint64_t key, int port, bint here) noexcept nogil
    cdef bint evict_from(self, Entry *bucket, uint32_t share) noexcept nogil
    cdef void fill(self, Entry *entry, uint64_t key, int port) noexcept nogil
    cdef void empty(self, Entry *entry) noexcept nogil
    cdef void renew(self, Entry *entry, int port) noexcept nogil
    cdef void count_entry(self, int port, int change) noexcept nogil
    cdef void note(self, uint64_t key, int port) noexcept nogil
    cdef bint empty_if_old(self, Entry *entry) noexcept nogil
    cdef void sweep(self, uint64_t count) noexcept nogil


# What runs per frame: inline, 7 cycles of 109 where each frame has other addresses.

cdef inline uint64_t fdb_hash(ForwardingTable table, uint64_t key) noexcept nogil:
    # MurmurHash3's finalizer: every input bit changes every output bit.
    key ^= table.seed
    key = (key ^ (key >> 33)) * <uint64_t>0xff51afd7ed558ccdULL
    key = (key ^ (key >> 33)) * <uint64_t>0xc4ceb9fe1a85ec53ULL
    return key ^ (key >> 33)


cdef inline int fdb_port_of(uint64_t value) noexcept nogil:
    return <int>(value >> 32)


cdef inline bint fdb_is_old(ForwardingTable table, uint64_t value) noexcept nogil:
    # Signed: an entry may have been seen after our copy of the clock was read.
    return <int>(read_once_u32(&table.now_s) - <uint32_t>value) >= <int>table.age_s


cdef inline uint32_t fdb_matches(const Entry *bucket, uint64_t key) noexcept nogil:
    # A bit for each place that holds the key. Without a loop, which costs as much again.
    return (<uint32_t>(load_acquire_u64(&bucket[0].key) == key)
            | <uint32_t>(load_acquire_u64(&bucket[1].key) == key) << 1
            | <uint32_t>(load_acquire_u64(&bucket[2].key) == key) << 2
            | <uint32_t>(load_acquire_u64(&bucket[3].key) == key) << 3)


cdef inline Entry *fdb_find(ForwardingTable table, uint64_t key, uint64_t hash) noexcept nogil:
    cdef Entry *first = &table.table[(hash & table.bucket_mask) * PLACES]
    cdef Entry *second = &table.table[((hash >> 32) & table.bucket_mask) * PLACES]
    cdef uint32_t match
    cdef int place
    key |= OCCUPIED
    # One branch for all places: no predictor guesses in which of them a key is. To fetch the
    # second bucket only where the first fails costs more than it saves (106 -> 135 cycles).
    match = fdb_matches(first, key) | fdb_matches(second, key) << PLACES
    if match == 0:
        return NULL
    place = lowest_bit(match)
    return (first if place < PLACES else second) + (place & PLACES - 1)


cdef inline void fdb_prepare(ForwardingTable table, Address *address,
                             uint64_t key) noexcept nogil:
    """Fills the address in, and fetches what the other two will look at."""
    cdef uint64_t hash = fdb_hash(table, key)
    address.key = key
    address.hash = hash
    prefetch_read(&table.table[(hash & table.bucket_mask) * PLACES])
    prefetch_read(&table.table[((hash >> 32) & table.bucket_mask) * PLACES])


cdef inline int fdb_lookup(ForwardingTable table, const Address *address) noexcept nogil:
    """The port behind it, or FDB_UNKNOWN (also when the entry has aged out)."""
    cdef Entry *entry = fdb_find(table, address.key, address.hash)
    cdef uint64_t value
    if entry == NULL:
        return FDB_UNKNOWN
    value = load_acquire_u64(&entry.value)
    # Still that key: then this was its value. Pairs with fill() and empty(), which
    # clear the key before they touch the value.
    if read_once_u64(&entry.key) != (address.key | OCCUPIED) or fdb_is_old(table, value):
        return FDB_UNKNOWN
    return fdb_port_of(value)


cdef inline void fdb_learn(ForwardingTable table, const Address *address,
                           int port) noexcept nogil:
    """Any worker, concurrently; cheap when nothing changes."""
    cdef Entry *entry = fdb_find(table, address.key, address.hash)
    cdef uint64_t value = <uint64_t>port << 32 | read_once_u32(&table.now_s)
    if entry == NULL or read_once_u64(&entry.value) != value:
        table.learn_slowly(address, port)
