"""A forwarder and the drivers of both its guests in one thread: what a frame costs.

These are instructions, and hits in caches: no line travels between cores.
"""
from libc.stdint cimport uint16_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vhostpy.ring.chain cimport scratch_free, scratch_make
from vhostpy.system.hw cimport ticks
from vhostpy._ring cimport BURST, DriverVirtqueue, Scratch, UsedEntry
from vhostpy.memory.guest cimport Segment
from vhostpy.vswitch.forwarder cimport Forwarder
from vhostpy.runtime.pool cimport BUDGET_BYTES, BUDGET_FRAMES, BUDGET_STEPS, Turn


cdef void around(DriverVirtqueue driver, const Segment *pieces, bint writable) noexcept nogil:
    """A burst of chains comes back, and is offered again."""
    cdef UsedEntry used[BURST]
    cdef uint16_t ids[BURST]
    driver.collect(used, BURST)
    driver.add_burst(ids, pieces, driver.reserve(ids, BURST), writable)
    driver.publish()


def run(Forwarder forwarder not None, DriverVirtqueue sender not None,
        DriverVirtqueue receiver not None, frames, buffers, *, int bursts) -> list:
    """Ticks a frame of each burst of `frames`, which are (GPA, length) in whole bursts."""
    cdef int sets = len(frames) // BURST, i
    cdef Segment *pieces = <Segment *>calloc(sets * BURST, sizeof(Segment))
    cdef uint64_t *spent = <uint64_t *>calloc(bursts, sizeof(uint64_t))
    cdef Segment rooms[BURST]
    cdef Scratch scratch
    cdef Turn turn
    scratch_make(&scratch)
    memset(&turn, 0, sizeof(turn))
    turn.scratch = &scratch
    try:
        for i in range(sets * BURST):
            pieces[i].gpa, pieces[i].length = frames[i]
        for i in range(BURST):
            rooms[i].gpa, rooms[i].length = buffers[i]
        with nogil:
            for i in range(bursts):
                around(receiver, rooms, True)
                around(sender, &pieces[i % sets * BURST], False)
                turn.frames, turn.bytes = BUDGET_FRAMES, BUDGET_BYTES
                turn.steps = BUDGET_STEPS
                turn.now = ticks()
                forwarder.poll(&turn)
                spent[i] = ticks() - turn.now
        return [spent[i] / <double>BURST for i in range(bursts)]
    finally:
        free(pieces)
        free(spent)
        scratch_free(&scratch)
