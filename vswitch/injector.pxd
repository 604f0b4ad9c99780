"""Frames that control sends in the name of a port."""
from libc.stdint cimport uint8_t, uint32_t
from vhostpy.vswitch.port cimport Frame, Port
from vhostpy._ring cimport Scratch

cdef struct Slot           # private to injector.pyx

cdef class Injector(Port):
    cdef Slot *slots
    cdef readonly int kick_fd
    cdef uint32_t written        # control's; counts up, and wraps
    cdef uint32_t taken          # the worker's
    cdef uint32_t released       # the worker's, read by control
    cdef void view(self, Slot *slot, Frame *frame, Scratch *scratch) noexcept nogil
