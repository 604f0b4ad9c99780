"""Frames that control sends in the name of a port.

Control may not write to receive queues: those are the workers'. It leaves its frames
here, and a worker takes them as if that port had sent them, so that the switch learns
from them and floods them as it does with any other.
"""
import os

cimport cython
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from vhostpy.runtime.pollable cimport Turn
from vhostpy.system.hw cimport load_acquire_u32, store_release_u32
from vhostpy.vswitch.port cimport ETHERNET_HEADER, SNAPSHOT, Frame, Port
from vhostpy._ring cimport Scratch
from vhostpy.memory.guest cimport Segment

cdef enum:
    SLOTS = 64             # a power of two
    SLOT_BYTES = 124

cdef struct Slot:
    uint32_t length
    uint8_t data[SLOT_BYTES]


def rarp_frame(mac: bytes) -> bytes:
    """The broadcast that tells switches and hosts where `mac` is now (RFC 903).

    A reverse request for its own address, padded to the shortest Ethernet frame: what
    QEMU itself sends after a migration where the guest can't announce itself.
    """
    request = b"\x00\x01" b"\x08\x00" b"\x06\x04" b"\x00\x03" + (mac + bytes(4)) * 2
    return (b"\xff" * 6 + mac + b"\x80\x35" + request).ljust(60, b"\0")


@cython.final
cdef class Injector(Port):
    """A port without a guest: `index` is that of the port in whose name it sends."""

    def __cinit__(self, name, index):
        self.name = name
        self.index = index
        self.slots = <Slot *>calloc(SLOTS, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError("injector")

        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        free(self.slots)

    def close(self) -> None:
        """Called when no worker polls it any more."""
        if self.kick_fd >= 0:
            os.close(self.kick_fd)
            self.kick_fd = -1

    def put(self, frame: bytes) -> bool:
        """Leaves a frame for the worker; False: it has not taken the last 64 yet."""
        cdef bytes data = bytes(frame)
        cdef const char *start = data
        cdef Slot *slot = &self.slots[self.written % SLOTS]
        if not ETHERNET_HEADER <= len(data) <= SLOT_BYTES:
            raise ValueError(f"{len(data)} bytes, expected {ETHERNET_HEADER}..{SLOT_BYTES}")
        # Pairs with release().
        if self.written - load_acquire_u32(&self.released) >= SLOTS:
            return False
        slot.length = len(data)
        memcpy(slot.data, start, slot.length)
        # Pairs with receive().
        store_release_u32(&self.written, self.written + 1)
        os.eventfd_write(self.kick_fd, 1)
        return True

    cdef int receive(self, int queue, Frame *burst, int limit, Turn *turn) noexcept nogil:
        cdef Scratch *scratch = turn.scratch
        cdef uint32_t written = load_acquire_u32(&self.written)
        cdef int count = 0
        while count < limit and self.taken != written and scratch.used < scratch.limit:
            self.view(&self.slots[self.taken % SLOTS], &burst[count], scratch)
            self.taken += 1
            count += 1
        return count

    cdef void view(self, Slot *slot, Frame *frame, Scratch *scratch) noexcept nogil:
        cdef Segment *segment = &scratch.segments[scratch.used]
        scratch.used += 1
        segment.hva = slot.data
        segment.gpa = 0
        segment.length = slot.length
        memset(frame, 0, sizeof(Frame))
        memcpy(frame.head, slot.data, min(slot.length, <uint32_t>SNAPSHOT))
        frame.segments = segment
        frame.count = 1
        frame.length = slot.length

    cdef void release(self, int queue, const Frame *burst, int count) noexcept nogil:
        store_release_u32(&self.released, self.released + <uint32_t>count)

    cdef void put_back(self, int queue, const Frame *burst, int count) noexcept nogil:
        self.taken -= count

    cdef bint arm(self, int queue) noexcept nogil:
        # The kick comes after the frame, and is there for as long as nobody reads it.
        return load_acquire_u32(&self.written) != self.taken
