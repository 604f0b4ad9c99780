"""Memory that a hostile front-end shares: truncated, punched, swapped, withdrawn, stale.

Over sockets, beside the innocent; test_memory.py has the same without a session.
"""

import contextlib
import ctypes
import fcntl
import os
import random
import struct
import time

import pytest

from tests.hostile.attacker import (
    FEATURES,
    GOOD,
    LAYOUT,
    NEXT,
    QUEUES,
    SIZE,
    STATUS,
    WRITE,
    Attacker,
    each_device,
    each_layout,
    meanwhile,
    proves_itself,
)
from tests.hostile.pages import huge_pages
from tests.hostile.victim import eventually
from tests.rings import AVAIL, DESC, END, GPA, TABLES, USED
from vhostpy._spec import Feature
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.memory.guest import DirtyLog
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import encode
from vhostpy.protocol.payloads import MemoryRegion, MemoryTable, SingleRegion, VringAddress
from vhostpy.system.fds import OwnedFd

PUNCH_HOLE, KEEP_SIZE = 2, 1
HUGE = 2 << 20


def punch(fd: int, offset: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    code = libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(size))
    assert code == 0, os.strerror(ctypes.get_errno())


def busy(attacker: Attacker, kind: str) -> None:
    """Traffic of all that there is: descriptors, data both ways, status."""
    attacker.memory.write(STATUS, struct.pack("<IIQ", 0, 0, 0))
    request = [(STATUS, 16), (GOOD, 512, WRITE), (STATUS + 16, 1, WRITE)]
    for _ in range(8):
        attacker.ring.offer_chain(*(request if kind == "blk" else [(GOOD, 1024)]))
    attacker.kick()


# Files that shrink -------------------------------------------------------------------------


@each_layout
@each_device
@pytest.mark.parametrize("kept", [0, 1 << 20, 2 << 20], ids=["nothing", "the ring", "a region"])
def test_memory_truncated_while_in_use_ends_its_session(place, kind, layout, kept):
    name, index = QUEUES[kind]
    with (
        place.unnoticed(),
        place.one_error("truncated"),
        Attacker(place.path(name), index, kind=layout) as attacker,
    ):
        proves_itself(attacker, kind)
        busy(attacker, kind)
        os.ftruncate(attacker.end.shared.fd.fileno(), kept)
        busy(attacker, kind)
        assert attacker.end.hung_up()


@each_device
def test_memory_in_huge_pages_truncated_while_in_use(place, kind):
    name, index = QUEUES[kind]
    with huge_pages(2), place.unnoticed(), place.one_error("truncated"):
        make = os.memfd_create
        flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "memfd_create", lambda name, _=0: make(name, flags))
            attacker = Attacker(place.path(name), index)
        with attacker:
            proves_itself(attacker, kind)
            busy(attacker, kind)
            os.ftruncate(attacker.end.shared.fd.fileno(), 0)
            busy(attacker, kind)
            assert attacker.end.hung_up()


def test_memory_truncated_and_grown_all_the_while(place):
    """Faults in all places: in the poll loop, in a copy, in control, in the kernel."""
    dice = random.Random(4)
    with place.unnoticed():
        for i in range(30):
            name, index = [("bad0", 1), ("badram", 0), ("badfile", 0)][i % 3]
            attacker = Attacker(place.path(name), index)
            fd = attacker.end.shared.fd.fileno()

            def shake(fd: int = fd) -> None:
                os.ftruncate(fd, dice.choice([0, 4096, 1 << 20, 3 << 20]))
                os.ftruncate(fd, 4 << 20)

            with meanwhile(shake):
                for _ in range(10):
                    busy(attacker, "net" if index else "blk")
                with contextlib.suppress(OSError):
                    attacker.end.stop_queue(index)
            attacker.end.close()


