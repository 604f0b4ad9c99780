"""Mappings: a front-end's file in our address space, and what contains it when it shrinks."""
from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef int64_t MAPPED_MAX      # account.py's

cdef str size_text(uint64_t size)
# "64 MiB", for error texts.

cdef void poison(const void *hva) noexcept nogil
# A system call said EFAULT for guest memory at `hva`: marks its mapping as SIGBUS
# would. Ignores addresses that are in no mapping. Any thread.

cdef class Mapping:
    # One mmap of a front-end's fd; unmapped when the last generation that holds it goes.
    cdef uint8_t *base      # page-aligned address of the mmap
    cdef size_t mapped      # its length, a multiple of page_size
    cdef readonly uint64_t page_size
    cdef uint8_t *data      # where the region starts inside it
    cdef readonly uint64_t size
    cdef object account     # whose it is
    cdef int slot           # in the SIGBUS table; -1: none
