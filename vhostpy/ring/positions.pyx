"""Where packed rings stand, in a file of ours: for whoever comes after a kill or a stop.

Nothing in a packed ring's memory tells where its next used descriptor belongs, and a
front-end that has not asked does not know. So a network device's worker stores, with each
publish, from where to where it went: one plain store to a mapped page of this file, before
the driver can see what was published. The next process finds it by the file that the guest's
memory is in and the ring's address there, and believes it where the ring agrees (`resume`).

The file is private to the user, in a directory that nobody else can write to, and new in each
life. Each owner (a socket) has entries of its own: one guest's many rings push out nobody
else's. Knows no ring.
"""
import contextlib
import fcntl
import mmap
import os
import stat
import zlib

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.string cimport memset

from vhostpy.system.hw cimport read_once_u32, store_release_u32, write_once_u32

from vhostpy.errors import ConfigError

assert sizeof(Entry) == 64

cdef enum:
    HEADER = 64

MAGIC = b"vhostpy positions 1\n".ljust(HEADER, b"\0")
FILE_MAX = 64 << 20
LIVES = 2       # entries for each ring that an owner may have: of those that run, and of before


cdef class KeptPosition:
    """A ring's entry. `found`: what the last life left there, as (from, to), or None."""

    def __init__(self):
        raise TypeError("claimed from an Owner")

    def start(self, position: int) -> None:
        """The ring runs from there on, and its worker stores each publish."""
        write_once_u32(&self.entry.pair, <uint32_t>position << 16 | <uint32_t>position)
        store_release_u32(&self.entry.valid, 1)

    def forget(self) -> None:
        """Who comes next hears of nothing: the front-end has been told."""
        store_release_u32(&self.entry.valid, 0)

    def move(self, file: tuple[int, int], gpa: int) -> None:
        """The same ring, in other memory."""
        if (self.entry.device, self.entry.inode, self.entry.gpa) == (*file, gpa):
            return
        valid = self.entry.valid
        store_release_u32(&self.entry.valid, 0)
        self.entry.device, self.entry.inode = file
        self.entry.gpa = gpa
        store_release_u32(&self.entry.valid, valid)

    @property
    def at(self) -> tuple[int, int]:
        """What the file says now."""
        cdef uint32_t pair = read_once_u32(&self.entry.pair)
        return pair >> 16, pair & 0xffff


@cython.final
cdef class Table:
    """The mapped file's entries; unmapped with the last position in it."""

    cdef Py_buffer buffer
    cdef Entry *entries
    cdef Py_ssize_t count
    cdef uint64_t age       # of the next claim

    def __cinit__(self, memory):
        PyObject_GetBuffer(memory, &self.buffer, PyBUF_WRITABLE)
        self.entries = <Entry *>(<char *>self.buffer.buf + HEADER)
        self.count = (self.buffer.len - HEADER) // <Py_ssize_t>sizeof(Entry)

    def __dealloc__(self):
        if self.entries != NULL:
            PyBuffer_Release(&self.buffer)


class Keeper:
    """The file of one process: `owners` by name, with the most rings that each may have."""

    def __init__(self, directory: str, name: str, owners: dict[str, int]) -> None:
        count = LIVES * sum(owners.values())
        size = HEADER + sizeof(Entry) * count
        if size > FILE_MAX:
            raise ConfigError(f"positions of {count // LIVES} rings are too many for one file")
        try:
            folder = open_private(directory)
            try:
                before = read_before(folder, name)
                memory, temporary = make_file(folder, name, size)
                self.path = os.path.join(directory, name)
                self.table = Table(memory)
                self.owners = share_out(self.table, owners, before)
                memory[:HEADER] = MAGIC
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise ConfigError(f"{directory}/{name}: {error.strerror or error}") from None

    def close(self) -> None:
        """Leaves no file behind where there is nothing in it."""
        cdef Table table = self.table
        if not any([table.entries[i].valid for i in range(table.count)]):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def share_out(Table table not None, owners: dict[str, int], bytes before) -> dict[str, Owner]:
    """Entries for each, and in them the youngest of what it left."""
    cdef const Entry *old = <const Entry *>(<const char *>before + HEADER)
    cdef Py_ssize_t count = max(len(before) - HEADER, 0) // <Py_ssize_t>sizeof(Entry), i
    shares = {}
    first = 0
    for name, limit in owners.items():
        number = zlib.crc32(name.encode("utf-8", "surrogateescape"))
        shares[name] = Owner(table, number, first, LIVES * limit)
        left = sorted([(old[i].age, i) for i in range(count)
                       if old[i].valid == 1 and old[i].owner == number])
        for at, (age, i) in enumerate(left[-LIVES * limit:], first):
            table.entries[<Py_ssize_t>at] = old[i]
            table.age = max(table.age, age + 1)
        first += LIVES * limit
    return shares