def test_receiver_that_truncates_its_memory_under_the_senders_copy(place):
    with (
        place.unnoticed(),
        place.one_error("bad0", "truncated"),
        Attacker(place.path("bad0"), 0) as receiver,
        Attacker(place.path("bad1"), 1) as sender,
    ):
        receiver.ring.descriptor(0, GOOD, 2048, WRITE)
        receiver.offer(*[0] * SIZE)
        sender.send(to=b"\x02\0\0\0\xff\xff")
        os.ftruncate(receiver.end.shared.fd.fileno(), 2 << 20)  # the ring stays
        for _ in range(5):
            sender.send(to=b"\x02\0\0\0\xff\xff")
        assert receiver.end.hung_up()
        sender.send()


@each_device
def test_dirty_log_truncated_while_in_use_ends_its_session(place, kind):
    name, index = QUEUES[kind]
    with (
        place.unnoticed(),
        place.one_error("log was truncated"),
        Attacker(place.path(name), index) as attacker,
        OwnedFd(os.memfd_create("log")) as log,
    ):
        size = END // 4096 // 8
        os.ftruncate(log.fileno(), size)
        attacker.end.set_log(log, size)
        attacker.end.set_features(attacker.end.features | 1 << Feature.LOG_ALL)
        attacker.end.set_addresses(attacker.queue, USED)
        proves_itself(attacker, kind)
        os.ftruncate(log.fileno(), 0)
        busy(attacker, kind)
        assert attacker.end.hung_up()


@each_device
@pytest.mark.parametrize("size", [1, 4096])
def test_dirty_log_shorter_than_memory_is_not_written_past(place, kind, size):
    """CVE-2019-14835"""
    name, index = QUEUES[kind]
    with (
        place.unnoticed(),
        Attacker(place.path(name), index) as attacker,
        OwnedFd(os.memfd_create("log")) as log,
    ):
        os.ftruncate(log.fileno(), 8192)
        attacker.end.set_log(log, size)
        attacker.end.set_features(attacker.end.features | 1 << Feature.LOG_ALL)
        # The first page that has no bit is the one behind size * 8 others.
        for used_log in (USED, 0, 2**63, size * 8 << 12, size * 8 + 9 << 12):
            attacker.end.set_addresses(attacker.queue, used_log)
            proves_itself(attacker, kind)
        assert os.pread(log.fileno(), 8192, size) == bytes(8192 - size)
        assert DirtyLog(log.fileno(), 0, 8192).pages() == [0]


# Holes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("disk", ["badram", "badfile"])
def test_holes_punched_under_io_lose_and_invent_no_byte(place, disk):
    """As balloons do: a page given up reads as zeros, and a page written to is there."""
    with place.unnoticed(), Attacker(place.path(disk)) as attacker:
        fd = attacker.end.shared.fd.fileno()
        start = GOOD - LAYOUT[1][0] + LAYOUT[0][1]  # of GOOD in the file
        blocks = {i: os.urandom(2048) + bytes(2048) for i in range(20)}
        for i, block in blocks.items():
            assert attacker.request(1, 8 * i, block) == 0
            punch(fd, start, 4096)
            assert attacker.request(1, 8 * i + 4, bytes(2048)) == 0
        for i, block in blocks.items():
            punch(fd, start, 4096)
            assert attacker.request(0, 8 * i, 4096) == 0
            assert attacker.memory.read(GOOD, 4096) == block
        assert attacker.request(1, 4000, b"\xaa" * 4096) == 0
        with meanwhile(lambda: punch(fd, start, 4096)):
            for i in range(200):
                assert attacker.request(i % 2, 4000, b"\xaa" * 4096) == 0
        # Whatever raced: each byte is what was written once, or a hole's zero.
        assert attacker.request(0, 4000, 4096) == 0
        assert set(attacker.memory.read(GOOD, 4096)) <= {0, 0xAA}
        for i, block in blocks.items():
            assert attacker.request(0, 8 * i, 4096) == 0
            assert attacker.memory.read(GOOD, 4096) == block


# Tables that change ------------------------------------------------------------------------


def table_of(attacker: Attacker, fd: OwnedFd | None = None) -> None:
    regions = attacker.end.shared.regions
    fds = [fd or attacker.end.shared.fd] * len(regions)
    attacker.end.request(R.SET_MEM_TABLE, MemoryTable(regions), fds)


