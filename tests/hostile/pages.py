"""Memory for attacks: memfds, of huge pages too, and regions of them."""

import contextlib
import os
import subprocess
import tempfile

import pytest

from vhostpy.memory.guest import RegionInfo
from vhostpy.memory.mapping import Mapping

PAGE = os.sysconf("SC_PAGE_SIZE")
HUGE = 2 << 20
UVA = 0x7F00_0000_0000
HUGE_PAGES = f"/sys/kernel/mm/hugepages/hugepages-{HUGE >> 10}kB"


@contextlib.contextmanager
def memfd(size, huge=False):
    flags = os.MFD_CLOEXEC
    if huge:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    fd = os.memfd_create("guest", flags)
    try:
        os.truncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def region(fd, size, *, gpa=0, uva=UVA, offset=0):
    return RegionInfo(gpa, size, uva, Mapping(fd, offset, size))


def huge_page_count(which):
    with open(f"{HUGE_PAGES}/{which}_hugepages") as file:
        return int(file.read())


def set_huge_pages(count):
    with open(f"{HUGE_PAGES}/nr_hugepages", "w") as file:
        file.write(str(count))


@contextlib.contextmanager
def huge_pages(count):
    """Some huge pages of the machine, or a skip that says how to get them."""
    raised = None
    try:
        if huge_page_count("free") < count:
            before = huge_page_count("nr")
            set_huge_pages(before + count)
            raised = huge_page_count("nr")
        if huge_page_count("free") < count:
            pytest.skip("the kernel finds no free huge pages: memory is too fragmented")
    except OSError as error:
        pytest.skip(
            f"no huge pages: run as root, or echo {count} > {HUGE_PAGES}/nr_hugepages: {error}"
        )
    try:
        yield
    finally:
        if raised is not None and huge_page_count("nr") == raised:
            set_huge_pages(before)


@contextlib.contextmanager
def small_pool(size):
    """A directory on hugetlbfs that holds `size` bytes."""
    with huge_pages(size // HUGE), tempfile.TemporaryDirectory() as directory:
        mount = ["mount", "-t", "hugetlbfs", "-o", f"pagesize=2M,size={size}", "none", directory]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("cannot mount hugetlbfs: run as root")
        try:
            yield directory
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True)
