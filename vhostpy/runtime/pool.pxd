"""Worker threads: all of them, who polls what, quiescence.

Whoever is polled finds all that it needs here.
"""
from vhostpy.runtime.pollable cimport BUDGET_BYTES, BUDGET_FRAMES, BUDGET_STEPS, Pollable, Turn
from vhostpy.runtime.worker cimport Table, Worker

cdef class Workers:
    # All workers of the process: one quiescence domain.
    cdef object __weakref__
    cdef readonly list workers
    cdef readonly str poll
    cdef readonly int bell_fd      # eventfd by which workers wake control
    cdef void **members                 # the same, without the GIL
    cdef int count
    cdef readonly int regular           # the first so many; behind them the one apart, if there is
    cdef object lock
    cdef int pid
    cdef bint running
    cdef Worker quarantine(self)
    cdef free_unused(self, Table *old)
    cdef void wait_quiescent(self) noexcept nogil
    cdef void sound_bell(self) noexcept nogil