cdef class Owner:
    """The entries of one socket's rings."""

    cdef Table table
    cdef uint32_t number
    cdef int first, end
    cdef set taken      # numbers of those whose rings run

    def __cinit__(self, Table table not None, number: int, first: int, count: int):
        self.table = table
        self.number = number
        self.first, self.end = first, first + count
        self.taken = set()

    def claim(self, file: tuple[int, int], gpa: int, size: int) -> KeptPosition | None:
        """The entry of the ring of `size` at `gpa` in the memory that `file` (its device and
        inode) holds: what it had before, or a free one; None where there is none."""
        cdef Entry *entry
        cdef KeptPosition kept
        free = [i for i in range(self.first, self.end) if i not in self.taken]
        if not free:
            return None
        wanted = (*file, gpa, size)
        found = None
        for chosen in free:
            entry = &self.table.entries[<Py_ssize_t>chosen]
            if entry.valid and (entry.device, entry.inode, entry.gpa, entry.size) == wanted:
                found = entry.pair >> 16, entry.pair & 0xffff
                break
        else:
            chosen = min(free, key=self.worth)
            entry = &self.table.entries[<Py_ssize_t>chosen]
            store_release_u32(&entry.valid, 0)
            memset(entry, 0, sizeof(Entry))
            entry.device, entry.inode, entry.gpa, entry.size = wanted
            entry.owner = self.number
        entry.age = self.table.age
        self.table.age += 1
        self.taken.add(chosen)
        kept = KeptPosition.__new__(KeptPosition)
        kept.entry, kept.table, kept.found = entry, self.table, found
        return kept

    def worth(self, index: int) -> tuple[int, int]:
        cdef Entry *entry = &self.table.entries[<Py_ssize_t>index]
        return entry.valid, entry.age

    def release(self, KeptPosition kept not None) -> None:
        """Its ring has stopped; what is there stays until it is claimed."""
        self.taken.discard(kept.entry - self.table.entries)


def open_private(directory: str) -> int:
    """The directory's fd. Raises ConfigError where others may put files into it."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(folder)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        os.close(folder)
        raise ConfigError(f"{directory} can be written to by others", f"chmod go-w {directory}")
    return folder


def read_before(folder: int, name: str) -> bytes:
    """What the last life left; b"" where there is nothing that can be believed."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return b""
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        whose = status.st_uid == os.geteuid() and status.st_nlink == 1
        if not (stat.S_ISREG(status.st_mode) and whose and status.st_size <= FILE_MAX):
            raise ConfigError(f"{name}: not a file of ours", "remove it")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{name}: in use by a running process") from None
        data = file.read(FILE_MAX)
    return data if data.startswith(MAGIC) else b""


def make_file(folder: int, name: str, size: int) -> tuple[mmap.mmap, str]:
    """A new one of zeros under another name, mapped and locked; and that name."""
    temporary = f".{name}.{os.getpid()}"
    try:
        os.unlink(temporary, dir_fd=folder)
    except FileNotFoundError:
        pass
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        # All of it, now: a store to a page for which there is no room would be our end.
        os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size), temporary   # which holds the lock, by an fd of its own
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise
    finally:
        os.close(fd)
