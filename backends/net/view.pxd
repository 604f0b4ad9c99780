"""Frames as views of the chains that a guest sends."""
from libc.stdint cimport uint32_t, uint64_t
from vhostpy.system.hw cimport unlikely
from vhostpy.vswitch.port cimport ETHERNET_HEADER, SNAPSHOT, Frame
from vhostpy._ring cimport Chain
from vhostpy.backends.net.copy cimport snapshot_whole
from vhostpy.memory.guest cimport Segment

cdef enum:
    # An IPv4 packet of 65,535 bytes behind an Ethernet header with two VLAN tags: the
    # longest that a guest's stack can build. It bounds what one frame may cost.
    FRAME_MAX = 65535 + ETHERNET_HEADER + 8

cdef void view(Chain *chain, Frame *frame, uint32_t skip, bint enabled) noexcept nogil
# Makes a frame of a chain: what follows the virtio-net header of `skip` bytes.


cdef inline bint view_whole(Chain *chain, Frame *frame, uint32_t skip) noexcept nogil:
    """The usual chain: one piece, header of `skip` bytes included, as long as the snapshot.

    False: nothing was done, ask view().
    """
    cdef Segment *segment = chain.segments
    cdef uint32_t length
    if unlikely(chain.readable != 1):        # no segment, perhaps
        return False
    length = segment.length - skip           # huge when shorter
    if unlikely(length - SNAPSHOT > <uint32_t>(FRAME_MAX - SNAPSHOT)):
        return False
    segment.hva += skip
    segment.gpa += skip
    segment.length = length
    frame.segments = segment
    # With `count` 1 and no fault; the cookie, which is id and slots, with no offloads or VLAN.
    (<uint64_t *>&frame.length)[0] = length | <uint64_t>1 << 32
    (<uint64_t *>&frame.cookie)[0] = (<uint32_t *>&chain.id)[0]
    (<uint64_t *>&frame.cookie)[1] = 0
    snapshot_whole(frame, segment.hva)
    return True
