"""A guest's disk requests over real rings, on every storage, by real workers."""

import errno
import logging
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.guest import (
    DISCARD,
    FLUSH,
    GET_ID,
    GPA,
    IN,
    IOERR,
    OK,
    OUT,
    SECURE_ERASE,
    UNTOUCHED,
    WRITE_ZEROES,
    Guest,
    Sent,
    eventually,
)  # fmt: skip
from tests.backends.machine import SECTORS, SIZE, STORAGES, Machine, each_layout
from tests.gate import GateStorage
from vhostpy._spec import Feature
from vhostpy.backends.storage.null import NullStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.memory.guest import DirtyLog

# What a guest reads is what it wrote -------------------------------------------------

steps = st.tuples(
    st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES]),
    st.integers(0, SECTORS - 1),
    st.one_of(st.integers(0, 8), st.integers(0, 200)),
    st.integers(0, 255),
    st.lists(st.integers(1, 5000), max_size=6),
)


@each_layout
@pytest.mark.parametrize("kind", STORAGES)
@settings(max_examples=25, deadline=None)
@given(mix=st.lists(steps, max_size=40))
def test_any_mix_of_requests_leaves_what_a_bytearray_says(tmp_path_factory, features, kind, mix):
    model = bytearray(SIZE)
    storage = STORAGES[kind](tmp_path_factory.mktemp("disk"))
    with Machine(storage, guest=Guest(features=features), serial="vb-1") as machine:
        guest = machine.guest
        for type_, sector, sectors, fill, cuts in mix:
            sectors = min(sectors, SECTORS - sector)
            span = slice(sector * 512, (sector + sectors) * 512)
            size = sectors * 512
            if type_ == IN:
                sent = guest.request(IN, sector, space=size, cuts=cuts)
                assert sent.wait() == OK
                assert sent.data == model[span]
                assert sent.length == size + 1
            elif type_ == OUT:
                data = bytes((fill + i) % 253 for i in range(size))
                sent = guest.request(OUT, sector, data=data, cuts=cuts)
                assert sent.wait() == OK
                assert sent.length == 1
                model[span] = data
            elif type_ == FLUSH:
                assert guest.request(FLUSH, cuts=cuts).wait() == OK
            elif type_ == GET_ID:
                space = fill % 40
                sent = guest.request(GET_ID, space=space, cuts=cuts)
                assert sent.wait() == OK
                serial = b"vb-1".ljust(20, b"\0")
                assert sent.data == (serial + bytes([UNTOUCHED]) * 20)[:space]
                assert sent.length == min(space, 20) + 1
            else:
                ranges = struct.pack("<QII", sector, sectors, 0)
                sent = guest.request(type_, data=ranges, cuts=cuts)
                assert sent.wait() == OK
                if type_ == WRITE_ZEROES:
                    model[span] = bytes(size)
                elif size:
                    read = guest.request(IN, sector, space=size)
                    assert read.wait() == OK
                    model[span] = read.data
        counters = machine.counters()
        assert counters["io_errors"] == counters["bad_requests"] == counters["unsupported"] == 0


@each_layout
@pytest.mark.parametrize("kind", STORAGES)
def test_requests_in_flight_together_each_get_their_own_answer(tmp_path, features, kind):
    with Machine(STORAGES[kind](tmp_path), guest=Guest(features=features)) as machine:
        for round_ in range(20):
            sent = [
                machine.guest.request(
                    OUT, 8 * i, data=bytes([round_ + i & 0xFF]) * 4096, cuts=[16], kick=False
                )
                for i in range(20)
            ]
            machine.guest.drivers[0].kick()
            assert [request.wait() for request in sent] == [OK] * 20
            sent = [machine.guest.request(IN, 8 * i, space=4096, kick=False) for i in range(20)]
            machine.guest.drivers[0].kick()
            for i, request in enumerate(sent):
                assert request.wait() == OK
                assert request.data == bytes([round_ + i & 0xFF]) * 4096
        counters = machine.counters()
        assert counters["reads"] == counters["writes"] == 400
        assert counters["read_bytes"] == counters["write_bytes"] == 400 * 4096
        assert machine.guest.memory.in_use == 0


@pytest.mark.parametrize("poll", ["adaptive", "busy", "interrupt"])
@pytest.mark.parametrize("kind", ["file", "uring", "uring, O_DIRECT"])
def test_sleeping_workers_are_woken_by_kicks_and_completions(tmp_path, kind, poll):
    with Machine(STORAGES[kind](tmp_path), poll=poll) as machine:
        for i in range(30):
            eventually(lambda: machine.counters()["parked"])
            assert machine.guest.request(OUT, i, data=b"x" * 512).wait() == OK


