"""The learning switch: its ports, what they have learned, and the forwarders between them."""
cimport cython
from libc.stdint cimport uint64_t
from vhostpy.worker cimport Workers
from vhostpy.vswitch._table cimport Ports
from vhostpy.vswitch.fdb cimport ForwardingTable


@cython.final
cdef class Switch:
    cdef readonly object name
    cdef readonly ForwardingTable fdb
    cdef readonly Workers workers
    cdef Ports ports
    cdef readonly dict attached      # index -> Port
    cdef dict forwarders             # (port index, queue) -> Forwarder
    cdef dict injectors              # port index -> Forwarder of its Injector
    cdef readonly uint64_t full_wait_ticks
    cdef readonly uint64_t hold_ticks
    cdef int close_injector(self, index) except -1
