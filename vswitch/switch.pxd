"""The learning switch: which port gets a frame.

Decides on a frame's snapshot; moves bursts between ports; copies nothing itself.
"""
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from vhostpy._port cimport Frame, Port
from vhostpy._ring cimport Scratch
from vhostpy.worker cimport Pollable, Turn, Workers
from vhostpy.vswitch.fdb cimport ForwardingTable

cdef struct PortTable:
    # Immutable once published; freed after every worker has passed a quiescent point.
    int count              # indexes 0..count-1; a hole is NULL
    void *ports[1]         # borrowed Port references; `Switch.attached` keeps them alive

cdef class Switch:
    cdef readonly object name
    cdef readonly ForwardingTable fdb
    cdef readonly Workers workers
    cdef PortTable *table
    cdef readonly dict attached      # index -> Port
    cdef dict forwarders             # (port index, queue) -> Forwarder
    cdef uint64_t full_wait_ticks

cdef class Forwarder(Pollable):
    # One transmit queue of one port: receives its frames and forwards them.
    cdef Switch switch
    cdef Port port
    cdef int queue
