"""A guest's memory, as a front-end makes and shares it: one memfd, several regions."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from vhostpy.memory.guest import GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping
from vhostpy.protocol.payloads import MemoryRegion
from vhostpy.system.fds import OwnedFd

# Far from any guest address: whoever mixes up UVA and GPA fails at once.
UVA_BASE = 0x7F00_0000_0000
PAGE = 4096


@dataclass(slots=True)
class SharedMemory:
    """A memfd that holds all regions one after the other, mapped here too."""

    fd: OwnedFd
    regions: tuple[MemoryRegion, ...]
    map: GuestMemory
    page_bytes: int = PAGE
    _next: list[int] = field(default_factory=list)  # per region, first free GPA

    @classmethod
    def create(cls, layout: Sequence[tuple[int, int]], *, hugepages: bool = False) -> Self:
        """`layout`: (GPA, size) of each region, sizes in whole pages.

        `hugepages`: of 2 MiB, where the machine has enough of them free.
        """
        total = sum(size for _, size in layout)
        fd = _huge_memory(total) if hugepages else None
        if fd is None:
            fd = OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(fd.fileno(), total)
        regions, offset = [], 0
        for gpa, size in layout:
            regions.append(MemoryRegion(gpa, size, UVA_BASE + gpa, offset))
            offset += size
        infos = [
            RegionInfo(r.gpa, r.size, r.uva, Mapping(fd.fileno(), r.offset, r.size))
            for r in regions
        ]
        page = os.fstat(fd.fileno()).st_blksize
        return cls(fd, tuple(regions), GuestMemory(infos), page, [r.gpa for r in regions])

    def allocate(self, size: int, alignment: int = PAGE) -> int:
        """The GPA of `size` bytes that nobody has been given before."""
        for i, region in enumerate(self.regions):
            gpa = -(-self._next[i] // alignment) * alignment
            if gpa + size <= region.gpa + region.size:
                self._next[i] = gpa + size
                return gpa
        raise MemoryError(f"no {size} bytes are left in the guest's {len(self.regions)} regions")


def _huge_memory(size: int) -> OwnedFd | None:
    """A memfd of hugepages that are ours already; None where there are too few."""
    try:
        fd = OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB))
    except OSError:
        return None
    try:
        # Without a page for each byte now, the first touch would be a SIGBUS.
        os.posix_fallocate(fd.fileno(), 0, size)
    except OSError:
        fd.close()
        return None
    return fd
