/* What Cython cannot say: single loads of shared memory, atomics, CPU hints.
 * Decides nothing: no branch on protocol state belongs here. */
#ifndef VHOSTPY_HW_H
#define VHOSTPY_HW_H

#include <stdint.h>
#include <string.h>
#include <time.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "rings are read in place: virtio is little-endian, and so must we be");

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* One load each: the other side may change the field at any time, and the
 * compiler must not read it twice. */
static inline uint8_t read_once_u8(const void *p)
{ return *(const volatile uint8_t *)p; }
static inline uint16_t read_once_u16(const void *p)
{ return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED); }
static inline uint32_t read_once_u32(const void *p)
{ return __atomic_load_n((const uint32_t *)p, __ATOMIC_RELAXED); }
static inline uint64_t read_once_u64(const void *p)
{ return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED); }

static inline void copy_once_16(void *to, const void *from)
{
    typedef uint64_t pair __attribute__((vector_size(16), aligned(1)));
    *(pair *)to = *(const volatile pair *)from;
}

static inline void write_once_u16(void *p, uint16_t v)
{ __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELAXED); }
static inline void write_once_u32(void *p, uint32_t v)
{ __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELAXED); }
static inline void write_once_u64(void *p, uint64_t v)
{ __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELAXED); }

/* Reads what a store_release published, and all that came before it. */
static inline uint16_t load_acquire_u16(const void *p)
{ return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE); }
static inline uint32_t load_acquire_u32(const void *p)
{ return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE); }
static inline uint64_t load_acquire_u64(const void *p)
{ return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE); }
static inline void *load_acquire_ptr(void *const *p)
{ return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

/* Publishes all stores made before it. */
static inline void store_release_u16(void *p, uint16_t v)
{ __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE); }
static inline void store_release_u32(void *p, uint32_t v)
{ __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELEASE); }
static inline void store_release_u64(void *p, uint64_t v)
{ __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE); }
static inline void store_release_ptr(void **p, void *v)
{ __atomic_store_n(p, v, __ATOMIC_RELEASE); }

/* Store, then full fence: no later load passes it. */
static inline void store_fence_u64(void *p, uint64_t v)
{ __atomic_exchange_n((uint64_t *)p, v, __ATOMIC_SEQ_CST); }

static inline void fence_full(void)
{ __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static inline void atomic_or_u8(void *p, uint8_t bits)
{ __atomic_fetch_or((uint8_t *)p, bits, __ATOMIC_SEQ_CST); }
static inline int64_t atomic_add_i64(int64_t *p, int64_t v)
{ return __atomic_add_fetch(p, v, __ATOMIC_ACQ_REL); }
/* Raises *p to `v` where it is less; returns what it is then. */
static inline int64_t atomic_max_i64(int64_t *p, int64_t v)
{
    int64_t now = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (now < v)
        if (__atomic_compare_exchange_n(p, &now, v, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            return v;
    return now;
}

static inline void cpu_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield" ::: "memory");
#endif
}

/* A spinlock of 32 bits, 0 is free. */
static inline void spin_lock(uint32_t *lock)
{
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
        while (__atomic_load_n(lock, __ATOMIC_RELAXED))
            cpu_pause();
}
static inline void spin_unlock(uint32_t *lock)
{ __atomic_store_n(lock, 0, __ATOMIC_RELEASE); }

static inline void prefetch_read(const void *p) { __builtin_prefetch(p, 0, 3); }
/* Fetches a line to own it. The builtin only reads it below -mprfchw: a store then waits
 * for the other processor once more. Processors that do not know the instruction skip it. */
static inline void prefetch_write(const void *p)
{
#if defined(__x86_64__)
    __asm__ __volatile__("prefetchw %0" :: "m"(*(const char *)p));
#else
    __builtin_prefetch(p, 1, 3);
#endif
}

static inline uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* A cheap clock of constant rate; ticks_per_us() says which. */
static inline uint64_t ticks(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t t;
    __asm__ __volatile__("mrs %0, cntvct_el0" : "=r"(t));
    return t;
#else
    return clock_ns();
#endif
}

/* spin_lock() for `limit` ticks; 0: somebody had it all the while. */
static inline int spin_lock_for(uint32_t *lock, uint64_t limit)
{
    uint64_t start;
    if (likely(!__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE)))
        return 1;
    start = ticks();
    while (ticks() - start < limit) {
        cpu_pause();
        if (!__atomic_load_n(lock, __ATOMIC_RELAXED)
            && !__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
            return 1;
    }
    return 0;
}

/* ticks() after all loads before it: by itself it may be read long before they are done. */
static inline uint64_t ticks_after_loads(void)
{
#if defined(__x86_64__)
    __builtin_ia32_lfence();
#elif defined(__aarch64__)
    __asm__ __volatile__("dsb ld\n\tisb" ::: "memory");
#endif
    return ticks();
}

/* Both clocks at one moment: of a few tries the one that nothing came between. */
static inline void read_clocks(uint64_t *ns, uint64_t *at)
{
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < 8; i++) {
        uint64_t before = ticks(), now = clock_ns(), took = ticks() - before;
        if (took < best) {
            best = took;
            *ns = now;
            *at = before + took / 2;
        }
    }
}

/* Measures for about a millisecond; call once per process. */
static inline double ticks_per_us(void)
{
    uint64_t ns0 = 0, t0 = 0, ns1 = 0, t1 = 0;
    read_clocks(&ns0, &t0);
    do { read_clocks(&ns1, &t1); } while (ns1 - ns0 < 1000000);
    return (double)(t1 - t0) * 1000.0 / (double)(ns1 - ns0);
}

#endif
