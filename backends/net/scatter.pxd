"""A frame of any pieces, written to any number of chains: the way of frames that
`write_whole` is not for."""
from libc.stdint cimport uint32_t
from vhostpy.vswitch.port cimport Frame
from vhostpy._ring cimport Chain, Virtqueue

cdef void spread(const Frame *frame, uint32_t header_size, const Chain *chains,
                 uint32_t *written, int count) noexcept nogil
# Header and frame, to `count` chains that are known to hold them; `written`: bytes of each.
cdef void log_spread(Virtqueue virtqueue, const Chain *chains, const uint32_t *written,
                     int count) noexcept nogil
# Tells the dirty log what was written, to the byte.
