"""Mappings: a front-end's file in our address space, and what contains it when it shrinks.

Knows files and bytes; knows no guest address. Nothing here populates, locks or registers
guest memory: pages that a balloon or virtio-mem has given up would come back, or be
written to behind the guest's back.
"""
import errno
import fcntl
import os
import stat
import sys
from functools import partial

cimport cython
from libc.errno cimport errno as c_errno

from vhostpy.system.hw cimport atomic_add_i64
from vhostpy.system.linux cimport fstatfs, statfs_t

from vhostpy.system.account import ADDRESSES_MAX, COMMON, Account
from vhostpy.errors import SHARE_ON, ProtocolError
from vhostpy.system.fds import FREED_AT_ONCE_BYTES, freeing, is_sealable, kind_of


cdef extern from "memory/sigbus.h" nogil:
    int sigbus_event
    int sigbus_install()
    int sigbus_add(void *, uint64_t, uint64_t)
    void sigbus_remove(int)
    int sigbus_find(uint64_t)
    void sigbus_mark(int)
    bint sigbus_poisoned(int)

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_NORESERVE
        MADV_DONTDUMP
    void *MAP_FAILED
    void *mmap(void *, size_t, int, int, int, int64_t)
    int munmap(void *, size_t)
    int madvise(void *, size_t, int)

# account.py divides them among the sockets; all together, as some may have gone since.
MAPPED_MAX = ADDRESSES_MAX
cdef int64_t mapped_total = 0

# proc(5), mountinfo. A page fault on a disk takes its time, and a worker's other guests wait
# with it: only where the operator says so. A fault on FUSE or NFS may wait for a server for
# ever. Not overlayfs: its upper layer, where the pages are, may be on FUSE. (devtmpfs has
# devices, which are named as such.)
MEMORY_FILE_SYSTEMS = {"tmpfs", "hugetlbfs", "ramfs", "devtmpfs"}
DISK_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs"}
HUGETLBFS = 0x958458F6      # statfs(2), f_type
COUNT_HINT = "raise vm.max_map_count, or serve fewer sockets with one process"
# Memory is unmapped by pieces: whoever maps some waits meanwhile.
cdef size_t UNMAPPED_PIECE = <size_t>1 << 30     # the size of the largest pages


def install_sigbus_handler() -> None:
    """Contains SIGBUS on mappings from now on; may be called again at any time.

    Faults elsewhere go to the handler that was there before, e.g. faulthandler's.
    Each Mapping calls this: a handler that was installed over ours is put below it.
    Threads that touch guest memory must not block SIGBUS: the kernel would kill.
    """
    cdef int error = sigbus_install()
    if error:
        raise OSError(error, f"SIGBUS handler: {os.strerror(error)}")


def poison_fd() -> int:
    """An eventfd, readable after a mapping was poisoned: look at each `poisoned`.

    It belongs to this module: read it, don't close it.
    """
    install_sigbus_handler()
    return sigbus_event


cdef void poison(const void *hva) noexcept nogil:
    cdef int slot = sigbus_find(<uint64_t>hva)
    if slot >= 0:
        sigbus_mark(slot)


cdef str size_text(uint64_t size):
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (<uint64_t>1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} bytes"


cdef forget_mapping(size_t mapped, account):
    atomic_add_i64(&mapped_total, -<int64_t>mapped)
    account.remove_mapping(mapped)


def unmap(base: int, mapped: int, account: Account) -> None:
    """What a Mapping ends with. Frees the file's memory where nobody else has it."""
    cdef uint64_t start = base, end = <uint64_t>base + <uint64_t>mapped
    with nogil:
        while start < end:
            munmap(<void *>start, min(end - start, UNMAPPED_PIECE))
            start += UNMAPPED_PIECE
    forget_mapping(mapped, account)


cdef str slow_file_system(int fd):
    """What a file is on whose faults may take long; None where they do not. Asks nobody."""
    if is_sealable(fd) or kind_of(fd).startswith(("pipe:", "socket:", "anon_inode:")):
        return None
    with open(f"/proc/self/fdinfo/{fd}") as info:
        number = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        for line in mounts:
            # "36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
            mount, _, source = line.partition(" - ")
            if mount.split(" ", 1)[0] == number:
                kind = source.split(" ", 1)[0]
                return None if kind in MEMORY_FILE_SYSTEMS else kind
    return "a file system that is not mounted here"


