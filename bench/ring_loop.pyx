"""Both ends of one ring in one thread, without Python in between: what a chain costs.

No other core takes part: these are instructions, and hits in caches. What a line costs that
another core has just written is measured elsewhere.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from vhostpy._hw cimport load_acquire_u32, read_once_u64, ticks, write_once_u64
from vhostpy._ring cimport (
    BURST, SCRATCH_SEGMENTS, Chain, DriverVirtqueue, Scratch, UsedEntry, Virtqueue,
)
from vhostpy.memory cimport Segment, translate

STEPS = ("add", "pop", "push", "collect")


cdef int around(DriverVirtqueue driver, Virtqueue device, const Segment *pieces, int shape,
                bint writable, Scratch *scratch, uint64_t *spent) noexcept nogil:
    """A burst goes round once; how many chains. `shape`: pieces of a chain, 0 for a burst."""
    cdef Chain chains[BURST]
    cdef UsedEntry used[BURST]
    cdef uint32_t written[BURST]
    cdef uint64_t start = ticks(), now
    cdef int count = 0, i
    if shape == 0:
        count = driver.add_burst(pieces, BURST, writable, NULL)
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
        for i in range(rounds):
            count = around(driver, device, pieces, shape, writable, &scratch, spent)
            if count < 0:
                break
            total += count
    free(scratch.segments)
    if count < 0:
        raise RuntimeError(f"round {i}: chains got lost")
    return {name: spent[i] / <double>max(total, 1) for i, name in enumerate(STEPS)} | {"chains": total}


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
    return {"cycles": spent / <double>max(total, <uint64_t>1), "chains": total,
            "chains_per_poll": total / <double>max(polls, <uint64_t>1),
            "busy": spent / <double>(spent + idle), "sum": sum}


def feed(DriverVirtqueue driver not None, *, uint64_t first, uint32_t stride,
         uint64_t chains, bint touched=False) -> int:
    """The driver's end: keeps its ring full until so many chains came back; ticks it took.

    Each id has its own buffer of 64 bytes, `stride` apart from `first` on; where `touched`,
    its first bytes are written each time.
    """
    cdef Segment pieces[BURST]
    cdef UsedEntry used[BURST]
    cdef uint16_t *spare = <uint16_t *>malloc(65536 * sizeof(uint16_t))
    cdef uint16_t *place = <uint16_t *>malloc(65536 * sizeof(uint16_t))
    cdef uint16_t ids[BURST]
    cdef uint8_t *memory
    cdef uint64_t back = 0, start
    cdef uint32_t free_count = driver.ring.size, i
    cdef Segment whole
    cdef uint32_t hint = 0
    cdef int count = 0, added
    if translate(&driver.memory.map, first, <uint64_t>stride * driver.ring.size, &whole, 1,
                 &hint) != 1:
        raise ValueError("buffers must lie in one region")
    memory = whole.hva
    for i in range(free_count):
        spare[i] = <uint16_t>i
    with nogil:
        start = ticks()
        while back < chains and count >= 0:
            added = min(<int>BURST, <int>free_count)
            for i in range(<uint32_t>added):
                place[0] = spare[free_count - 1 - i]
                pieces[i].gpa = first + stride * place[0]
                pieces[i].length = 64
                if touched:
                    write_once_u64(memory + stride * place[0], back + i)
            added = driver.add_burst(pieces, added, False, ids)
            for i in range(<uint32_t>added):
                place[1 + ids[i]] = spare[free_count - 1 - i]
            free_count -= added
            driver.publish()
            count = driver.collect(used, BURST)
            for i in range(<uint32_t>max(count, 0)):
                spare[free_count + i] = place[1 + used[i].id]
            free_count += max(count, 0)
            back += max(count, 0)
        start = ticks() - start
    free(spare)
    free(place)
    if count < 0:
        raise RuntimeError("the device gave back what it did not have")
    return start
