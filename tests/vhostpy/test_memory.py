"""Guest memory as a front-end lays it out: mapping, translation, the dirty log.

What a hostile front-end does to it is in tests/hostile/test_memory.py.
"""

import ctypes
import gc
import mmap
import multiprocessing
import os
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostpy.errors import GuestError, ProtocolError
from vhostpy.memory.guest import DirtyLog, GuestMemory, RegionInfo, leaked_generations
from vhostpy.memory.mapping import Mapping
from vhostpy.system.account import Account

PAGE = os.sysconf("SC_PAGE_SIZE")
LOG_PAGE = 4096  # vhost-user, "Migration"
UVA = 0x7F00_0000_0000
MIB = 1 << 20


@pytest.fixture
def memfd():
    """Makes memfds of a size, filled with bytes that tell where they are."""
    fds = []

    def make(size):
        fd = os.memfd_create("guest")
        fds.append(fd)
        os.truncate(fd, size)
        os.pwrite(fd, os.urandom(min(size, MIB)), 0)
        return fd

    yield make
    for fd in fds:
        os.close(fd)


def region(fd, size, *, gpa=0, uva=UVA, offset=0):
    return RegionInfo(gpa, size, uva, Mapping(fd, offset, size))


def own_maps():
    with open("/proc/self/maps") as maps:
        return len(maps.readlines())


# Mapping


@pytest.mark.parametrize("offset", [0, 1, 100, PAGE - 1, PAGE, 3 * PAGE + 7])
@pytest.mark.parametrize("size", [1, 99, PAGE, PAGE + 1, 2 * PAGE - 3])
def test_any_offset_and_length_show_the_files_bytes(memfd, offset, size):
    fd = memfd(offset + size)
    memory = GuestMemory([region(fd, size, gpa=0x1234, offset=offset)])
    assert memory.read(0x1234, size) == os.pread(fd, size, offset)
    memory.write(0x1234 + size - 1, b"!")
    assert os.pread(fd, 1, offset + size - 1) == b"!"
    with pytest.raises(GuestError):
        memory.read(0x1234, size + 1)


@pytest.mark.parametrize("directory", ["/dev/shm", None], ids=["shm", "disk"])
def test_a_deleted_file_stays_mapped_after_its_fd_is_closed(directory):
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        file.truncate(2 * PAGE)
        mappings = [
            Mapping(file.fileno(), 0, 2 * PAGE, Account(file_memory=True)) for _ in range(2)
        ]
    memory, other = (GuestMemory([RegionInfo(0, 2 * PAGE, UVA, m)]) for m in mappings)
    memory.write(PAGE - 2, b"spans")
    assert other.read(PAGE - 2, 5) == b"spans"


def test_a_mapping_shared_by_two_generations_outlives_the_first(memfd):
    fd = memfd(PAGE)
    first = GuestMemory([region(fd, PAGE)])
    second = GuestMemory([RegionInfo(PAGE, PAGE, UVA, first.mappings[0])])
    assert second.number > first.number
    del first
    assert second.read(PAGE, PAGE) == os.pread(fd, PAGE, 0)


def test_mappings_and_fds_are_flat_after_a_thousand_generations(memfd):
    fd = memfd(8 * PAGE)

    def generation():
        regions = [region(fd, PAGE, gpa=i * PAGE, offset=i * PAGE) for i in range(8)]
        memory, log = GuestMemory(regions), DirtyLog(fd, 5, PAGE)
        memory.write(0, b"x")
        log.mark(0, 1)

    generation()
    gc.collect()  # what earlier tests left would go meanwhile
    before = own_maps(), len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        generation()
    gc.collect()
    # glibc may have grown or split a heap of its own
    assert own_maps() <= before[0] + 4
    assert len(os.listdir("/proc/self/fd")) == before[1]


def test_guest_memory_is_neither_populated_nor_dumped(memfd):
    size = 64 * MIB
    fd = os.memfd_create("sparse")
    os.truncate(fd, size)
    mapping = Mapping(fd, 0, size)
    blocks = os.fstat(fd).st_blocks
    os.close(fd)
    assert blocks == 0
    with open("/proc/self/smaps") as smaps:
        text = smaps.read()
    entry = text[text.index(f"{mapping.address:x}-") :]
    flags = next(line for line in entry.splitlines() if line.startswith("VmFlags"))
    assert "dd" in flags.split()
    assert "lo" not in flags.split()


# Regions


def test_regions_may_come_in_any_order_and_are_kept_sorted(memfd):
    fd = memfd(3 * PAGE)
    parts = [region(fd, PAGE, gpa=i * 10 * PAGE, offset=i * PAGE) for i in (2, 0, 1)]
    memory = GuestMemory(parts)
    assert [r.gpa for r in memory.regions] == [0, 10 * PAGE, 20 * PAGE]
    for i in range(3):
        assert memory.read(i * 10 * PAGE, PAGE) == os.pread(fd, PAGE, i * PAGE)


