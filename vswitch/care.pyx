"""Care with slow memory: a forwarder whose poll was blocked finds out whose memory it was."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy

from vhostpy.runtime.pollable cimport Conduct, Turn
from vhostpy.system.hw cimport ticks, write_once_u32
from vhostpy.vswitch.port cimport Frame, Port
from vhostpy._ring cimport BURST

cdef enum:
    COPY_MAX = 65536 + 64  # what a copied frame may be long
    CAREFUL_STALLS = 10    # care lasts for so many times as long as the poll was blocked


cdef bint care_begin(Care *care, Turn *turn) noexcept nogil:
    if not turn.apart and turn.now > care.until:
        care.until = 0
        return False
    if care.copies == NULL:
        care.copies = <uint8_t *>malloc(BURST * COPY_MAX)    # most of it is never touched
        if care.copies == NULL:
            return False
    care.on = True
    care.step_at = turn.now
    care.slowest = 0
    care.slowest_port = NULL
    return True


cdef void care_copy(Care *care, Frame *burst, int count) noexcept nogil:
    cdef Frame *frame
    cdef uint8_t *to
    cdef uint32_t done, j
    cdef int i
    for i in range(count):
        frame = &burst[i]
        if frame.fault or frame.length > COPY_MAX:
            continue
        to = care.copies + i * COPY_MAX
        done = 0
        for j in range(frame.count):
            memcpy(to + done, frame.segments[j].hva, frame.segments[j].length)
            done += frame.segments[j].length
        frame.segments[0].hva = to
        frame.segments[0].length = frame.length
        frame.count = 1
    care_step(care, NULL)


cdef void care_step(Care *care, void *port) noexcept nogil:
    cdef uint64_t now = ticks()
    if now - care.step_at > care.slowest:
        care.slowest = now - care.step_at
        care.slowest_port = port
    care.step_at = now


cdef bint care_passes_over(Care *care, Port port, uint64_t now) noexcept nogil:
    if now < port.reception.until:
        return True
    if not care.on:
        care.until = now + (port.reception.span >> 7) + 1
        return True
    write_once_u32(&port.slow, 0)
    return False


cdef bint care_stalled(Care *care, Conduct sender, uint64_t since, uint64_t end) noexcept nogil:
    # The second time: the first says nothing.
    cdef void *port = care.slowest_port
    if care.until < end:
        care.until = end
    care.until = max(care.until, end + CAREFUL_STALLS * (end - since))
    if not care.on:
        return False
    if port == NULL or end - care.step_at > care.slowest:
        sender.strike(since, end)
        return True
    (<Port>port).reception.strike(end - care.slowest, end)
    write_once_u32(&(<Port>port).slow, 1)
    return False
