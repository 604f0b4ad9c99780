"""Frames as views of the chains that a guest sends: any chain, and the bad ones."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from vhostpy.vswitch.port cimport ETHERNET_HEADER, Drop, Frame, NetHeader
from vhostpy._ring cimport Chain
from vhostpy.backends.net.copy cimport take_snapshot
from vhostpy.memory.guest cimport Segment

assert sizeof(Frame) == 64 and sizeof(NetHeader) == 10


cdef inline int refuse(Frame *frame, int reason) noexcept nogil:
    frame.fault = <uint16_t>(reason + 1)
    frame.segments = NULL
    frame.count = 0
    frame.length = 0
    return 0


cdef void view(Chain *chain, Frame *frame, uint32_t skip, bint enabled) noexcept nogil:
    cdef Segment *segment = chain.segments
    frame.cookie = (<uint32_t *>&chain.id)[0]
    frame.fault = frame.vlan = 0
    # No offload is negotiated: what the header says means nothing.
    memset(&frame.header, 0, sizeof(NetHeader))
    if not enabled:
        refuse(frame, Drop.DROP_DISABLED)
        return
    if chain.fault:
        refuse(frame, Drop.DROP_BAD_CHAIN)
        frame.head[0] = <uint8_t>chain.fault     # for release(), which counts it
        return
    # Writable parts are of no use here, and not touched.
    if chain.readable_bytes < skip + ETHERNET_HEADER:
        refuse(frame, Drop.DROP_TOO_SHORT)
        return
    frame.length = chain.readable_bytes - skip
    if frame.length > FRAME_MAX:
        refuse(frame, Drop.DROP_TOO_LONG)
        return
    frame.count = chain.readable
    # The header may be cut anywhere (CVE-2022-2132).
    while skip >= segment.length:
        skip -= segment.length
        segment += 1
        frame.count -= 1
    segment.hva += skip
    segment.gpa += skip
    segment.length -= skip
    frame.segments = segment
    take_snapshot(frame)
