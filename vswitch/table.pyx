"""The ports of a switch, as workers see them: a table that does not change."""
cimport cython
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from vhostpy.system.hw cimport store_release_ptr
from vhostpy.runtime.pool cimport Workers


cdef PortTable *new_table(dict attached, const PortTable *old) except NULL:
    """Of index -> Port; `old` hands on which ports were full."""
    cdef int count = max(attached, default=-1) + 1
    cdef size_t places = sizeof(PortTable) + count * sizeof(Place)
    cdef PortTable *table = <PortTable *>calloc(1, places + (count + 63) // 64 * sizeof(uint64_t))
    cdef int index
    if table == NULL:
        raise MemoryError("port table")
    table.count = count
    table.attached = len(attached)
    table.everyone = <uint64_t *>(<char *>table + places)
    for index, port in attached.items():
        table.places[index].port = <void *>port
        table.everyone[index // 64] |= <uint64_t>1 << index % 64
        if old != NULL and index < old.count and old.places[index].port == <void *>port:
            table.places[index].full_since = old.places[index].full_since
    return table


@cython.final
cdef class Ports:
    """Those of one switch."""

    def __cinit__(self, Workers workers not None):
        self.workers = workers
        self.table = new_table({}, NULL)

    def __dealloc__(self):
        free(self.table)

    cdef int publish(self, dict attached) except -1:
        cdef PortTable *old = self.table
        cdef PortTable *new = new_table(attached, old)
        # Pairs with Forwarder.poll().
        store_release_ptr(<void **>&self.table, new)
        self.workers.wait()
        free(old)
        return 0
