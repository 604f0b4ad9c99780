"""The forwarding table: (VLAN, MAC) -> port, learned, aged, limited.

An entry is one word of 64 bits, a bucket a cache line of eight. A key is not stored: it is
hashed to as many bits, some of which say the bucket, the others are the entry's tag. Its entry
stands in its first bucket or, where that is full, in its second. The table has at least twice
as many slots as its limit allows entries: so one lookup in a hundred goes to a second bucket,
and where both of a key are full, another entry moves. Lookups take no lock; writers share one
spinlock, which nobody holds for longer than it takes to find and change one entry.

Fairness: a guest may fill the table, but only until others need it. When the table is
full, a port with less than its share (limit / ports with entries) takes the place of
an entry of a port above it; others are refused and counted, and what they should have
learned is flooded.
"""
import os
import time

cimport cython
from libc.stdint cimport int32_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vhostpy.system.hw cimport (
    aligned_alloc, read_once_u32, read_once_u64, spin_lock, spin_unlock, store_release_u64,
    write_once_u32,
)

from vhostpy.errors import ConfigError

LIMIT_MAX = 65536


@cython.final
cdef class ForwardingTable:
    """Which port a MAC address is behind."""

    def __cinit__(self, limit=8192, age_s=300):
        cdef size_t size
        cdef uint64_t buckets = 1 << TAG_FROM   # at least: its number and a tag are a whole hash
        if not 1 <= limit <= LIMIT_MAX:
            raise ConfigError(f"forwarding table: limit {limit} is not in 1..{LIMIT_MAX}")
        if not 1 <= age_s <= 1_000_000:
            raise ConfigError(f"forwarding table: age of {age_s} s is not in 1..1000000")
        while buckets * SLOTS < <uint64_t>(2 * limit):
            buckets *= 2
        size = buckets * SLOTS * sizeof(uint64_t)
        self.table = <uint64_t *>aligned_alloc(64, size)
        self.seen_s = <uint32_t *>calloc(buckets * SLOTS, sizeof(uint32_t))
        self.port_counts = <uint32_t *>calloc(FDB_PORTS_MAX, sizeof(uint32_t))
        if self.table == NULL or self.seen_s == NULL or self.port_counts == NULL:
            raise MemoryError("forwarding table")
        memset(self.table, 0, size)
        self.bucket_mask = buckets - 1
        self.limit = limit
        self.age_s = age_s
        self.seed = int.from_bytes(os.urandom(8), "little") & HASH_MASK
        self.now_s = <uint32_t>time.monotonic()

    def __dealloc__(self):
        free(self.table)
        free(self.seen_s)
        free(self.port_counts)

    # Workers ------------------------------------------------------------------------

    cdef void learn_slowly(self, uint64_t hash, int port) noexcept nogil:
        if port < 0 or port >= FDB_PORTS_MAX:
            return
        spin_lock(&self.lock)
        self.note(hash, port)
        spin_unlock(&self.lock)

    # Under the lock -----------------------------------------------------------------

    cdef void note(self, uint64_t hash, int port) noexcept nogil:
        """The slow part of learn(): new, moved, or seen for the first time in this second."""
        cdef uint64_t tag = hash >> TAG_FROM
        cdef uint64_t *first = fdb_first(self, hash)
        cdef uint64_t *second = fdb_second(self, hash)
        cdef uint64_t *slot = self.slot_of(first, tag)
        if slot == NULL:
            slot = self.slot_of(second, SECOND | tag)
        if slot != NULL:
            self.moved += fdb_port_of(slot[0]) != port
            self.put(slot, slot[0] & SAME, port)
            return
        slot = self.slot_for(first, second)
        if slot == NULL or self.count >= self.limit and not self.make_room(port):
            self.refused += 1
            return
        self.put(slot, OCCUPIED | tag | (0 if first <= slot < first + SLOTS else SECOND), port)
        self.learned += 1

    cdef uint64_t *slot_of(self, uint64_t *bucket, uint64_t tag) noexcept nogil:
        """Where the entry of that tag is; NULL: nowhere."""
        cdef int i
        for i in range(SLOTS):
            if bucket[i] & SAME == OCCUPIED | tag:
                return &bucket[i]
        return NULL

    cdef uint64_t *slot_for(self, uint64_t *first, uint64_t *second) noexcept nogil:
        cdef uint64_t *slot = self.free_slot(first)
        if slot == NULL:
            slot = self.free_slot(second)
        return slot if slot != NULL else self.vacated(first)

    cdef uint64_t *free_slot(self, uint64_t *bucket) noexcept nogil:
        cdef int i
        for i in range(SLOTS):
            if bucket[i] == 0:
                return &bucket[i]
        return NULL

    cdef uint64_t *vacated(self, uint64_t *bucket) noexcept nogil:
        """The slot of one of its entries, which moves to its other bucket; NULL: all full."""
        cdef uint64_t number = (bucket - self.table) / SLOTS
        cdef uint64_t *slot
        cdef int i
        if self.flushing:
            return NULL          # flush() must not miss what moves behind it
        for i in range(SLOTS):
            slot = self.free_slot(
                &self.table[(number ^ fdb_to_other(self, bucket[i] << TAG_FROM)) * SLOTS])
            if slot != NULL:
                self.seen_s[slot - self.table] = self.seen_s[&bucket[i] - self.table]
                # The new one first. Who misses both floods a frame.
                store_release_u64(slot, bucket[i] ^ SECOND)
                store_release_u64(&bucket[i], 0)
                return &bucket[i]
        return NULL

    cdef bint make_room(self, int port) noexcept nogil:
        """Evicts one entry of a port above its share, for a port below it."""
        cdef uint32_t ports = self.ports_in_use + (self.port_counts[port] == 0)
        cdef uint32_t share = self.limit / ports
        cdef long _i
        if self.port_counts[port] >= share:
            return False
        # Some port is above its share. Where its slots are few among many, the next frame
        # goes on where this one gives up: others wait for the lock.
        for _i in range(1 << TAG_FROM):
            self.hand = (self.hand + 1) & self.bucket_mask
            if self.evict_from(&self.table[self.hand * SLOTS], share):
                return True
        return False

    cdef bint evict_from(self, uint64_t *bucket, uint32_t share) noexcept nogil:
        cdef int i
        for i in range(SLOTS):
            if bucket[i] and self.port_counts[fdb_port_of(bucket[i])] > share:
                self.clear(&bucket[i])
                self.evicted += 1
                return True
        return False

    cdef void put(self, uint64_t *slot, uint64_t identity, int port) noexcept nogil:
        """The entry there was seen now, behind that port."""
        cdef uint64_t old = slot[0]
        self.seen_s[slot - self.table] = self.now_s
        store_release_u64(slot, identity | FRESH | <uint64_t>port << PORT_BIT)
        if old == 0 or fdb_port_of(old) != port:
            self.count_entry(port, 1)
            if old:
                self.count_entry(fdb_port_of(old), -1)
            store_release_u64(&self.changes, self.changes + 1)

    cdef void clear(self, uint64_t *slot) noexcept nogil:
        self.count_entry(fdb_port_of(slot[0]), -1)
        store_release_u64(slot, 0)
        store_release_u64(&self.changes, self.changes + 1)

    cdef void count_entry(self, int port, int change) noexcept nogil:
        cdef bint was_in_use = self.port_counts[port] > 0
        self.port_counts[port] += change
        self.ports_in_use += (self.port_counts[port] > 0) - was_in_use
        write_once_u32(&self.count, self.count + change)

    # Control ------------------------------------------------------------------------

    def tick(self, now_s: int | None = None) -> None:
        """Sets the clock and removes entries that have aged out; once a second."""
        write_once_u32(&self.now_s, <uint32_t>(time.monotonic() if now_s is None else now_s))
        if self.count:
            with nogil:
                self.sweep()
                # A forwarder that keeps answers asks again: its sender is seen in this second.
                spin_lock(&self.lock)
                store_release_u64(&self.changes, self.changes + 1)
                spin_unlock(&self.lock)

    cdef void sweep(self) noexcept nogil:
        cdef uint64_t bucket
        cdef uint64_t *slot
        cdef int i
        for bucket in range(self.bucket_mask + 1):
            for i in range(SLOTS):
                slot = &self.table[bucket * SLOTS + i]
                # The lock only where there is something to do: workers wait for it.
                if not read_once_u64(slot) & FRESH and not self.is_old(slot):
                    continue
                spin_lock(&self.lock)
                if self.is_old(slot):
                    self.clear(slot)
                    self.aged += 1
                else:
                    store_release_u64(slot, slot[0] & ~FRESH)
                spin_unlock(&self.lock)

    cdef bint is_old(self, uint64_t *slot) noexcept nogil:
        cdef uint32_t seen = read_once_u32(&self.seen_s[slot - self.table])
        return read_once_u64(slot) != 0 and <int32_t>(self.now_s - seen) >= <int32_t>self.age_s

    def flush(self, port: int | None = None) -> int:
        """Forgets the entries of one port, or all; returns how many."""
        cdef int wanted = -1 if port is None else port
        cdef uint64_t i
        cdef uint64_t *slot
        cdef int forgotten = 0
        with nogil:
            self.set_flushing(True)
            for i in range((self.bucket_mask + 1) * SLOTS):
                slot = &self.table[i]
                if read_once_u64(slot) == 0:
                    continue
                spin_lock(&self.lock)
                if slot[0] and (wanted < 0 or fdb_port_of(slot[0]) == wanted):
                    self.clear(slot)
                    forgotten += 1
                spin_unlock(&self.lock)
            # Takes the lock behind the last look: who cleared an entry that was not seen any
            # more has told so by `changes` before a port table without this port is published.
            self.set_flushing(False)
        return forgotten

    cdef void set_flushing(self, bint flushing) noexcept nogil:
        spin_lock(&self.lock)
        self.flushing = flushing
        spin_unlock(&self.lock)

    def entries(self) -> list[tuple[int, bytes, int, int]]:
        """(VLAN, MAC, port, seconds since it was seen) of every entry."""
        cdef uint64_t i, key, word
        found = []
        for i in range((self.bucket_mask + 1) * SLOTS):
            word = read_once_u64(&self.table[i])
            if word == 0:
                continue
            key = self.key_of(i / SLOTS, word)
            mac = int(key & 0xffffffffffff).to_bytes(6, "little")
            found.append((int(key >> 48), mac, fdb_port_of(word), self.now_s - self.seen_s[i]))
        return found

    cdef uint64_t key_of(self, uint64_t bucket, uint64_t word) noexcept nogil:
        """Undoes fdb_hash(): its factors have inverses, its shifts are their own."""
        cdef uint64_t hash = word << TAG_FROM & HASH_MASK
        if word & SECOND:
            bucket ^= fdb_to_other(self, hash)
        hash |= bucket & (1 << TAG_FROM) - 1
        hash = (hash ^ (hash >> 32)) * <uint64_t>0x9cb4b2f8129337dbULL & HASH_MASK
        hash = (hash ^ (hash >> 32)) * <uint64_t>0x4f74430c22a54005ULL & HASH_MASK
        return hash ^ (hash >> 32) ^ self.seed

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
        cdef int port = fdb_lookup(self, fdb_prepare(self, checked_key(mac, vlan)))
        return None if port == FDB_UNKNOWN else port

    def seen(self, mac: bytes, port: int, vlan: int = 0) -> None:
        """A frame from `mac` came in on `port`."""
        cdef uint64_t hash
        if not 0 <= port < FDB_PORTS_MAX:
            raise ValueError(f"port {port} is not in 0..{FDB_PORTS_MAX - 1}")
        hash = fdb_prepare(self, checked_key(mac, vlan))
        if not mac[0] & 1:
            fdb_learn(self, hash, port)


cdef uint64_t checked_key(mac, vlan) except? 0xffffffffffffffff:
    if len(mac) != 6:
        raise ValueError(f"a MAC address has 6 bytes, not {len(mac)}")
    if not 0 <= vlan < 4096:
        raise ValueError(f"VLAN {vlan} is not in 0..4095")
    cdef bytes octets = bytes(mac) + bytes(2)
    return fdb_key(vlan, <const uint8_t *><const char *>octets)
