"""A second vCPU: a thread that writes to guest memory while somebody reads it."""
import threading

from libc.stdint cimport uint32_t, uint64_t

from vhostpy.system.hw cimport cpu_pause, load_acquire_u32, store_release_u32, write_once_u64

cdef enum:
    WORDS = 16
    PAUSES = 20         # about what the other end takes for a few descriptors


cdef class Flipper:
    """Writes two values in turn to each of its words while the block runs.

    `words`: (memory, GPA, one value, the other value), of 8 bytes each and aligned to them.
    """
    cdef uint64_t *places[WORDS]
    cdef uint64_t values[WORDS][2]
    cdef int count
    cdef uint32_t stopping
    cdef object thread, memories

    def __init__(self, *words):
        if len(words) > WORDS:
            raise ValueError(f"{len(words)} words, at most {WORDS}")
        self.memories = [memory for memory, *_ in words]
        for memory, gpa, first, second in words:
            ((hva, _),) = memory.translate(gpa, 8)
            self.places[self.count] = <uint64_t *><uint64_t>hva
            self.values[self.count] = [first, second]
            self.count += 1

    def __enter__(self):
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def __exit__(self, *_):
        store_release_u32(&self.stopping, 1)
        self.thread.join()

    def run(self):
        cdef int value, i
        with nogil:
            while not load_acquire_u32(&self.stopping):
                for value in range(2):
                    for i in range(self.count):
                        write_once_u64(self.places[i], self.values[i][value])
                    for _ in range(PAUSES):
                        cpu_pause()
