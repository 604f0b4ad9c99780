"""The forwarding table: (VLAN, MAC) -> port, learned, aged, limited.

Knows keys and port numbers; knows no frame, port object or ring.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t

from libc.string cimport memcpy
from vhostpy.system.hw cimport likely, prefetch_read

cdef extern from *:
    """
    /* An entry: one word, so that a reader has all of it. 0: a free slot. */
    #define VHOSTPY_FDB_OCCUPIED (1ull << 63)
    #define VHOSTPY_FDB_PORT_BIT 51               /* 12 bits */
    #define VHOSTPY_FDB_FRESH (1ull << 50)        /* seen in this second */
    #define VHOSTPY_FDB_SECOND (1ull << 49)       /* it stands in its key's second bucket */
    #define VHOSTPY_FDB_TAG_FROM 11               /* of the hash: the 49 bits below */
    #define VHOSTPY_FDB_HASH ((1ull << 60) - 1)   /* as a key: 12 bits of VLAN id, 48 of MAC */
    #define VHOSTPY_FDB_SAME (~(0xfffull << VHOSTPY_FDB_PORT_BIT | VHOSTPY_FDB_FRESH))

    /* The word of a bucket whose bits of SAME are `wanted`; 0: none. Without a branch: no
       predictor guesses in which of eight slots a key is. Each word is read once. Of two that
       match, since the key was put elsewhere meanwhile, one is chosen: both were answers. */
    static inline uint64_t vhostpy_fdb_word_in(const uint64_t *bucket, uint64_t wanted)
    {
        typedef uint64_t pair __attribute__((vector_size(16)));
        const volatile pair *words = (const volatile pair *)bucket;
        const pair same = {VHOSTPY_FDB_SAME, VHOSTPY_FDB_SAME};
        const pair all_wanted = {wanted, wanted};
        pair found = {0, 0};
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            pair word = words[i];
            pair matches = (pair)((word & same) == all_wanted);
            found = (found & ~matches) | (word & matches);
        }
        return found[1] ? found[1] : found[0];
    }
    """
    uint64_t OCCUPIED "VHOSTPY_FDB_OCCUPIED"
    uint64_t FRESH "VHOSTPY_FDB_FRESH"
    uint64_t SECOND "VHOSTPY_FDB_SECOND"
    uint64_t SAME "VHOSTPY_FDB_SAME"
    uint64_t HASH_MASK "VHOSTPY_FDB_HASH"
    int PORT_BIT "VHOSTPY_FDB_PORT_BIT"
    int TAG_FROM "VHOSTPY_FDB_TAG_FROM"
    uint64_t fdb_word_in "vhostpy_fdb_word_in" (const uint64_t *bucket,
                                                uint64_t wanted) noexcept nogil

cdef enum:
    FDB_UNKNOWN = -1
    FDB_PORTS_MAX = 4096   # port numbers are below this
    SLOTS = 8             # in a bucket, which is one cache line


cdef class ForwardingTable:
    cdef uint64_t *table         # buckets of eight words
    cdef uint32_t *seen_s        # of each slot: the second when its entry was last seen
    cdef uint64_t bucket_mask
    cdef uint64_t seed           # secret: a guest can't choose MACs that share a bucket
    cdef uint32_t lock           # writers
    cdef uint32_t now_s          # control's clock, advanced by tick()
    cdef uint64_t changes        # moves on when any answer of lookup() may have changed
    cdef bint flushing           # no entry moves meanwhile
    cdef uint64_t hand           # where the search for an entry to evict goes on
    cdef readonly uint32_t limit
    cdef readonly uint32_t count
    cdef readonly uint32_t age_s
    cdef uint32_t *port_counts   # entries of each port
    cdef uint32_t ports_in_use   # that have entries
    cdef readonly uint64_t learned, moved, aged, refused, evicted

    cdef void learn_slowly(self, uint64_t hash, int port) noexcept nogil
    # Any worker, concurrently. Never a group address.

    cdef void note(self, uint64_t hash, int port) noexcept nogil
    cdef uint64_t *slot_of(self, uint64_t *bucket, uint64_t tag) noexcept nogil
    cdef uint64_t *slot_for(self, uint64_t *first, uint64_t *second) noexcept nogil
    cdef uint64_t *free_slot(self, uint64_t *bucket) noexcept nogil
    cdef uint64_t *vacated(self, uint64_t *bucket) noexcept nogil
    cdef bint make_room(self, int port) noexcept nogil
    cdef bint evict_from(self, uint64_t *bucket, uint32_t share) noexcept nogil
    cdef void put(self, uint64_t *slot, uint64_t identity, int port) noexcept nogil
    cdef void clear(self, uint64_t *slot) noexcept nogil
    cdef void count_entry(self, int port, int change) noexcept nogil
    cdef void sweep(self) noexcept nogil
    cdef bint is_old(self, uint64_t *slot) noexcept nogil
    cdef void set_flushing(self, bint flushing) noexcept nogil
    cdef uint64_t key_of(self, uint64_t bucket, uint64_t word) noexcept nogil


# What runs per frame, inline.

cdef inline uint64_t fdb_key(uint16_t vlan, const uint8_t *mac) noexcept nogil:
    """`mac` has two more bytes behind it, which may be any."""
    cdef uint64_t octets
    memcpy(&octets, mac, 8)
    return octets & <uint64_t>0xffffffffffff | <uint64_t>(vlan & 0xfff) << 48


cdef inline uint64_t fdb_hash(ForwardingTable table, uint64_t key) noexcept nogil:
    """Of 60 bits, and each hash of one key only: bucket and tag together say which.

    MurmurHash3's finalizer, cut to 60 bits: every input bit changes every output bit.
    """
    key ^= table.seed
    key = (key ^ (key >> 32)) * <uint64_t>0xff51afd7ed558ccdULL & HASH_MASK
    key = (key ^ (key >> 32)) * <uint64_t>0xc4ceb9fe1a85ec53ULL & HASH_MASK
    return key ^ (key >> 32)


cdef inline uint64_t *fdb_first(ForwardingTable table, uint64_t hash) noexcept nogil:
    return &table.table[(hash & table.bucket_mask) * SLOTS]


cdef inline uint64_t fdb_to_other(ForwardingTable table, uint64_t hash) noexcept nogil:
    """What turns the number of one of a key's buckets into that of the other. The tag says it."""
    return (hash >> 2 * TAG_FROM & table.bucket_mask) | 1


