"""The ports of a switch, as workers see them: a table that does not change."""
from libc.stdlib cimport calloc


cdef PortTable *new_table(dict attached, const PortTable *old) except NULL:
    cdef int count = max(attached, default=-1) + 1
    cdef PortTable *table = <PortTable *>calloc(1, sizeof(PortTable) + count * sizeof(Place))
    cdef int index
    if table == NULL:
        raise MemoryError("port table")
    table.count = count
    table.attached = len(attached)
    for index, port in attached.items():
        table.places[index].port = <void *>port
        if old != NULL and index < old.count and old.places[index].port == <void *>port:
            table.places[index].full_since = old.places[index].full_since
    return table