@each_layout
@each_device
def test_memory_table_swapped_a_thousand_times_under_traffic(place, kind, layout):
    name, index = QUEUES[kind]
    with place.unnoticed(), Attacker(place.path(name), index, kind=layout) as attacker:
        sent = 0
        for i in range(1000):
            if i % 4 == 0:
                busy(attacker, kind)
                sent += 8
            if i % 4 == 3:
                attacker.comes_back(8)
            table_of(attacker)
        proves_itself(attacker, kind)


@each_layout
@each_device
def test_region_withdrawn_under_a_running_ring(place, kind, layout):
    name, index = QUEUES[kind]
    with place.unnoticed(), Attacker(place.path(name), index, kind=layout) as attacker:
        region = attacker.end.shared.regions[0]  # the ring's own
        other = attacker.end.shared.regions[1]  # that of its buffers
        for _ in range(20):
            busy(attacker, kind)
            attacker.end.rem_mem_reg(region)
            attacker.end.add_mem_reg(region)
            attacker.comes_back(8)
        before = place.victim.counters(name)["chain_faults.unmapped"]
        attacker.end.rem_mem_reg(other)
        busy(attacker, kind)
        if kind == "net":
            attacker.comes_back(8)
        else:
            # No request has a status byte now: all wait for the region.
            assert attacker.queue.wait_err()
        faults = place.victim.counters(name)["chain_faults.unmapped"] - before
        assert faults == (8 if kind == "net" else 1)
        attacker.end.add_mem_reg(other)
        if kind == "blk":
            assert [length for _, length in attacker.comes_back(8)] == [513] * 8
            assert attacker.memory.read(STATUS + 16, 1) == b"\0"
        proves_itself(attacker, kind)


def test_ring_moved_into_a_region_that_is_then_truncated(place):
    with (
        place.unnoticed(),
        place.one_error("bad0", "truncated"),
        Attacker(place.path("bad0"), 1) as attacker,
    ):
        fd = OwnedFd(os.memfd_create("elsewhere"))
        os.ftruncate(fd.fileno(), 1 << 20)
        region = MemoryRegion(1 << 40, 1 << 20, 1 << 41, 0)
        attacker.end.add_mem_reg(region, fd)
        place_of_ring = VringAddress(1, 0, 1 << 41, (1 << 41) + 0x20000, (1 << 41) + 0x10000, 0)
        attacker.end.request(R.SET_VRING_ADDR, place_of_ring)
        os.ftruncate(fd.fileno(), 0)
        fd.close()
        attacker.kick()
        assert attacker.end.hung_up()


def test_regions_of_one_byte_and_509_of_them(place):
    """An indirect table, and each of its descriptors, cut into regions of one byte."""
    with place.unnoticed(), Attacker(place.path("badram")) as attacker:
        gpa = 1 << 40
        for i in range(500):
            region = MemoryRegion(gpa + i, 1, (1 << 41) + (i << 12), GPA % 4096 + i)
            attacker.end.add_mem_reg(region)
        # The file's first bytes are the raw ring's table too: descriptors 0 to 30.
        attacker.memory.write(STATUS, struct.pack("<IIQ", 8, 0, 0))
        for i, piece in enumerate(
            [(STATUS, 16, NEXT, 1), (GOOD, 20, NEXT | WRITE, 2), (STATUS + 16, 1, WRITE, 0)]
        ):
            attacker.ring.descriptor(i, *piece)
        attacker.ring.descriptor(40, gpa, 48, 4)
        attacker.offer(40)
        assert attacker.comes_back() == [(40, 21)]
        assert attacker.memory.read(STATUS + 16, 1) == b"\0"
        # Data over regions of one byte.
        attacker.ring.descriptor(41, STATUS, 16, NEXT, 42)
        attacker.ring.descriptor(42, gpa + 480, 20, NEXT | WRITE, 43)
        attacker.ring.descriptor(43, STATUS + 16, 1, WRITE)
        attacker.offer(41)
        assert attacker.comes_back() == [(41, 21)]
        # One byte beyond the last region.
        attacker.ring.descriptor(42, gpa + 481, 20, NEXT | WRITE, 43)
        before = place.victim.counters("badram")["chain_faults.unmapped"]
        attacker.offer(41)
        assert attacker.comes_back() == [(41, 1)]
        assert attacker.memory.read(STATUS + 16, 1) == b"\1"
        assert place.victim.counters("badram")["chain_faults.unmapped"] == before + 1


