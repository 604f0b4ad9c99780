"""The forwarding table: (VLAN, MAC) -> port, learned, aged, limited.

A key may stand in either of two buckets, each one cache line of four entries. The table
has at least twice as many places as its limit allows entries, so that two full buckets
for one key are rare (below one key in a million at the limit), and it never moves an
entry. Lookups take no lock; writers share one spinlock, which nobody holds for longer
than it takes to change one entry.

Fairness: a guest may fill the table, but only until others need it. When the table is
full, a port with less than its share (limit / ports with entries) takes the place of
an entry of a port above it; others are refused and counted, and what they should have
learned is flooded.
"""
import os
import time

cimport cython
from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vhostpy._hw cimport (aligned_alloc, load_acquire_u64, read_once_u64, spin_lock,
                          spin_unlock, store_release_u64, write_once_u32, write_once_u64)

from vhostpy.errors import ConfigError

LIMIT_MAX = 65536

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)
    int MADV_HUGEPAGE

cdef enum:
    HUGE_PAGE = 2 << 20
    SEARCH_BUCKETS = 64    # looked at for an entry to evict; bounds the time under the lock
    SWEEP_BUCKETS = 4096   # looked at by one tick: the largest table takes 8 ticks

cdef uint64_t GROUP = 1ULL << 40      # of a key: the MAC's group bit