def test_a_ring_without_a_kick_fd_is_polled():
    with Machine(RamStorage(SIZE)) as machine:
        machine.stop()
        machine.start(kick=False)
        for _ in range(5):
            sent = machine.guest.request(IN, space=512, kick=False)
            machine.guest.drivers[0].kick()
            assert sent.wait() == OK
        assert not machine.counters()["parked"]


def test_a_new_kick_fd_takes_over():
    with Machine(RamStorage(SIZE)) as machine:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        machine.disk.ring_kick(0, fd)
        eventually(lambda: machine.counters()["parked"])
        sent = machine.guest.request(IN, space=512)
        os.eventfd_write(fd, 1)
        assert sent.wait() == OK
        machine.disk.ring_kick(0, machine.guest.kicks[0])
        os.close(fd)
        assert machine.guest.request(IN, space=512).wait() == OK


def test_several_queues_share_a_disk():
    guest = Guest(queues=4)
    with Machine(RamStorage(SIZE), guest=guest, workers=2) as machine:
        for index in range(4):
            assert guest.request(OUT, index, data=bytes([index]) * 512, index=index).wait() == OK
        for index in range(4):
            read = guest.request(IN, index, space=512, index=3 - index)
            assert (read.wait(), read.data) == (OK, bytes([index]) * 512)
        assert {queue["worker"] for queue in machine.disk.status()["queues"]} == {0, 1}


def test_null_answers_without_touching_the_buffer():
    with Machine(NullStorage(1 << 40)) as machine:
        sent = machine.guest.request(IN, (1 << 31) - 8, space=4096)
        assert sent.wait() == OK
        assert sent.data == bytes([UNTOUCHED]) * 4096


def test_a_buffer_may_span_regions():
    with Machine(RamStorage(SIZE)) as machine:
        guest = machine.guest
        gpa = guest.border - 700
        guest.memory.write(gpa, bytes(range(256)) * 8)
        header = guest.put(struct.pack("<IIQ", OUT, 0, 0))
        status = guest.put(b"\xee")
        guest.send([(header, 16), (gpa, 2048)], [(status, 1)])
        eventually(lambda: guest.memory.read(status, 1) == b"\0")
        read = guest.request(IN, space=2048)
        assert (read.wait(), read.data) == (OK, bytes(range(256)) * 8)


def test_a_secure_erase_leaves_zeros_there_and_nothing_else_changed():
    with Machine(RamStorage(SIZE)) as machine:
        for sector in range(0, SECTORS, 128):
            assert machine.guest.request(OUT, sector, data=b"x" * 65536).wait() == OK
        # More than one poll's work, and less than a page.
        ranges = struct.pack("<QII", 3, SECTORS - 20, 0) + struct.pack("<QII", SECTORS - 9, 1, 0)
        assert machine.guest.request(SECURE_ERASE, data=ranges).wait() == OK
        got = b""
        for sector in range(0, SECTORS, 128):
            read = machine.guest.request(IN, sector, space=65536)
            assert read.wait() == OK
            got += read.data
        model = bytearray(b"x" * SIZE)
        model[3 * 512 : -17 * 512] = bytes(SIZE - 20 * 512)
        model[-9 * 512 : -8 * 512] = bytes(512)
        assert got == model
        counters = machine.counters()
        assert counters["secure_erases"] == 1 and counters["discards"] == 0
        assert machine.disk.latency()["secure_erase"]["count"] == 1


def test_a_secure_erase_has_its_ranges_where_linux_puts_them():
    with Machine(RamStorage(SIZE)) as machine:
        guest = machine.guest
        assert guest.request(OUT, data=b"x" * 8192).wait() == OK
        ranges = struct.pack("<QII", 1, 2, 0) + struct.pack("<QII", 9, 1, 0)
        header = guest.put(struct.pack("<IIQ", SECURE_ERASE, 0, 0))
        back = guest.put(ranges + bytes([UNTOUCHED]))
        pieces = [(back, 20), (back + 20, 12), (back + 32, 1)]
        erase = Sent(guest, guest.send([(header, 16)], pieces), back, len(ranges), 0)
        assert (erase.wait(), erase.length, erase.data) == (OK, 1, ranges)
        read = guest.request(IN, space=8192)
        assert read.wait() == OK
        model = bytearray(b"x" * 8192)
        model[512:1536] = bytes(1024)
        model[9 * 512 : 10 * 512] = bytes(512)
        assert read.data == model


def test_discard_of_several_ranges_is_answered_once():
    with Machine(RamStorage(SIZE)) as machine:
        assert machine.guest.request(OUT, 0, data=b"x" * 65536).wait() == OK
        ranges = b"".join(struct.pack("<QII", 16 * i, 8, 0) for i in range(8))
        assert machine.guest.request(DISCARD, data=ranges).wait() == OK
        read = machine.guest.request(IN, 0, space=65536)
        assert read.wait() == OK
        assert read.data == (bytes(4096) + b"x" * 4096) * 8
        assert machine.counters()["discards"] == 1


