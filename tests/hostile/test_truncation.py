"""Files that shrink while they are mapped: contained, while foreign faults stay what they are."""

import contextlib
import ctypes
import errno
import mmap
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from tests.hostile.pages import HUGE, PAGE, UVA, huge_pages, memfd, region, small_pool
from vhostpy.memory.guest import DirtyLog, GuestMemory
from vhostpy.memory.mapping import poison_fd


@pytest.fixture(params=["4k", "huge"])
def page_kind(request):
    """(bytes of a page, whether memfds are to be huge)"""
    if request.param == "4k":
        yield PAGE, False
    else:
        with huge_pages(8):
            yield HUGE, True


def drain_poison():
    with contextlib.suppress(BlockingIOError):
        os.read(poison_fd(), 8)


def poison_seen():
    return bool(select.select([poison_fd()], [], [], 0)[0])


# Truncation ------------------------------------------------------------------------------


def test_truncated_memory_reads_as_zeros_and_is_poisoned(page_kind):
    page, huge = page_kind
    drain_poison()
    with memfd(2 * page, huge) as fd, memfd(page) as other_fd:
        memory = GuestMemory([region(fd, 2 * page - 100, gpa=50, offset=100)])
        innocent = GuestMemory([region(other_fd, page)])
        innocent.write(0, b"innocent")
        memory.write(50, b"guest")
        os.truncate(fd, 0)
        assert not memory.poisoned
        assert memory.read(50, 2 * page - 100) == bytes(2 * page - 100)
        assert memory.poisoned and poison_seen()
        drain_poison()
        memory.write(50 + page, b"still writable")
        assert memory.read(50 + page, 14) == b"still writable"
        assert not poison_seen()
        assert not innocent.poisoned
        assert innocent.read(0, 8) == b"innocent"
        # a new generation of other memory does not inherit the flag
        del memory
        os.truncate(fd, 2 * page)
        again = GuestMemory([region(fd, 2 * page)])
        assert not again.poisoned
        assert again.read(page, 8) == bytes(8)


@contextlib.contextmanager
def repeating(*works):
    """Runs each in a thread of its own, over and over; yields once all have run."""
    stop, failures = threading.Event(), []
    running = threading.Barrier(len(works) + 1)

    def repeat(work):
        try:
            work()
            running.wait(30)
            while not stop.is_set():
                work()
        except Exception as error:
            failures.append(error)
            running.abort()

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        running.wait(30)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert failures == []


@pytest.mark.parametrize("pages_kept", [0, 1])
def test_truncation_under_threads_that_read_and_write_ends_none(page_kind, pages_kept):
    page, huge = page_kind
    size = 2 * HUGE
    drain_poison()
    with memfd(size, huge) as fd, memfd(size) as other_fd:
        memory = GuestMemory([region(fd, size)])
        innocent = GuestMemory([region(other_fd, size)])
        innocent.write(0, b"\x5a" * size)

        def read():
            memory.read(0, size)

        def write():
            memory.write(0, b"\xa5" * size)

        def check_innocent():
            assert innocent.read(0, size) == b"\x5a" * size

        with repeating(read, write, check_innocent):
            os.truncate(fd, pages_kept * page)
            assert select.select([poison_fd()], [], [], 30)[0]
        assert memory.poisoned and not innocent.poisoned


def test_only_the_truncated_mapping_of_a_memory_is_replaced():
    with memfd(PAGE) as fd, memfd(PAGE) as other_fd:
        memory = GuestMemory([region(fd, PAGE), region(other_fd, PAGE, gpa=PAGE, uva=2 * UVA)])
        os.truncate(fd, 0)
        memory.write(0, b"z" * 2 * PAGE)
        assert [mapping.poisoned for mapping in memory.mappings] == [True, False]
        assert os.pread(other_fd, PAGE, 0) == b"z" * PAGE


def test_a_truncated_log_is_poisoned():
    drain_poison()
    with memfd(PAGE) as fd:
        log = DirtyLog(fd, 0, PAGE)
        os.truncate(fd, 0)
        log.mark(5 * 4096, 1)
        assert log.poisoned and poison_seen()
        assert log.pages() == [5]


def test_an_exhausted_huge_page_pool_is_contained_too():
    """We reserve nothing: the front-end's file may be larger than the pool."""
    drain_poison()
    with small_pool(HUGE) as directory:
        fd = os.open(f"{directory}/guest", os.O_RDWR | os.O_CREAT)
        os.truncate(fd, 2 * HUGE)
        memory = GuestMemory([region(fd, 2 * HUGE - 7, offset=7)])
        os.close(fd)
        memory.write(0, b"fits")
        assert memory.read(0, 4) == b"fits"
        assert not memory.poisoned
        memory.write(HUGE, b"does not")
        assert memory.poisoned and poison_seen()
        del memory


def test_punched_holes_read_as_zeros_and_are_no_fault(page_kind):
    """Balloon, free-page reporting, virtio-mem: the memory is still the guest's."""
    page, huge = page_kind
    with memfd(2 * page, huge) as fd:
        memory = GuestMemory([region(fd, 2 * page)])
        memory.write(0, b"a" * 2 * page)
        punch_hole(fd, 0, page)
        assert memory.read(0, 2 * page) == bytes(page) + b"a" * page
        memory.write(0, b"back")
        assert GuestMemory([region(fd, 2 * page)]).read(0, 4) == b"back"
        assert not memory.poisoned


