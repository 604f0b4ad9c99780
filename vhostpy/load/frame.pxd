"""What the packet generator's frames hold.

From the virtio header on (which is 12 bytes: VERSION_1 is always negotiated):

    12 destination, 18 source, 24 type, 26 stream, 28 flow, 32 sequence, 40 stamp, 48 size

so that all that is written and read of a frame in `Touch.HEADER` lies in its first cache
line. A stream is a sending queue pair; a flow is a pair of MAC addresses in it. The payload
is a part of one template that all frames share, and its place there is the sequence's.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from vhostpy.system.hw cimport write_once_u32, write_once_u64
from vhostpy.memory.guest cimport Segment

cdef enum:
    AT_BUFFERS = 10         # num_buffers of the virtio header
    AT_FRAME = 12
    AT_ADDRESSES = 16       # behind the destination's first four bytes
    AT_TYPE = 24
    AT_SEQUENCE = 32
    AT_STAMP = 40
    AT_SIZE = 48
    AT_PAYLOAD = 52

    OURS = 0xB588           # 0x88B5, IEEE 802: "Local Experimental", on the wire
    PRIME = 0xB688          # 0x88B6, the other one: teaches a switch where a MAC is

    SHORT = 60              # the shortest frame, checksum excluded
    FRAME_LIMIT = 65535 + 14 + 8
    TEMPLATES = 256         # places that a payload can start at
    TEMPLATE_BYTES = FRAME_LIMIT + TEMPLATES

cdef struct Header:
    # What differs from frame to frame.
    uint64_t destination
    uint64_t source
    uint64_t kind           # type, stream and flow
    uint64_t sequence
    uint64_t stamp
    uint32_t size           # of the frame, virtio header excluded


cdef inline uint64_t station(uint32_t port, uint32_t flow) noexcept nogil:
    """The MAC address of a port's station number `flow`; its first byte is the lowest."""
    return (0x7602 | <uint64_t>(port >> 8 & 0xff) << 16 | <uint64_t>(port & 0xff) << 24
            | <uint64_t>(flow >> 8 & 0xff) << 32 | <uint64_t>(flow & 0xff) << 40)


cdef inline uint64_t kind_of(uint16_t type, uint16_t stream, uint32_t flow) noexcept nogil:
    return type | <uint64_t>stream << 16 | <uint64_t>flow << 32


cdef inline void write_header(uint8_t *at, const Header *header) noexcept nogil:
    write_once_u64(at, 0)
    write_once_u32(at + 8, 0)
    write_once_u32(at + AT_FRAME, <uint32_t>header.destination)
    write_once_u64(at + AT_ADDRESSES, header.destination >> 32 | header.source << 16)
    write_once_u64(at + AT_TYPE, header.kind)
    write_once_u64(at + AT_SEQUENCE, header.sequence)
    write_once_u64(at + AT_STAMP, header.stamp)
    write_once_u32(at + AT_SIZE, header.size)


cdef inline void write_payload(const Segment *pieces, int count, const uint8_t *template,
                               uint64_t sequence) noexcept nogil:
    """All of a frame behind its header, in so many pieces."""
    cdef const uint8_t *source = template + sequence % TEMPLATES
    cdef uint32_t offset = AT_PAYLOAD, step
    cdef int i
    for i in range(count):
        step = pieces[i].length - offset
        memcpy(pieces[i].hva + offset, source, step)
        source += step
        offset = 0


cdef inline bint is_payload(const uint8_t *at, uint32_t length, uint64_t place,
                            const uint8_t *template) noexcept nogil:
    """Whether these bytes are the template's at `place`."""
    return place + length <= TEMPLATE_BYTES and memcmp(at, template + place, length) == 0
