"""Both ends of one ring, without Python in between: what a chain costs.

`run` has both in one thread: these are instructions, and hits in caches. `serve` and `feed`
are the two ends for a thread each: then lines travel between cores.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from vhostpy.system.hw cimport load_acquire_u32, read_once_u64, ticks, write_once_u64
from vhostpy._ring cimport (
    BURST, SCRATCH_SEGMENTS, Chain, DriverVirtqueue, Scratch, UsedEntry, Virtqueue,
)
from vhostpy.memory.guest cimport Segment, translate

STEPS = ("add", "pop", "push", "collect")


cdef int around(DriverVirtqueue driver, Virtqueue device, const Segment *pieces, int shape,
                bint writable, Scratch *scratch, uint64_t *spent) noexcept nogil:
    """A burst goes round once; how many chains. `shape`: pieces of a chain, 0 for a burst."""
    cdef Chain chains[BURST]
    cdef UsedEntry used[BURST]
    cdef uint32_t written[BURST]
    cdef uint16_t ids[BURST]
    cdef uint64_t start = ticks(), now
    cdef int count = 0, i
    if shape == 0:
        count = driver.reserve(ids, BURST)
        driver.add_burst(ids, pieces, count, writable)
    else:
        for i in range(BURST):
            if writable:
                count += driver.add_chain(&pieces[shape * i], 0, shape) >= 0
            else:
                count += driver.add_chain(&pieces[shape * i], shape, 0) >= 0
    driver.publish()
    now = ticks()
    spent[0] += now - start
    start = now
    scratch.used = 0
    count = device.pop(chains, BURST, scratch)
    now = ticks()
    spent[1] += now - start
    start = now
    for i in range(count):
        written[i] = 64
    device.push(chains, written if writable else NULL, count)
    device.publish()
    now = ticks()
    spent[2] += now - start
    start = now
    i = driver.collect(used, BURST)
    spent[3] += ticks() - start
    return count if i == count else -1


def run(DriverVirtqueue driver not None, Virtqueue device not None, buffers, *, int rounds,
        int shape=0, bint writable=False) -> dict:
    """Ticks a chain for each step, over `rounds` bursts of `buffers` (GPA, length)."""
    cdef Segment pieces[8 * BURST]
    cdef Scratch scratch
    cdef uint64_t spent[4]
    cdef int i, count = 0, total = 0
    if len(buffers) < max(shape, 1) * BURST or shape > 8:
        raise ValueError(f"{len(buffers)} buffers for chains of {shape}")
    for i in range(max(shape, 1) * BURST):
        pieces[i].gpa, pieces[i].length = buffers[i]
    scratch.used, scratch.limit = 0, SCRATCH_SEGMENTS
    scratch.segments = <Segment *>malloc(SCRATCH_SEGMENTS * sizeof(Segment))
    if scratch.segments == NULL:
        raise MemoryError
    for i in range(4):
        spent[i] = 0
    with nogil:
        for _ in range(rounds):
            count = around(driver, device, pieces, shape, writable, &scratch, spent)
            if count < 0:
                break
            total += count
    free(scratch.segments)
    if count < 0:
        raise RuntimeError(f"after {total} chains: a burst got lost")
    result = {name: spent[i] / <double>max(total, 1) for i, name in enumerate(STEPS)}
    return result | {"chains": total}


cdef void touch(Chain *chains, int count, uint64_t *sum) noexcept nogil:
    # As a frame's first bytes are read.
    cdef int i
    for i in range(count):
        sum[0] += read_once_u64(chains[i].segments[0].hva)


def serve(Virtqueue device not None, uint32_t[::1] stop, *, bint touched=False) -> dict:
    """The device's end, for a thread of its own: takes and gives back until `stop[0]`."""
    cdef Chain chains[BURST]
    cdef Scratch scratch
    cdef uint64_t spent = 0, total = 0, polls = 0, idle = 0, sum = 0, start
    cdef uint32_t *stopped = &stop[0]
    cdef uint32_t quarter = device.size() // 4
    cdef int count = 0
    scratch.used, scratch.limit = 0, SCRATCH_SEGMENTS
    scratch.segments = <Segment *>malloc(SCRATCH_SEGMENTS * sizeof(Segment))
    if scratch.segments == NULL:
        raise MemoryError
    with nogil:
        while not load_acquire_u32(stopped) and count >= 0:
            start = ticks()
            scratch.used = 0
            count = device.pop(chains, BURST, &scratch)
            if count > 0:
                if touched:
                    touch(chains, count, &sum)
                device.push(chains, NULL, count)
                if device.unpublished() >= quarter:
                    device.publish()
                spent += ticks() - start
                total += count
                polls += 1
            else:
                device.publish()
                idle += ticks() - start
    free(scratch.segments)
    return {
        "device_cycles": spent / <double>max(total, <uint64_t>1),
        "chains_per_poll": total / <double>max(polls, <uint64_t>1),
        "busy_share": spent / <double>(spent + idle),
        "sum": sum,                              # or the compiler would read nothing
    }


def feed(DriverVirtqueue driver not None, *, uint64_t first, uint32_t stride,
         uint64_t chains, bint touched=False) -> float:
    """The driver's end: keeps its ring full until so many chains came back; ticks a chain.

    An id's buffer of 64 bytes is `stride` from the next; those that came back last are used
    first. Where `touched`, its first bytes are written each time.
    """
    cdef Segment pieces[BURST]
    cdef Segment whole
    cdef UsedEntry used[BURST]
    cdef uint16_t ids[BURST]
    cdef uint32_t hint = 0, i
    cdef uint64_t back = 0, start
    cdef int count = 0
    if translate(&driver.memory.map, first, <uint64_t>stride * driver.ring.size, &whole, 1,
                 &hint) != 1:
        raise ValueError(
            f"{driver.ring.size} buffers from {first:#x} on are not in one region")
    with nogil:
        start = ticks()
        while back < chains and count >= 0:
            count = driver.reserve(ids, BURST)
            for i in range(<uint32_t>count):
                pieces[i].gpa = first + stride * ids[i]
                pieces[i].length = 64
                if touched:
                    write_once_u64(whole.hva + stride * ids[i], back + i)
            driver.add_burst(ids, pieces, count, False)
            driver.publish()
            count = driver.collect(used, BURST)
            back += max(count, 0)
        start = ticks() - start
    if count < 0:
        raise RuntimeError("the device gave back what it did not have")
    return start / <double>back