def test_a_range_may_span_regions_that_meet_but_no_hole(memfd):
    fd = memfd(4 * PAGE)
    memory = GuestMemory(
        [
            region(fd, PAGE, gpa=0, offset=2 * PAGE),
            region(fd, PAGE + 5, gpa=PAGE, uva=2 * UVA, offset=1),
            region(fd, PAGE, gpa=3 * PAGE, uva=3 * UVA),
        ]
    )
    assert [length for _, length in memory.translate(PAGE - 1, 10)] == [1, 9]
    memory.write(PAGE - 3, b"abcdef")
    assert os.pread(fd, 3, 3 * PAGE - 3) == b"abc"
    assert os.pread(fd, 3, 1) == b"def"
    assert memory.read(0, 2 * PAGE + 5)[PAGE - 3 : PAGE + 3] == b"abcdef"
    for gpa, length in [(0, 2 * PAGE + 6), (2 * PAGE + 5, 1), (3 * PAGE - 1, 2), (4 * PAGE, 1)]:
        with pytest.raises(GuestError, match=f"{gpa:#x}, {length} bytes"):
            memory.translate(gpa, length)


def test_a_write_that_ends_in_a_hole_changes_nothing(memfd):
    fd = memfd(PAGE)
    memory = GuestMemory([region(fd, PAGE)])
    before = os.pread(fd, PAGE, 0)
    with pytest.raises(GuestError):
        memory.write(PAGE - 4, b"too long")
    assert os.pread(fd, PAGE, 0) == before


def test_509_regions_are_served_and_510_refused(memfd):
    fd = memfd(510 * 8)
    parts = [region(fd, 8, gpa=i * 8, uva=UVA + i * 8, offset=i * 8) for i in range(510)]
    memory = GuestMemory(parts[:509])
    assert memory.read(0, 509 * 8) == os.pread(fd, 509 * 8, 0)
    assert memory.hva(UVA + 508 * 8, 8) == memory.translate(508 * 8, 8)[0][0]
    with pytest.raises(ProtocolError, match="510 regions, at most 509"):
        GuestMemory(parts)


def test_memory_without_regions_holds_nothing():
    memory = GuestMemory([])
    assert not memory.poisoned
    with pytest.raises(GuestError):
        memory.translate(0, 1)
    with pytest.raises(ProtocolError):
        memory.hva(0, 1)


def test_user_addresses_are_found_within_one_region_only(memfd):
    fd = memfd(2 * PAGE)
    memory = GuestMemory(
        [
            region(fd, PAGE, gpa=5 * PAGE),
            region(fd, PAGE, gpa=PAGE, uva=UVA + PAGE, offset=PAGE),
        ]
    )
    assert memory.hva(UVA, PAGE) == memory.translate(5 * PAGE, 1)[0][0]
    assert memory.hva(UVA + PAGE + 8, 8) == memory.translate(PAGE + 8, 8)[0][0]
    for uva, length in [(UVA - 1, 1), (UVA, 0), (UVA, PAGE + 1), (UVA + 2 * PAGE, 1), (-1, 1)]:
        with pytest.raises(ProtocolError, match="not within one memory region"):
            memory.hva(uva, length)


def test_the_same_memory_may_appear_twice_to_the_guest(memfd):
    """Boards that show the start of RAM at 0 as well: one UVA, two guest addresses."""
    fd = memfd(PAGE)
    memory = GuestMemory([region(fd, PAGE), region(fd, PAGE, gpa=16 * PAGE)])
    memory.write(16 * PAGE, b"alias")
    assert memory.read(0, 5) == b"alias"
    assert memory.hva(UVA, PAGE)


def test_regions_past_4_gib_are_translated_in_32_bit_pieces():
    size = 9 << 30
    fd = os.memfd_create("large")
    os.truncate(fd, size)
    memory = GuestMemory([region(fd, PAGE, gpa=0), region(fd, size, gpa=PAGE)])
    os.close(fd)
    pairs = memory.translate(1, size)
    assert sum(length for _, length in pairs) == size
    assert all(0 < length < 1 << 32 for _, length in pairs)
    joined = [hva + length for hva, length in pairs[1:-1]]
    assert joined == [hva for hva, _ in pairs[2:]]


class Layout:
    """Small regions of one file, and what each guest address must hold."""

    def __init__(self, gaps_and_sizes, base):
        self.fd = os.memfd_create("layout")
        content = bytes(i * 7 % 251 for i in range(4 * PAGE))
        os.write(self.fd, content)
        self.bytes, parts, gpa, offset = {}, [], base, PAGE - 20
        for gap, size in gaps_and_sizes:
            gpa += gap
            if gpa + size > 2**64:
                break
            parts.append(region(self.fd, size, gpa=gpa, uva=gpa, offset=offset))
            for i in range(size):
                self.bytes[gpa + i] = content[offset + i]
            gpa, offset = gpa + size, (offset + 3 * size) % (3 * PAGE)
        self.memory = GuestMemory(parts)

    def expected(self, gpa, length):
        try:
            return bytes(self.bytes[gpa + i] for i in range(length)) or None
        except KeyError:
            return None


