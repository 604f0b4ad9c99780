"""The base class of ports; see `port.pxd` for the contract."""
from vhostpy.runtime.pollable cimport Conduct, Turn
from vhostpy._ring cimport Scratch


cdef class Port:
    """Where frames come from and go to; subclasses say how."""

    def __cinit__(self, name="", *_, **__):
        self.index = -1
        self.conduct = Conduct(str(name))
        self.reception = Conduct(str(name))

    cdef int receive(self, int queue, Frame *burst, int limit, Turn *turn) noexcept nogil:
        return 0

    cdef void release(self, int queue, const Frame *burst, int count) noexcept nogil:
        pass

    cdef void put_back(self, int queue, const Frame *burst, int count) noexcept nogil:
        pass

    cdef void skip(self, int queue, int count, Scratch *scratch) noexcept nogil:
        pass

    cdef int transmit(self, int queue, Frame **frames, int count, Turn *turn) noexcept nogil:
        charge(turn, frames, count)
        return count

    cdef void count_drop(self, int queue, int reason, int count) noexcept nogil:
        pass

    cdef bint arm(self, int queue) noexcept nogil:
        return False

    cdef void disarm(self, int queue) noexcept nogil:
        pass
