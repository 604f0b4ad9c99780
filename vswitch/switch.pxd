"""The learning switch: its ports, what they have learned, and the forwarders between them."""
cimport cython
from libc.stdint cimport uint64_t
from vhostpy.vswitch.port cimport Port
from vhostpy.runtime.pool cimport Workers
from vhostpy.vswitch.table cimport Ports
from vhostpy.vswitch.fdb cimport ForwardingTable
from vhostpy.vswitch.forwarder cimport Forwarder


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
    cdef Forwarder forward(self, Port port, int queue, int kick_fd)
    cdef int close_injector(self, index) except -1
