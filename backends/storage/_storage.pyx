"""Base classes of storages; see `_storage.pxd` for the contract."""


cdef class Storage:
    """What a disk is made of; subclasses say how."""

    def channel(self) -> "Channel":
        """A new queue into this storage, for one worker's use."""
        raise NotImplementedError

    def close(self) -> None:
        """Releases what the storage holds; every channel is closed before."""


cdef class Channel:
    """One user's queue into a storage."""

    def __cinit__(self):
        self.completion_fd = -1

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        return 0

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        return 0

    cdef bint arm(self) noexcept nogil:
        return False

    cdef void disarm(self) noexcept nogil:
        pass

    def close(self) -> None:
        """Called when no request is under way."""