# Order and durability ----------------------------------------------------------------


def test_write_through_answers_a_write_when_it_is_flushed(tmp_path):
    # The gate takes one request at a time: the write, then a flush of ours behind it.
    storage = GateStorage(SIZE, capacity=1)
    with Machine(storage) as machine:
        machine.disk.write_config(32, b"\0")
        assert machine.disk.config()[32] == 0
        assert machine.disk.status()["write_cache"] is False
        sent = machine.guest.request(OUT, 0, data=b"x" * 512)
        storage.open()
        assert sent.wait() == OK
        seen = storage.passed
        assert seen == ["WRITE", "FLUSH"]
        machine.disk.write_config(32, b"\1")
        assert machine.guest.request(OUT, 0, data=b"y" * 512).wait() == OK
        assert storage.passed == ["WRITE", "FLUSH", "WRITE"]


def test_a_driver_that_cannot_flush_gets_write_through():
    storage = GateStorage(SIZE)
    storage.open()
    with Machine(storage) as machine:
        machine.negotiate(without=[Feature.BLK_FLUSH, Feature.BLK_CONFIG_WCE])
        ranges = struct.pack("<QII", 0, 8, 0) + struct.pack("<QII", 16, 8, 0)
        assert machine.guest.request(WRITE_ZEROES, data=ranges).wait() == OK
        assert storage.passed == ["WRITE_ZEROES", "WRITE_ZEROES", "FLUSH"]
        machine.negotiate()
        assert machine.guest.request(OUT, data=b"y" * 512).wait() == OK
        assert storage.passed[3:] == ["WRITE"]


# Errors ------------------------------------------------------------------------------


def test_a_storage_error_is_ioerr_counted_and_told_once(caplog):
    storage = GateStorage(SIZE)
    storage.open()
    storage.fail(errno.ENOSPC)
    with Machine(storage) as machine, caplog.at_level(logging.ERROR, "vhostpy"):
        for _ in range(3):
            sent = machine.guest.request(OUT, 2, data=b"x" * 512)
            assert (sent.wait(), sent.length) == (IOERR, 1)
        assert os.eventfd_read(machine.workers.bell_fd) == 1
        assert machine.counters()["io_errors"] == 3
        storage.fail(0)
        assert machine.guest.request(OUT, 2, data=b"x" * 512).wait() == OK
    assert [record.getMessage() for record in caplog.records] == [
        "vb0: gate before ram 1M: write at byte 1024: No space left on device "
        "(further ones are only counted)"
    ]


@pytest.mark.parametrize("kind", ["file", "uring", "uring, O_DIRECT"])
def test_an_image_truncated_under_us_is_ioerr(tmp_path, kind):
    with Machine(STORAGES[kind](tmp_path)) as machine:
        os.truncate(tmp_path / "disk.img", 4096)
        assert machine.guest.request(IN, 16, space=512).wait() == IOERR
        assert machine.guest.request(IN, 0, space=4096).wait() == OK


def test_one_bad_range_fails_the_whole_discard_once(tmp_path):
    storage = GateStorage(SIZE)
    storage.open()
    storage.fail(errno.EIO)
    with Machine(storage) as machine:
        ranges = struct.pack("<QII", 0, 8, 0) * 5
        assert machine.guest.request(WRITE_ZEROES, data=ranges).wait() == IOERR
        assert machine.counters()["io_errors"] == 5
        storage.fail(0)


# Dirty log ---------------------------------------------------------------------------


def test_what_is_written_into_guest_memory_is_logged():
    log_fd = os.memfd_create("log")
    with Machine(RamStorage(SIZE)) as machine:
        guest = machine.guest
        pages = (GPA + guest.size) // 4096
        os.ftruncate(log_fd, pages // 8)
        log = DirtyLog(log_fd, 0, pages // 8)
        with machine.held():
            machine.rings[0].set_log(log, None)
        guest.next = -(-guest.next // 65536) * 65536
        read = guest.request(IN, space=3 * 4096, cuts=[100, 5000])
        assert read.wait() == OK
        first = read.back // 4096
        assert log.pages() == [*range(first, (read.back + 3 * 4096) // 4096 + 1)]
        guest.next = -(-guest.next // 65536) * 65536
        write = guest.request(OUT, data=b"x" * 4096 * 4)
        assert write.wait() == OK
        assert set(log.pages()) - {*range(first, first + 4)} == {write.back // 4096}
    os.close(log_fd)
