"""What disks do: fail here and there, answer late and in any order, move less than asked."""

import errno
import logging
import os
import struct

import pytest

from tests.backends.guest import DISCARD, FLUSH, IN, IOERR, OK, OUT, WRITE_ZEROES, Guest
from tests.backends.machine import Machine
from tests.backends.test_storage import assert_is_a_bytearray, channel_of
from tests.faulty import FaultyStorage
from tests.short import short_files
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.backends.storage.storage import Op
from vhostpy.backends.storage.uring import UringStorage

SIZE = 1 << 20
SLOT = 8192
QUEUES = 4


def machine_of(storage):
    return Machine(storage, guest=Guest(16 << 20, queues=QUEUES, queue_size=128), workers=2)


def sectors(slot):
    return slot * SLOT // 512


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_answers_find_their_requests_however_late_they_come(seed):
    with machine_of(FaultyStorage(RamStorage(SIZE), seed=seed, late=40)) as machine:
        guest = machine.guest
        for round_ in range(8):
            data = [os.urandom(512 * (1 + (slot + round_) % 16)) for slot in range(SIZE // SLOT)]
            sent = [
                guest.request(OUT, sectors(slot), data=piece, cuts=[700], index=slot % QUEUES)
                for slot, piece in enumerate(data)
            ]
            sent += [guest.request(FLUSH, index=index) for index in range(QUEUES)]
            assert {request.wait() for request in sent} == {OK}
            read = [
                guest.request(IN, sectors(slot), space=len(piece), index=(slot + 1) % QUEUES)
                for slot, piece in enumerate(data)
            ]
            assert [(request.wait(), request.data) for request in read] == [
                (OK, piece) for piece in data
            ]


def test_what_fails_is_what_touches_the_bad_place(caplog):
    storage = FaultyStorage(RamStorage(SIZE), late=10)
    storage.fail(Op.READ, errno.EIO, 5 * SLOT, 6 * SLOT)
    storage.fail(Op.WRITE, errno.ENOSPC, 9 * SLOT, 12 * SLOT)
    storage.fail(Op.WRITE, errno.EIO, 20 * SLOT, 21 * SLOT, torn=True)
    storage.fail(Op.DISCARD, errno.EIO, 30 * SLOT, 31 * SLOT)
    storage.fail(Op.WRITE_ZEROES, errno.EIO, 40 * SLOT, 41 * SLOT)
    with machine_of(storage) as machine, caplog.at_level(logging.ERROR, "vhostpy"):
        guest = machine.guest

        def all_of(kind, **options):
            """The slots that failed."""
            sent = [
                guest.request(kind, sectors(slot), index=slot % QUEUES, **options)
                for slot in range(SIZE // SLOT)
            ]
            failed = [slot for slot, request in enumerate(sent) if request.wait() == IOERR]
            assert all(request.status in (OK, IOERR) for request in sent)
            return failed, sent

        assert all_of(OUT, data=b"a" * SLOT)[0] == [9, 10, 11, 20]
        failed, sent = all_of(IN, space=SLOT)
        assert failed == [5]
        assert all(request.data == b"a" * SLOT for slot, request in enumerate(sent)
                   if slot not in (5, 9, 10, 11, 20))  # fmt: skip
        for kind, bad in ((DISCARD, 30), (WRITE_ZEROES, 40)):
            for slots, status in (([bad + 1, bad + 2], OK), ([bad + 1, bad, bad + 2], IOERR)):
                ranges = b"".join(struct.pack("<QII", sectors(slot), 16, 0) for slot in slots)
                assert guest.request(kind, data=ranges).wait() == status
        assert sum(machine.counters(index)["io_errors"] for index in range(QUEUES)) == 7
        storage.heal()
        assert all_of(OUT, data=b"b" * SLOT)[0] == []
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == [
        line for line in [caplog.records[0].getMessage()] if "further ones are only counted" in line
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with short_files(tmp_path_factory.mktemp("short"), SIZE) as directory:
        if directory is None:
            pytest.skip("cannot mount FUSE: run as root")
        yield directory


STORAGES = {
    "threads": lambda path: FileStorage(str(path)),
    "io_uring": lambda path: UringStorage(str(path)),
}


# Short reads, and transfers of nothing, only by threads: the kernel itself goes on with those
# of io_uring; on FUSE (6.18) from the wrong place, or for ever. (More pieces than it takes at
# a time are short reads to us too.)


def test_short_transfers_are_continued(files):
    mix = [
        (Op.WRITE, 3, 40, 4096, 1, 0), (Op.WRITE, 100, 33, 1000, 2, 0),
        (Op.READ, 0, 150, 700, 0, 0), (Op.WRITE_ZEROES, 20, 90, 4096, 0, 0),
        (Op.READ, 10, 130, 4096, 0, 0), (Op.FLUSH, 0, 0, 512, 0, 0),
    ]  # fmt: skip
    with channel_of(FileStorage(str(files / "short"))) as channel:
        assert channel.run(Op.WRITE_ZEROES, 0, SIZE)[0] == 0
        assert_is_a_bytearray(channel, SIZE, mix, gap=8)
    data = os.urandom(100_000 // 512 * 512)
    with channel_of(UringStorage(str(files / "short"))) as channel:
        assert channel.run(Op.WRITE, 512, len(data), data, gap=8)[0] == 0
        assert channel.run(Op.WRITE_ZEROES, 8192, 4096)[0] == 0
    with channel_of(FileStorage(str(files / "short"))) as channel:
        expected = data[:7680] + bytes(4096) + data[7680 + 4096 :]
        assert channel.run(Op.READ, 512, len(data)) == (0, expected)


@pytest.mark.parametrize("kind", STORAGES)
def test_transfers_that_end_in_the_middle_fail(files, kind):
    half, data = SIZE // 2, os.urandom(64 << 10)
    for name, op, error in (
        ("full", Op.WRITE, errno.ENOSPC), ("broken", Op.READ, errno.EIO),
        ("ended", Op.WRITE, errno.EIO), ("ended", Op.READ, errno.EIO),
    ):  # fmt: skip
        if (name, kind) == ("ended", "io_uring"):
            continue
        with channel_of(STORAGES[kind](files / name)) as channel:
            for offset in (half - (32 << 10), half):
                sent = data if op == Op.WRITE else b""
                assert channel.run(op, offset, len(data), sent)[0] == -error, (name, offset)
            assert channel.run(op, 0, len(data), data if op == Op.WRITE else b"")[0] == 0