def punch_hole(fd, offset, length):
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size, punch = 1, 2  # fallocate(2)
    arguments = map(ctypes.c_long, (offset, length))
    if libc.fallocate(fd, keep_size | punch, *arguments):
        raise OSError(ctypes.get_errno(), errno.errorcode[ctypes.get_errno()])


def test_an_efault_of_a_system_call_poisons_likewise():
    drain_poison()
    with memfd(PAGE) as fd:
        memory = GuestMemory([region(fd, PAGE)])
        other = GuestMemory([region(fd, PAGE)])
        memory.poison()
        assert memory.poisoned and poison_seen()
        assert not other.poisoned


def own_maps():
    with open("/proc/self/maps") as maps:
        return len(maps.readlines())


def test_one_replacement_serves_the_whole_of_a_truncated_mapping(page_kind):
    """A replacement a page would let a front-end use up vm.max_map_count."""
    page, huge = page_kind
    with memfd(8 * page, huge) as fd:
        memory = GuestMemory([region(fd, 8 * page)])
        os.truncate(fd, 0)
        before = own_maps()
        for start in range(0, 8, 2):
            memory.write(start * page, b"z")
            assert own_maps() <= before + 1
        assert memory.read(0, 1) == b"z"


def test_mappings_are_flat_after_a_thousand_truncations():
    def attack():
        with memfd(4 * PAGE) as fd:
            memory = GuestMemory([region(fd, 4 * PAGE)])
            os.truncate(fd, PAGE)
            assert memory.read(2 * PAGE, 1) == b"\0"
            assert memory.poisoned

    attack()
    before = own_maps()
    for _ in range(1000):
        attack()
    assert own_maps() <= before + 4


def test_part_of_a_huge_page_is_mapped_and_its_truncation_contained():
    offset, size = HUGE // 2 + PAGE + 5, HUGE
    with huge_pages(2), memfd(2 * HUGE, huge=True) as fd:
        memory = GuestMemory([region(fd, size, offset=offset)])
        with mmap.mmap(fd, 2 * HUGE) as area:
            area[offset : offset + 5] = b"first"
            area[offset + size - 4 : offset + size] = b"last"
        assert memory.read(0, 5) == b"first"
        assert memory.read(size - 4, 4) == b"last"
        os.truncate(fd, 0)
        assert memory.read(0, size) == bytes(size)
        assert memory.poisoned


# Faults that are not ours: each in a process of its own, which dies of them ----------------


PREFIX = """
import faulthandler, mmap, os, signal, sys
from vhostpy.memory.mapping import Mapping
from vhostpy.memory.guest import GuestMemory, RegionInfo

def truncated(size=65536):
    fd = os.memfd_create("x")
    os.truncate(fd, size)
    return fd

def contained():
    fd = truncated()
    memory = GuestMemory([RegionInfo(0, 65536, 0, Mapping(fd, 0, 65536))])
    os.truncate(fd, 0)
    memory.read(0, 1)
    assert memory.poisoned
    return memory

def foreign():
    fd = truncated()
    area = mmap.mmap(fd, 65536)
    os.truncate(fd, 0)
    return area[0]
"""


def run(body):
    script = textwrap.dedent(PREFIX) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_foreign_fault_still_kills():
    result = run("memory = contained(); print('before', flush=True); foreign(); print('after')")
    assert (result.returncode, result.stdout) == (-signal.SIGBUS, "before\n")


def test_a_fault_in_an_unmapped_mapping_is_foreign_again():
    result = run("""
        import ctypes
        fd = truncated()
        address = Mapping(fd, 0, 65536).address     # freed at once
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        MAP_SHARED_FIXED = 0x11
        got = libc.mmap(ctypes.c_void_p(address), ctypes.c_long(65536), 3, MAP_SHARED_FIXED,
                        fd, ctypes.c_long(0))
        assert got == address
        os.truncate(fd, 0)
        print("before", flush=True)
        ctypes.string_at(address, 1)
        print("after")
    """)
    assert (result.returncode, result.stdout) == (-signal.SIGBUS, "before\n")


@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_faulthandler_still_reports_foreign_faults(order):
    """It is below our handler, also if it was enabled later and another mapping came."""
    enable = "faulthandler.enable()\n"
    body = {
        "before": f"{enable}memory = contained()\nforeign()",
        "after": f"memory = contained()\n{enable}foreign()",
        "between": f"memory = contained()\n{enable}memory = contained()\nforeign()",
    }[order]
    result = run(body)
    assert result.returncode == -signal.SIGBUS
    assert result.stderr.count("Fatal Python error: Bus error") == 1
    assert "in foreign" in result.stderr


def test_a_signal_that_somebody_sent_goes_to_the_handler_before_ours():
    result = run("""
        signal.signal(signal.SIGBUS, lambda *_: print("handled"))
        memory = contained()
        os.kill(os.getpid(), signal.SIGBUS)
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
        memory = contained()
        os.kill(os.getpid(), signal.SIGBUS)
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        memory = contained()
        print("before", flush=True)
        os.kill(os.getpid(), signal.SIGBUS)
        print("after")
    """)
    assert (result.returncode, result.stdout) == (-signal.SIGBUS, "handled\nbefore\n")
