"""Our storages on block devices of a guest's kernel: test_block_device.py runs these in there.

/dev/vda is a RAM disk of ours, with all that a disk can do. /dev/vdb has been told to fail
each request that clears. /dev/vdc has no SECURE_ERASE. /dev/vdd has blocks of 4096 bytes.
"""

import fcntl
import os
import struct
from pathlib import Path

import pytest

from tests.backends.guest import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    SECURE_ERASE,
    UNSUPP,
    WRITE_ZEROES,
)
from tests.backends.machine import Machine
from vhostpy._spec import Feature
from vhostpy.backends.blk.clear import MAX_CLEAR_SECTORS, MAX_CLEAR_SEGMENTS
from vhostpy.backends.blk.device import CONFIG, CONFIG_FIELDS
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.uring import UringStorage

KIB64 = 128  # sectors
BLKSECDISCARD = 0x127D  # linux/fs.h

each_storage = pytest.mark.parametrize("open_storage", [FileStorage, UringStorage])
each_clear = pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES, SECURE_ERASE])


def ranges(*pairs):
    return b"".join(struct.pack("<QII", sector, sectors, 0) for sector, sectors in pairs)


def pattern(sector):
    return bytes([1 + sector // KIB64]) * 512 * KIB64


@each_storage
@each_clear
def test_what_is_cleared_reads_as_zeros_and_its_neighbours_stay(open_storage, kind):
    model = bytearray(b"".join(pattern(sector) for sector in range(0, 8 * KIB64, KIB64)))
    with Machine(open_storage("/dev/vda")) as machine:
        guest = machine.guest
        for sector in range(0, 8 * KIB64, KIB64):
            assert guest.request(OUT, sector, data=pattern(sector)).wait() == OK
        # A sector in a page, pages, pages and sectors.
        cleared = [(3, 1), (KIB64, KIB64), (3 * KIB64 + 5, 2 * KIB64)]
        assert guest.request(kind, data=ranges(*cleared)).wait() == OK
        for sector, sectors in cleared:
            model[sector * 512 : (sector + sectors) * 512] = bytes(sectors * 512)
        assert contents(guest) == model
    # Not only the kernel's copy of it.
    Path("/proc/sys/vm/drop_caches").write_text("3")
    with Machine(open_storage("/dev/vda")) as machine:
        assert contents(machine.guest) == model


def contents(guest):
    found = b""
    for sector in range(0, 8 * KIB64, KIB64):
        read = guest.request(IN, sector, space=512 * KIB64)
        assert read.wait() == OK
        found += read.data
    return found


@each_storage
@each_clear
def test_the_largest_request_is_carried_out(open_storage, kind):
    with Machine(open_storage("/dev/vda")) as machine:
        guest = machine.guest
        last = machine.storage.size_bytes // 512 - KIB64
        first = last + KIB64 - MAX_CLEAR_SECTORS
        for sector in (first - KIB64, first, last):
            assert guest.request(OUT, sector, data=b"x" * 512 * KIB64).wait() == OK
        assert guest.request(kind, data=ranges((first, MAX_CLEAR_SECTORS))).wait() == OK
        for sector, fill in ((first - KIB64, b"x"), (first, b"\0"), (last, b"\0")):
            read = guest.request(IN, sector, space=512 * KIB64)
            assert (read.wait(), read.data) == (OK, fill * 512 * KIB64)
        many = [(sector, 1) for sector in range(first - KIB64, first, 4)]
        assert len(many) == MAX_CLEAR_SEGMENTS
        assert guest.request(kind, data=ranges(*many)).wait() == OK
        read = guest.request(IN, first - KIB64, space=512 * KIB64)
        assert (read.wait(), read.data) == (OK, (bytes(512) + b"x" * 1536) * MAX_CLEAR_SEGMENTS)


@each_storage
@each_clear
def test_a_device_that_fails_is_an_error_of_that_request_alone(open_storage, kind):
    with Machine(open_storage("/dev/vdb")) as machine:
        guest = machine.guest
        assert guest.request(OUT, 0, data=pattern(0)).wait() == OK
        assert guest.request(FLUSH).wait() == OK
        data = [ranges((0, 8)), ranges((8, 8), (16, 8))]
        statuses = [guest.request(kind, data=some).wait() for some in data]
        # Some kernels write the zeros themselves that the device does not.
        zeroed = kind == WRITE_ZEROES and statuses == [OK, OK]
        assert zeroed or statuses == [IOERR, IOERR]
        assert machine.counters()["io_errors"] == (0 if zeroed else 3)
        read = guest.request(IN, 0, space=512 * KIB64)
        assert read.wait() == OK
        cleared = 24 * 512 if zeroed else 0
        assert read.data == bytes(cleared) + pattern(0)[cleared:]


@each_storage
def test_a_device_that_cannot_erase_is_not_said_to(open_storage):
    with Machine(open_storage("/dev/vdc")) as machine:
        assert not machine.disk.features() >> Feature.BLK_SECURE_ERASE & 1
        assert machine.disk.features() >> Feature.BLK_DISCARD & 1
        assert machine.guest.request(SECURE_ERASE, data=ranges((0, 8))).wait() == UNSUPP


@each_storage
def test_a_device_of_large_blocks_erases_whole_ones_and_says_so(open_storage):
    with Machine(open_storage("/dev/vdd")) as machine:
        guest = machine.guest
        config = dict(zip(CONFIG_FIELDS, CONFIG.unpack(machine.disk.config()), strict=True))
        assert (config["blk_size"], config["secure_erase_sector_alignment"]) == (512, 8)
        assert guest.request(OUT, 0, data=pattern(0)).wait() == OK
        assert guest.request(SECURE_ERASE, data=ranges((8, 8))).wait() == OK
        assert guest.request(SECURE_ERASE, data=ranges((25, 1))).wait() == IOERR
        # Of these any sector will do: what the device does not take is written.
        assert guest.request(WRITE_ZEROES, data=ranges((33, 1))).wait() == OK
        assert guest.request(DISCARD, data=ranges((41, 1))).wait() == OK
        read = guest.request(IN, 0, space=512 * KIB64)
        assert read.wait() == OK
        changed = {sector for sector in range(KIB64) if read.data[512 * sector] == 0}
        # The kernel's copy of what it then refuses to clear may be gone.
        assert {*range(8, 16), 33} <= changed <= {*range(8, 16), 25, 33, 41}
        whole = [pattern(0)[:512], bytes(512)]
        assert read.data == b"".join(whole[sector in changed] for sector in range(KIB64))


@each_storage
def test_a_read_only_disk_is_not_erased(open_storage):
    with Machine(open_storage("/dev/vda", read_only=True)) as machine:
        assert not machine.disk.features() >> Feature.BLK_SECURE_ERASE & 1
        assert machine.guest.request(SECURE_ERASE, data=ranges((0, 8))).wait() == UNSUPP


def test_the_kernel_has_our_limits():
    queue = Path("/sys/block/vda/queue")
    limits = {name: int((queue / name).read_text()) for name in (
        "discard_max_bytes", "write_zeroes_max_bytes", "max_discard_segments",
        "discard_granularity")}  # fmt: skip
    assert limits == {
        "discard_max_bytes": MAX_CLEAR_SECTORS * 512,
        "write_zeroes_max_bytes": MAX_CLEAR_SECTORS * 512,
        "max_discard_segments": MAX_CLEAR_SEGMENTS,
        # Of both alignments the smaller one: a secure erase takes any block.
        "discard_granularity": 512,
    }


def test_the_kernel_cuts_a_secure_erase_at_our_limit():
    """sysfs says nothing of it; that these are two requests, the disk's counters do."""
    fd = os.open("/dev/vda", os.O_RDWR)
    try:
        fcntl.ioctl(fd, BLKSECDISCARD, struct.pack("=QQ", 0, (MAX_CLEAR_SECTORS + 1) * 512))
    finally:
        os.close(fd)