cdef uint64_t check_file(
    int fd, uint64_t offset, uint64_t size, str what, bint disk_allowed
) except 0:
    """The page size of the file, if it can hold `size` bytes at `offset`."""
    cdef statfs_t fs
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
        # fstat asks the server, if there is one, and would wait for it, too.
        name = slow_file_system(fd)
        on_disk = name in DISK_FILE_SYSTEMS
        status = os.fstat(fd) if name is None or on_disk else None
    except OSError as error:
        raise ProtocolError(f"{what}: {error.strerror}", SHARE_ON) from None
    if status is None:
        raise ProtocolError(
            f"{what}: the file is on {name}, whose page faults may block for ever",
            "keep guest memory in a memfd, on tmpfs or hugetlbfs",
        )
    if not stat.S_ISREG(status.st_mode):
        raise ProtocolError(f"{what}: neither a memfd nor a regular file", SHARE_ON)
    if on_disk and not disk_allowed:
        raise ProtocolError(
            f"{what}: the file is on a disk ({name}), whose page faults hold up other guests",
            "keep guest memory in a memfd, on tmpfs or hugetlbfs; or start vhostpy with "
            "--allow-file-memory",
        )
    if fstatfs(fd, &fs) < 0:
        raise ProtocolError(f"{what}: fstatfs: {os.strerror(c_errno)}", SHARE_ON)
    # Both are below 2**64, and Python's sum does not wrap.
    if int(offset) + int(size) > status.st_size:
        raise ProtocolError(
            f"{what}: the file has only {size_text(status.st_size)}",
            "the front-end's file must hold the whole region before it is sent",
        )
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise ProtocolError(f"{what}: the fd is not open for reading and writing", SHARE_ON)
    if <uint64_t>fs.f_type & 0xFFFFFFFF == HUGETLBFS:
        return fs.f_bsize
    return os.sysconf("SC_PAGE_SIZE")


@cython.final
@cython.no_gc       # an account refers to no mapping
cdef class Mapping:
    """`size` bytes of a file from `offset` on, neither of them page-aligned perhaps.

    Keeps no fd; counts as one of `account`'s. Raises ProtocolError if the file can't be
    mapped or isn't safe to, or if its account's share is used up.
    """

    def __cinit__(self, fd: int, offset: int, size: int, account=COMMON):
        cdef uint64_t start, pad
        cdef void *base
        cdef int file_number
        what = f"cannot map {size_text(size) if 0 <= size < 2**64 else size} at offset {offset}"
        if not 0 <= offset < 2**63:
            raise ProtocolError(f"{what}: the offset is not below 2**63")
        if not 0 < size < 2**63:
            raise ProtocolError(f"{what}: the size is not from 1 to 2**63 - 1")
        file_number = fd
        install_sigbus_handler()
        self.page_size = check_file(file_number, offset, size, what, account.file_memory)
        self.size = size
        # fstat bounds offset + size, so none of these wraps. The end of the file bounds
        # the mapping too: a hugetlbfs file consists of whole huge pages.
        start = <uint64_t>offset & ~(self.page_size - 1)
        pad = <uint64_t>offset - start
        self.mapped = (pad + self.size + self.page_size - 1) & ~(self.page_size - 1)
        if atomic_add_i64(&mapped_total, self.mapped) > MAPPED_MAX:
            atomic_add_i64(&mapped_total, -<int64_t>self.mapped)
            raise ProtocolError(
                f"{what}: all mappings together would pass {size_text(MAPPED_MAX)}",
                "a front-end should send only memory that its guest has",
            )
        try:
            account.add_mapping(self.mapped, what)
        except ProtocolError:
            atomic_add_i64(&mapped_total, -<int64_t>self.mapped)
            raise
        with nogil:
            base = mmap(NULL, self.mapped, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_NORESERVE, file_number, <int64_t>start)
        if base == MAP_FAILED:
            error = c_errno
            forget_mapping(self.mapped, account)
            raise ProtocolError(
                f"{what}: {errno.errorcode.get(error, error)} ({os.strerror(error)})",
                COUNT_HINT if error == errno.ENOMEM else SHARE_ON,
            )
        self.account = account
        self.base = <uint8_t *>base
        self.data = self.base + pad
        madvise(base, self.mapped, MADV_DONTDUMP)
        self.slot = sigbus_add(base, self.mapped, self.page_size)
        if self.slot < 0:
            raise ProtocolError(f"{what}: 65536 mappings are in use", COUNT_HINT)

    def __dealloc__(self):
        if self.base != NULL:       # else it was refused, and its slot is still 0
            if self.slot >= 0:
                sigbus_remove(self.slot)
            if self.mapped > FREED_AT_ONCE_BYTES and not sys.is_finalizing():
                freeing.do(partial(unmap, <uint64_t>self.base, self.mapped, self.account))
            else:
                unmap(<uint64_t>self.base, self.mapped, self.account)

    def __repr__(self):
        return f"<Mapping of {size_text(self.size)} at {self.address:#x}>"

    @property
    def address(self) -> int:
        """HVA of the first byte."""
        return <uint64_t>self.data

    @property
    def poisoned(self) -> bool:
        """The file was truncated or a page of it failed; what is read may be zeros."""
        return sigbus_poisoned(self.slot)