def test_files_that_may_block_or_cannot_be_written(place, tmp_path):
    readonly = tmp_path / "readonly"
    readonly.write_bytes(bytes(4096))
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(sealed, 4096)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with place.unnoticed():
        for fd in (os.open(readonly, os.O_RDONLY), sealed, os.open("/dev/zero", os.O_RDWR)):
            with place.one_error("bad0"), OwnedFd(fd) as owned, FrontEnd(place.path("bad0")) as end:
                end.negotiate(FEATURES, (1 << 24) - 1)
                region = SingleRegion(MemoryRegion(0, 4096, 0, 0))
                end.send_raw(encode(R.ADD_MEM_REG, region), [owned])
                assert end.hung_up()


# Those who come after ----------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("end", ["hangs up", "is ended", "truncates"])
def test_three_front_ends_in_turn_write_nothing_at_each_others_addresses(place, kind, end):
    """A stale ring address once let a later SET_MEM_TABLE write into the next guest."""
    name, index = QUEUES[kind]
    with place.unnoticed():
        for turn in range(3):
            # The same addresses, but the rings lie elsewhere in each: what the last one
            # used is plain memory of this one, and full of marks.
            attacker = Attacker(place.path(name), index, start=False)
            marks = os.urandom(0x1000)
            for at in (DESC, AVAIL, USED, TABLES):
                attacker.memory.write(at, marks)
            quiet = attacker.memory.read(GPA, 1 << 20)
            attacker.end.queues.pop(index).close()
            queue = attacker.end.start_queue(index, 16)
            assert queue.desc_gpa >= GPA + (1 << 20)
            for i in range(20):
                table_of(attacker)
                queue.ring.add([(GOOD, 600)], [(STATUS, 1)])
                queue.ring.kick()
                queue.wait_used()
                assert attacker.memory.read(GPA, 1 << 20) == quiet, (turn, i)
            attacker.end.close()
            # And one that uses exactly those addresses, and goes in its own way.
            with Attacker(place.path(name), index) as other:
                proves_itself(other, kind)
                busy(other, kind)
                if end == "is ended":
                    other.end.send_raw(b"\xff" * 64)
                    assert other.end.hung_up()
                if end == "truncates":
                    os.ftruncate(other.end.shared.fd.fileno(), 0)
                    other.kick()
                    assert other.end.hung_up()
            eventually(place.victim.is_quiet)


def test_memory_of_a_front_end_that_went_is_not_written_to(place):
    """Its file lives on in our hands: not a byte changes after the session's end."""
    with place.unnoticed():
        receiver = Attacker(place.path("bad0"), 0)
        for i in range(SIZE):
            receiver.ring.descriptor(i, GOOD + 2048 * i, 2048, WRITE)
        receiver.offer(*range(SIZE))
        memory = receiver.memory
        receiver.end.sock.close()
        eventually(place.victim.is_quiet)
        before = memory.read(GPA, 4 << 20)
        with Attacker(place.path("bad1"), 1) as sender:
            for _ in range(20):
                sender.send()
        place.innocent.goes_on()
        assert memory.read(GPA, 4 << 20) == before
        receiver.end.close()


def test_stale_ring_is_not_started_by_the_next_ones_table(place):
    """The first sets addresses and goes; the second sends memory, and never a ring."""
    with place.unnoticed():
        with Attacker(place.path("bad0"), 1) as first:
            first.send()
        with FrontEnd(place.path("bad0"), layout=LAYOUT) as second:
            second.negotiate(FEATURES, (1 << 24) - 1)
            second.memory.write(AVAIL + 2, b"\x08\0")
            before = second.memory.read(GPA, 4 << 20)
            second.set_mem_table()
            second.get_features()
            place.innocent.goes_on()
            time.sleep(0.05)
            assert second.memory.read(GPA, 4 << 20) == before