@cython.final
cdef class ForwardingTable:
    """Which port a MAC address is behind."""

    def __cinit__(self, limit=8192, age_s=300):
        cdef uint64_t buckets = 2
        cdef size_t size
        if not 1 <= limit <= LIMIT_MAX:
            raise ConfigError(f"forwarding table: limit {limit} is not in 1..{LIMIT_MAX}")
        if not 1 <= age_s <= 1_000_000:
            raise ConfigError(f"forwarding table: age of {age_s} s is not in 1..1000000")
        while buckets * PLACES < <uint64_t>(2 * limit):
            buckets *= 2
        size = buckets * PLACES * sizeof(Entry)
        self.table = <Entry *>aligned_alloc(HUGE_PAGE if size >= HUGE_PAGE else 64, size)
        self.port_counts = <uint32_t *>calloc(FDB_PORTS_MAX, sizeof(uint32_t))
        if self.table == NULL or self.port_counts == NULL:
            raise MemoryError("forwarding table")
        if size >= HUGE_PAGE:
            # Fewer TLB misses; where the kernel has no such page, only slower.
            madvise(self.table, size, MADV_HUGEPAGE)
        memset(self.table, 0, size)
        self.bucket_mask = buckets - 1
        self.limit = limit
        self.age_s = age_s
        self.seed = int.from_bytes(os.urandom(8), "little")
        self.now_s = <uint32_t>time.monotonic()

    def __dealloc__(self):
        free(self.table)
        free(self.port_counts)

    # Workers ------------------------------------------------------------------------

    cdef Entry *bucket(self, uint64_t key, int choice) noexcept nogil:
        cdef uint64_t hash = fdb_hash(self, key)
        if choice == 1:
            hash >>= 32
        return &self.table[(hash & self.bucket_mask) * PLACES]

    cdef void learn_slowly(self, const Address *address, int port) noexcept nogil:
        if address.key & GROUP or port < 0 or port >= FDB_PORTS_MAX:
            return
        spin_lock(&self.lock)
        self.note(address.key, port)
        spin_unlock(&self.lock)

    # Under the lock -----------------------------------------------------------------

    cdef void note(self, uint64_t key, int port) noexcept nogil:
        """The slow part of learn(): new, moved, or seen in a new second."""
        cdef Entry *entry = fdb_find(self, key, fdb_hash(self, key))
        if entry != NULL:
            self.renew(entry, port)
            return
        entry = self.place_for(key)
        if entry == NULL or self.count >= self.limit:
            if not self.make_room(key, port, entry == NULL):
                self.refused += 1
                return
            entry = self.place_for(key)
        self.fill(entry, key, port)
        self.learned += 1

    cdef void renew(self, Entry *entry, int port) noexcept nogil:
        """The entry's MAC was seen now, perhaps behind another port than before."""
        cdef int old_port = fdb_port_of(entry.value)
        if old_port != port:
            self.count_entry(old_port, -1)
            self.count_entry(port, 1)
            self.moved += 1
        # An entry that had aged out is an answer again.
        if old_port != port or fdb_is_old(self, entry.value):
            write_once_u64(&self.changes, self.changes + 1)
        write_once_u64(&entry.value, <uint64_t>port << 32 | self.now_s)

    cdef Entry *place_for(self, uint64_t key) noexcept nogil:
        """A free place in the emptier of the key's buckets; NULL if both are full."""
        cdef Entry *best = NULL
        cdef Entry *bucket
        cdef Entry *place
        cdef int choice, i, free_places, most = 0
        for choice in range(2):
            bucket = self.bucket(key, choice)
            place = NULL
            free_places = 0
            for i in range(PLACES):
                if bucket[i].key == 0 or self.empty_if_old(&bucket[i]):
                    place = &bucket[i]
                    free_places += 1
            if free_places > most:
                most = free_places
                best = place
        return best

    cdef bint make_room(self, uint64_t key, int port, bint here) noexcept nogil:
        """Evicts one entry of a port above its share, for a port below it.

        `here`: the key's own buckets are full, so that only room in them helps.
        """
        cdef uint32_t ports = self.ports_in_use + (self.port_counts[port] == 0)
        cdef uint32_t share = self.limit / ports
        cdef int _i
        if self.port_counts[port] >= share:
            return False
        if (self.evict_from(self.bucket(key, 0), share)
                or self.evict_from(self.bucket(key, 1), share)):
            return True
        if here:
            return False
        for _i in range(SEARCH_BUCKETS):
            self.hand = (self.hand + 1) & self.bucket_mask
            if self.evict_from(&self.table[self.hand * PLACES], share):
                return True
        return False

    cdef bint evict_from(self, Entry *bucket, uint32_t share) noexcept nogil:
        cdef int i
        for i in range(PLACES):
            if bucket[i].key != 0 and self.port_counts[fdb_port_of(bucket[i].value)] > share:
                self.empty(&bucket[i])
                self.evicted += 1
                return True
        return False

    cdef void fill(self, Entry *entry, uint64_t key, int port) noexcept nogil:
        # The value before the key. Pairs with lookup().
        store_release_u64(&entry.value, <uint64_t>port << 32 | self.now_s)
        store_release_u64(&entry.key, key | OCCUPIED)
        self.count_entry(port, 1)
        write_once_u64(&self.changes, self.changes + 1)

    cdef void empty(self, Entry *entry) noexcept nogil:
        write_once_u64(&entry.key, 0)
        self.count_entry(fdb_port_of(entry.value), -1)
        write_once_u64(&self.changes, self.changes + 1)

    cdef void count_entry(self, int port, int change) noexcept nogil:
        cdef bint was_in_use = self.port_counts[port] > 0
        self.port_counts[port] += change
        self.ports_in_use += (self.port_counts[port] > 0) - was_in_use
        write_once_u32(&self.count, self.count + change)

    cdef bint empty_if_old(self, Entry *entry) noexcept nogil:
        if entry.key == 0 or not fdb_is_old(self, entry.value):
            return False
        self.empty(entry)
        self.aged += 1
        return True

    # Control ------------------------------------------------------------------------

    cdef void sweep(self, uint64_t count) noexcept nogil:
        cdef Entry *entry
        cdef uint64_t _i
        for _i in range(count * PLACES):
            entry = &self.table[self.swept]
            self.swept = (self.swept + 1) & (self.bucket_mask * PLACES + PLACES - 1)
            # The lock only where there is something to do: workers wait for it.
            if read_once_u64(&entry.key) == 0 or not fdb_is_old(self, read_once_u64(&entry.value)):
                continue
            spin_lock(&self.lock)
            self.empty_if_old(entry)
            spin_unlock(&self.lock)

    def tick(self, now_s: int | None = None) -> None:
        """Sets the clock and removes entries that have aged out; once a second.

        Looks at a part of a large table each time: an old entry is no answer any more
        from the second on when it gets old, removing it only makes room.
        """
        cdef uint32_t now = <uint32_t>(time.monotonic() if now_s is None else now_s)
        cdef uint64_t buckets = min(self.bucket_mask + 1, <uint64_t>SWEEP_BUCKETS)
        with nogil:
            spin_lock(&self.lock)
            write_once_u32(&self.now_s, now)
            write_once_u64(&self.changes, self.changes + 1)
            spin_unlock(&self.lock)
            self.sweep(buckets)

    def flush(self, port: int | None = None) -> int:
        """Forgets the entries of one port, or all; returns how many."""
        cdef int wanted = -1 if port is None else port
        cdef uint64_t i
        cdef Entry *entry
        cdef int forgotten = 0
        with nogil:
            for i in range((self.bucket_mask + 1) * PLACES):
                entry = &self.table[i]
                if read_once_u64(&entry.key) == 0:
                    continue
                spin_lock(&self.lock)
                if entry.key != 0 and (wanted < 0 or fdb_port_of(entry.value) == wanted):
                    self.empty(entry)
                    forgotten += 1
                spin_unlock(&self.lock)
        return forgotten

    def entries(self) -> list[tuple[int, bytes, int, int]]:
        """(VLAN, MAC, port, seconds since it was seen) of every entry."""
        cdef uint64_t i, key, value
        cdef int age
        found = []
        for i in range((self.bucket_mask + 1) * PLACES):
            key = load_acquire_u64(&self.table[i].key)
            value = load_acquire_u64(&self.table[i].value)
            if key == 0 or read_once_u64(&self.table[i].key) != key or fdb_is_old(self, value):
                continue
            age = <int>(self.now_s - <uint32_t>value)
            mac = int(key & 0xffffffffffff).to_bytes(6, "big")
            found.append((int(key >> 48 & 0xfff), mac, fdb_port_of(value), max(age, 0)))
        return found

    def status(self) -> dict:
        """Counts, for `status`."""
        return {
            "entries": self.count,
            "limit": self.limit,
            "age_s": self.age_s,
            "learned": self.learned,
            "moved": self.moved,
            "aged": self.aged,
            "evicted": self.evicted,
            "refused": self.refused,
        }

    # Doors --------------------------------------------------------------------------

    def port_behind(self, mac: bytes, vlan: int = 0) -> int | None:
        """The port that a MAC address is behind, None if unknown."""
        cdef Address address
        fdb_prepare(self, &address, checked_key(mac, vlan))
        cdef int port = fdb_lookup(self, &address)
        return None if port == FDB_UNKNOWN else port

    def seen(self, mac: bytes, port: int, vlan: int = 0) -> None:
        """A frame from `mac` came in on `port`."""
        if not 0 <= port < FDB_PORTS_MAX:
            raise ValueError(f"port {port} is not in 0..{FDB_PORTS_MAX - 1}")
        cdef Address address
        fdb_prepare(self, &address, checked_key(mac, vlan))
        fdb_learn(self, &address, port)


cdef uint64_t checked_key(mac, vlan) except? 0xffffffffffffffff:
    if len(mac) != 6:
        raise ValueError(f"a MAC address has 6 bytes, not {len(mac)}")
    if not 0 <= vlan < 4096:
        raise ValueError(f"VLAN {vlan} is not in 0..4095")
    cdef bytes octets = bytes(mac)
    return fdb_key(vlan, <const uint8_t *><const char *>octets)