cdef inline uint64_t *fdb_second(ForwardingTable table, uint64_t hash) noexcept nogil:
    return &table.table[(hash & table.bucket_mask ^ fdb_to_other(table, hash)) * SLOTS]


cdef inline int fdb_port_of(uint64_t word) noexcept nogil:
    return <int>(word >> PORT_BIT & 0xfff)


cdef inline uint64_t fdb_prepare(ForwardingTable table, uint64_t key) noexcept nogil:
    """The key's hash, which the other two take; fetches what they will look at."""
    cdef uint64_t hash = fdb_hash(table, key)
    prefetch_read(fdb_first(table, hash))
    return hash


cdef inline uint64_t fdb_find(ForwardingTable table, uint64_t hash) noexcept nogil:
    """The key's entry; 0: none."""
    cdef uint64_t wanted = OCCUPIED | hash >> TAG_FROM
    cdef uint64_t word = fdb_word_in(fdb_first(table, hash), wanted)
    # Of the keys of a full table, one in a hundred stands in its second bucket.
    if likely(word):
        return word
    return fdb_word_in(fdb_second(table, hash), wanted | SECOND)


cdef inline int fdb_lookup(ForwardingTable table, uint64_t hash) noexcept nogil:
    """The port behind it, or FDB_UNKNOWN."""
    cdef uint64_t word = fdb_find(table, hash)
    return fdb_port_of(word) if word else FDB_UNKNOWN


cdef inline void fdb_learn(ForwardingTable table, uint64_t hash, int port) noexcept nogil:
    """Any worker, concurrently; cheap when nothing changes."""
    cdef uint64_t word = fdb_find(table, hash)
    if not word & FRESH or fdb_port_of(word) != port:
        table.learn_slowly(hash, port)
