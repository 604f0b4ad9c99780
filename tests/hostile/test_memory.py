"""Attacks through the memory table: files that lie or block, ranges that wrap.

Over a socket, beside an innocent session, they are in this directory's other files.
"""

import fcntl
import os
import socket
import tempfile

import pytest

from tests.hostile.pages import PAGE, UVA, memfd, region
from tests.hostile.victim import eventually
from vhostpy.errors import GuestError, ProtocolError
from vhostpy.memory.guest import DirtyLog, GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping, poison_fd
from vhostpy.system.account import COMMON, Account


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 2 * PAGE + 1),
        (2 * PAGE, 1),
        (PAGE, PAGE + 1),
        (2**63 - 1, 2),
        (2**63, 1),
        (2**64 - PAGE, 2 * PAGE),
        (0, 2**63),
        (0, 2**64 - 1),
        (PAGE, 2**64 - PAGE),
        (0, 0),
        (-1, 1),
        (0, -1),
        (0, 2**70),
    ],
)
def test_a_region_past_the_end_of_its_file_is_refused(offset, size):
    """CVE-2020-10722: offset + size that wraps."""
    with memfd(2 * PAGE) as fd, pytest.raises(ProtocolError, match="cannot map"):
        Mapping(fd, offset, size)
    with memfd(2 * PAGE) as fd, pytest.raises(ProtocolError, match="cannot map"):
        DirtyLog(fd, offset, size)


def test_the_refusal_names_both_sizes():
    with memfd(PAGE) as fd, pytest.raises(ProtocolError) as caught:
        Mapping(fd, PAGE, 1 << 30)
    assert "cannot map 1 GiB at offset 4096: the file has only 4 KiB" in str(caught.value)


def test_what_is_no_file_is_refused():
    read_end, write_end = os.pipe()
    directory = os.open("/tmp", os.O_RDONLY)
    null = os.open("/dev/zero", os.O_RDWR)
    plain = socket.socket()
    fds = [read_end, write_end, directory, null, plain.fileno(), poison_fd()]
    try:
        for fd in fds:
            with pytest.raises(ProtocolError) as caught:
                Mapping(fd, 0, PAGE)
            assert "neither a memfd nor a regular file" in str(caught.value)
            assert "share=on" in caught.value.hint
        with pytest.raises(ProtocolError, match="Bad file descriptor"):
            Mapping(1 << 20, 0, PAGE)
    finally:
        plain.close()
        for fd in (read_end, write_end, directory, null):
            os.close(fd)


@pytest.mark.parametrize("path", ["/proc/self/comm", "/sys/kernel/mm/ksm/run"])
def test_files_whose_pages_are_made_by_others_are_refused(path):
    """FUSE and NFS block in the page fault; only listed local file systems are mapped."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ProtocolError, match="page faults may block") as caught:
            Mapping(fd, 0, 1)
        assert "memfd" in caught.value.hint
    finally:
        os.close(fd)


def test_files_on_a_disk_are_mapped_only_where_that_is_allowed():
    """A fault waits for the disk, and every guest of the worker with it."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        file.truncate(PAGE)
        with pytest.raises(ProtocolError, match="on a disk") as caught:
            Mapping(file.fileno(), 0, PAGE)
        assert "--allow-file-memory" in caught.value.hint
        Mapping(file.fileno(), 0, PAGE, Account(file_memory=True))


def test_memory_that_cannot_be_written_is_refused():
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(PAGE)
        for flags in (os.O_RDONLY, os.O_WRONLY):
            fd = os.open(file.name, flags)
            with pytest.raises(ProtocolError, match="not open for reading and writing"):
                Mapping(fd, 0, PAGE)
            os.close(fd)
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.truncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(ProtocolError, match="EPERM"):
        Mapping(fd, 0, PAGE)
    os.close(fd)


def test_a_sparse_file_cannot_take_all_addresses():
    before = COMMON.mapped_bytes
    with memfd(1 << 45) as fd:
        kept = Mapping(fd, 0, 1 << 45)
        with pytest.raises(ProtocolError, match="all mappings together"):
            for _ in range(3):
                kept = [kept, Mapping(fd, 0, 1 << 45)]
        del kept
        for _ in range(5):  # what was refused or freed is not counted
            eventually(lambda: COMMON.mapped_bytes <= before)
            Mapping(fd, 0, 1 << 45)
        eventually(lambda: COMMON.mapped_bytes <= before)
    with memfd(2**62) as fd, pytest.raises(ProtocolError, match="all mappings together"):
        Mapping(fd, 0, 2**62)


@pytest.mark.parametrize(
    ("gpa", "uva", "size", "why"),
    [
        (0, UVA, 0, "zero size"),
        (2**64 - PAGE + 1, UVA, PAGE, "wraps"),
        (2**64 - 1, UVA, 2, "wraps"),
        (0, 2**64 - 1, PAGE, "wraps"),
        (0, UVA, PAGE + 1, "only 4 KiB are mapped"),
        (0, 0, 2**64 - 1, "only 4 KiB are mapped"),
        (2**64, UVA, 1, "64 bits"),
        (-1, UVA, 1, "64 bits"),
        (0, -1, 1, "64 bits"),
        (0, UVA, 2**64, "64 bits"),
    ],
)
def test_regions_that_wrap_or_are_empty_are_refused(gpa, uva, size, why):
    with memfd(PAGE) as fd:
        mapping = Mapping(fd, 0, PAGE)
    with pytest.raises(ProtocolError, match=why):
        RegionInfo(gpa, size, uva, mapping)


@pytest.mark.parametrize("second", [(0, 1), (PAGE - 1, 2), (10, 5), (0, 3 * PAGE), (PAGE, PAGE)])
def test_overlapping_regions_are_refused_in_either_order(second):
    with memfd(4 * PAGE) as fd:
        first = region(fd, 2 * PAGE, gpa=0)
        gpa, size = second
        other = region(fd, size, gpa=gpa, uva=2 * UVA)
        for regions in ([first, other], [other, first]):
            with pytest.raises(ProtocolError, match="overlaps"):
                GuestMemory(regions)


def test_ranges_that_wrap_around_to_the_first_region_are_faults():
    """The last region ends at 2**64 and another starts at 0: they do not meet."""
    with memfd(2 * PAGE) as fd:
        memory = GuestMemory(
            [region(fd, PAGE), region(fd, PAGE, gpa=2**64 - PAGE, uva=2 * UVA, offset=PAGE)]
        )
        assert memory.read(2**64 - PAGE, PAGE) == bytes(PAGE)
        for gpa, length in [
            (2**64 - 1, 2),
            (2**64 - PAGE, PAGE + 1),
            (2**64 - 1, 2**64 - 1),
            (1, 2**64 - 1),
            (0, 2**64 - 1),
            (0, 0),
            (PAGE - 1, 2),
        ]:
            for hint in (0, 1, 2**32 - 1):
                with pytest.raises(GuestError):
                    memory.translate(gpa, length, hint)


def test_a_log_too_short_for_memory_is_never_written_past():
    """CVE-2019-14835; the end of the log lies in the middle of its page here."""
    with memfd(2 * PAGE) as fd:
        os.pwrite(fd, b"\x55" * 2 * PAGE, 0)
        log = DirtyLog(fd, 100, 2)
        log.mark(0, 2**64 - 1)
        log.mark(16 * 4096, 4096)
        log.mark(2**64 - 1, 2**64 - 1)
        assert os.pread(fd, 2 * PAGE, 0) == (
            b"\x55" * 100 + b"\xff\xff" + b"\x55" * (2 * PAGE - 102)
        )
