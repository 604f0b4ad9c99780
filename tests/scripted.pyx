"""A port that is no guest: sends frames that a test made, in a VLAN; charges output dearly."""
cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from vhostpy.memory.guest cimport Segment
from vhostpy.runtime.pollable cimport Turn
from vhostpy.vswitch.port cimport SNAPSHOT, Frame, Port

cdef enum:
    FRAMES = 64
    HEADER = 14


@cython.final
cdef class ScriptedPort(Port):
    """What it sends: an Ethernet header in the turn's bytes, then a view of the payload."""
    cdef list sending          # payload bytes stay alive here
    cdef uint8_t *payloads[FRAMES]
    cdef uint32_t lengths[FRAMES]
    cdef uint8_t headers[FRAMES][HEADER]
    cdef int vlans[FRAMES]
    cdef int there, taken
    cdef readonly int released
    cdef readonly int received     # frames that it got
    cdef readonly int calls        # of transmit()
    cdef public int segments       # into so many, of 100 bytes each, it cuts every frame
    cdef public int steps          # and so much a call costs

    def __init__(self, name):
        self.sending = []
        self.segments = 1

    def send(self, frame: bytes, int vlan=0) -> None:
        cdef bytes payload = frame[HEADER:]
        cdef bytes header = frame[:HEADER]
        cdef int i = len(self.sending)
        if i == FRAMES:
            raise ValueError(f"more than {FRAMES} frames")
        self.payloads[i] = <uint8_t *><char *>payload
        self.lengths[i] = <uint32_t>len(payload)
        memcpy(self.headers[i], <char *>header, HEADER)
        self.vlans[i] = vlan
        self.sending.append(payload)
        self.there = i + 1

    cdef int receive(self, int queue, Frame *burst, int limit, Turn *turn) noexcept nogil:
        cdef Segment *segments
        cdef Frame *frame
        cdef uint8_t *header
        cdef int count = 0
        while count < limit and self.taken < self.there:
            frame = &burst[count]
            segments = &turn.scratch.segments[turn.scratch.used]
            header = turn.scratch.bytes + turn.scratch.bytes_used
            memcpy(header, self.headers[self.taken], HEADER)
            segments[0].hva, segments[0].length = header, HEADER
            segments[1].hva = self.payloads[self.taken]
            segments[1].length = self.lengths[self.taken]
            turn.scratch.used += 2
            turn.scratch.bytes_used += HEADER
            memset(frame, 0, sizeof(Frame))
            frame.segments = segments
            frame.count = 2
            frame.length = HEADER + segments[1].length
            frame.vlan = <uint16_t>self.vlans[self.taken]
            memcpy(frame.head, header, HEADER)
            memcpy(frame.head + HEADER, segments[1].hva,
                   min(segments[1].length, <uint32_t>(SNAPSHOT - HEADER)))
            self.taken += 1
            count += 1
        return count

    cdef void release(self, int queue, const Frame *burst, int count) noexcept nogil:
        self.released += count

    cdef void put_back(self, int queue, const Frame *burst, int count) noexcept nogil:
        self.taken -= count

    cdef int transmit(self, int queue, Frame **frames, int count, Turn *turn) noexcept nogil:
        self.calls += 1
        self.received += count
        turn.frames -= count * self.segments
        turn.bytes -= count * self.segments * 100
        turn.steps -= self.steps
        return count