@settings(deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=12),
    base=st.sampled_from([0, 1, 0x8000_0000, 2**64 - 200, 2**64 - 40]),
    asks=st.lists(
        st.tuples(st.integers(-3, 210), st.integers(0, 130), st.integers(0, 14)), max_size=20
    ),
)
def test_translation_agrees_with_a_table_of_every_byte(shape, base, asks):
    layout = Layout(shape, base)
    try:
        for distance, length, hint in asks:
            gpa = (base + distance) % 2**64
            expected = layout.expected(gpa, length)
            if expected is None:
                with pytest.raises(GuestError):
                    layout.memory.translate(gpa, length, hint)
                continue
            pairs = layout.memory.translate(gpa, length, hint)
            assert pairs == layout.memory.translate(gpa, length, 2**32 - 1)
            assert sum(n for _, n in pairs) == length
            assert layout.memory.read(gpa, length) == expected
            for hva, n in pairs:
                assert layout.memory.hva(gpa, n) == hva
                gpa += n
    finally:
        os.close(layout.fd)


# References


def test_requests_under_way_are_counted(memfd):
    memory = GuestMemory([region(memfd(PAGE), PAGE)])
    assert memory.in_use == 0
    memory.hold()
    memory.hold()
    memory.drop()
    assert memory.in_use == 1
    memory.drop()
    assert memory.in_use == 0
    with pytest.raises(ValueError, match="not held"):
        memory.drop()
    assert memory.in_use == 0


def test_a_generation_freed_under_a_request_leaks_rather_than_unmaps(memfd):
    fd = memfd(PAGE)
    leaked = leaked_generations()
    memory = GuestMemory([region(fd, PAGE)])
    address = memory.hva(UVA, PAGE)
    memory.hold()
    del memory
    gc.collect()
    assert leaked_generations() == leaked + 1
    assert ctypes.string_at(address, PAGE) == os.pread(fd, PAGE, 0)


# Dirty log


def test_marking_sets_the_bits_of_all_touched_pages(memfd):
    fd = memfd(PAGE)
    os.pwrite(fd, bytes(PAGE), 0)
    log = DirtyLog(fd, 3, 16)
    log.mark(0, 1)
    log.mark(9 * LOG_PAGE - 1, 2)
    log.mark(20 * LOG_PAGE, 3 * LOG_PAGE)
    log.mark(5 * LOG_PAGE, 0)
    assert log.pages() == [0, 8, 9, 20, 21, 22]
    assert os.pread(fd, 6, 3) == bytes([0x01, 0x03, 0x70, 0, 0, 0])


@settings(deadline=None)
@given(
    size=st.integers(1, 40),
    offset=st.integers(0, PAGE),
    marks=st.lists(
        st.tuples(
            st.integers(0, 50 * 8 * LOG_PAGE) | st.integers(2**64 - 9000, 2**64 - 1),
            st.integers(0, 20 * LOG_PAGE) | st.sampled_from([2**64 - 1, 2**63]),
        ),
        max_size=10,
    ),
)
def test_marking_agrees_with_a_set_of_pages_and_touches_nothing_else(size, offset, marks):
    fd = os.memfd_create("log")
    try:
        os.truncate(fd, offset + size + 100)
        log = DirtyLog(fd, offset, size)
        expected = set()
        for gpa, length in marks:
            log.mark(gpa, length)
            last = min(gpa + length, 2**64, size * 8 * LOG_PAGE) - 1
            if length:
                expected.update(range(gpa // LOG_PAGE, last // LOG_PAGE + 1))
        assert log.pages() == sorted(expected)
        content = os.pread(fd, offset + size + 100, 0)
        assert not any(content[:offset]) and not any(content[offset + size :])
    finally:
        os.close(fd)


def mark_in_step(log_fd, step_fd, size, me):
    """Marks a page of each byte of the log at the moment when the other does."""
    log = DirtyLog(log_fd, 0, size)
    with mmap.mmap(step_fd, PAGE) as area, memoryview(area).cast("Q") as steps:
        for byte in range(size):
            gpa = (byte * 8 + 4 * me) * LOG_PAGE
            steps[me] = byte + 1
            while steps[1 - me] <= byte:
                os.sched_yield()
            log.mark(gpa, 1)


def test_two_writers_of_the_same_bytes_lose_no_bit():
    """Bits of one byte are set by several workers, and cleared by the front-end."""
    size = 20_000
    log_fd, step_fd = os.memfd_create("log"), os.memfd_create("steps")
    os.truncate(log_fd, size)
    os.truncate(step_fd, PAGE)
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=mark_in_step, args=(log_fd, step_fd, size, me)) for me in (0, 1)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert os.pread(log_fd, size, 0) == b"\x11" * size
    os.close(log_fd)
    os.close(step_fd)
