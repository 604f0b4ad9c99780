"""A guest's disk requests over real rings, on every storage, by real workers."""

import asyncio
import errno
import logging
import os
import struct
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.guest import (
    DISCARD,
    FEATURES,
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
    eventually,
)  # fmt: skip
from tests.rings import base_of
from vhostpy._spec import Feature
from vhostpy.backends.blk import DiskQueue
from vhostpy.backends.disk import CONFIG, CONFIG_FIELDS, Disk
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.gate import GateStorage
from vhostpy.backends.storage.null import NullStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.backends.storage.uring import UringStorage
from vhostpy.errors import ConfigError, ProtocolError
from vhostpy.memory import DirtyLog
from vhostpy.worker import Workers

SIZE = 1 << 20
SECTORS = SIZE // 512


def image(path, size=SIZE):
    with open(path, "wb") as file:
        file.truncate(size)
    return str(path)


class Machine:
    """A guest, its disk, and the part of the data plane that starts and stops rings."""

    def __init__(self, storage, *, poll="adaptive", workers=1, guest=None, **options):
        self.guest = guest or Guest()
        self.storage = storage
        self.workers = Workers(workers, poll=poll)
        self.disk = Disk("vb0", storage, self.workers, **options)
        self.rings = {}

    def __enter__(self):
        self.workers.start()
        self.disk.opened()
        self.negotiate()
        for index in range(len(self.guest.drivers)):
            self.start(index)
        return self

    def __exit__(self, *_):
        for index in list(self.rings):
            self.stop(index, deadline_s=10)
        self.disk.closed()
        self.workers.stop()
        self.storage.close()
        self.guest.close()

    def negotiate(self, without=()):
        features = self.disk.features() & ~sum(1 << bit for bit in without)
        with self.held():
            self.disk.negotiated(features)

    @contextmanager
    def held(self):
        for virtqueue in self.rings.values():
            virtqueue.set_live(False)
        self.workers.wait()
        yield
        for virtqueue in self.rings.values():
            virtqueue.set_live(True)
        self.workers.nudge()

    def start(self, index=0, kick=True, **options):
        virtqueue = self.guest.virtqueue(index, **options)
        self.disk.ring_started(index, virtqueue, self.guest.kicks[index] if kick else -1)
        self.rings[index] = virtqueue
        self.disk.ring_enabled(index, True)
        virtqueue.set_live(True)
        self.workers.nudge()

    def stop(self, index=0, deadline_s=5.0):
        drained = asyncio.run(self.disk.ring_drain(index, deadline_s))
        virtqueue = self.rings.pop(index)
        virtqueue.set_live(False)
        self.workers.wait()
        self.disk.ring_stopped(index)
        return drained, virtqueue.base

    def counters(self, index=0):
        return self.disk.status()["queues"][index]


def opened_gate(tmp_path):
    storage = GateStorage(SIZE)
    storage.open()
    return storage


def small_gate(tmp_path):
    storage = GateStorage(SIZE, capacity=3)
    storage.open()
    return storage


STORAGES = {
    "ram": lambda tmp_path: RamStorage(SIZE),
    "file": lambda tmp_path: FileStorage(image(tmp_path / "disk.img")),
    "uring": lambda tmp_path: UringStorage(image(tmp_path / "disk.img")),
    "uring, O_DIRECT": lambda tmp_path: UringStorage(image(tmp_path / "disk.img"), direct=True),
    "gate": opened_gate,
    "gate that takes 3": small_gate,
}


# What a guest reads is what it wrote -------------------------------------------------

steps = st.tuples(
    st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES]),
    st.integers(0, SECTORS - 1),
    st.one_of(st.integers(0, 8), st.integers(0, 200)),
    st.integers(0, 255),
    st.lists(st.integers(1, 5000), max_size=6),
)


each_layout = pytest.mark.parametrize(
    "features", [FEATURES, FEATURES | 1 << Feature.RING_PACKED], ids=["split", "packed"]
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
        assert os.eventfd_read(machine.workers.attention_fd) == 1
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


# Stop, start, and hanging storages ---------------------------------------------------


@each_layout
def test_a_stopped_ring_starts_again_where_it_was(features):
    with Machine(RamStorage(SIZE), guest=Guest(features=features, queue_size=16)) as machine:
        for round_ in range(10):
            assert machine.guest.request(OUT, round_, data=bytes([round_]) * 512).wait() == OK
            drained, base = machine.stop()
            if features >> Feature.RING_PACKED & 1:
                slots = 2 * (2 * round_ + 1)  # a request's header and data, and its answer
                assert drained and base == base_of("packed", 16, slots)
            else:
                assert drained and base == 2 * round_ + 1
            sent = machine.guest.request(IN, round_, space=512)
            assert not sent.is_done()
            machine.start(base=base)
            assert (sent.wait(), sent.data) == (OK, bytes([round_]) * 512)
        assert machine.counters()["reads"] == 10, "counters outlive the ring"


def test_drain_waits_for_what_is_under_way_and_takes_nothing_more():
    storage = GateStorage(SIZE)
    with Machine(storage) as machine:
        sent = [machine.guest.request(OUT, i, data=b"x" * 512) for i in range(5)]
        eventually(lambda: machine.counters()["inflight"] == 5)
        assert machine.guest.memory.in_use == 5

        async def drain():
            waiting = asyncio.create_task(machine.disk.ring_drain(0, 10))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            late = machine.guest.request(OUT, 9, data=b"y" * 512)
            storage.open()
            assert await waiting
            return late

        late = asyncio.run(drain())
        assert all(request.is_done() and request.status == OK for request in sent)
        assert not late.is_done()
        assert machine.guest.memory.in_use == 0
        _, base = machine.stop()
        assert base == 5
        machine.start(base=base)
        assert late.wait() == OK


@pytest.mark.parametrize("answers_late", [True, False])
def test_a_hung_storage_ends_the_drain_at_its_deadline_and_keeps_the_memory(answers_late):
    storage = GateStorage(SIZE, capacity=2)
    with Machine(storage) as machine:
        guest = machine.guest
        sent = [guest.request(IN, i, space=512, kick=False) for i in range(4)]
        guest.drivers[0].kick()
        eventually(lambda: machine.counters()["inflight"] == 4)
        drained, _ = machine.stop(deadline_s=0.05)
        assert not drained
        # Two never reached the storage; two hang, and name guest memory.
        eventually(lambda: machine.disk.status()["hung_requests"] == 2)
        assert guest.memory.in_use == 2
        if answers_late:
            storage.open()
            eventually(lambda: machine.disk.status()["hung_requests"] == 0)
            assert guest.memory.in_use == 0
        assert not any(request.is_done() for request in sent), "the ring is not ours any more"
        assert all(request.status == UNTOUCHED for request in sent)
        if not answers_late:
            storage.open()  # only so that this process ends tidily
            eventually(lambda: machine.disk.status()["hung_requests"] == 0)


def test_requests_survive_a_change_of_the_memory_map():
    storage = GateStorage(SIZE)
    with Machine(storage) as machine:
        guest = machine.guest
        sent = [guest.request(OUT, i, data=bytes([i]) * 512) for i in range(3)]
        eventually(lambda: machine.counters()["inflight"] == 3)
        old, new = guest.memory, guest.map()
        with machine.held():
            machine.rings[0].remap(new)
            storage.open()  # they complete while nobody may touch the ring
        guest.memory = new
        assert [request.wait() for request in sent] == [OK] * 3
        assert (old.in_use, new.in_use) == (0, 0)
        assert guest.request(IN, space=512).wait() == OK


def test_a_session_that_ends_in_a_change_waits_for_requests_but_answers_none():
    storage = GateStorage(SIZE)
    with Machine(storage) as machine:
        sent = machine.guest.request(OUT, data=b"x" * 512)
        eventually(lambda: machine.counters()["inflight"] == 1)
        machine.rings[0].set_live(False)
        machine.workers.wait()
        storage.open()
        drained, _ = machine.stop()
        assert drained and not sent.is_done()
        assert machine.guest.memory.in_use == 0


@pytest.mark.parametrize("kind", ["file", "uring"])
def test_fds_and_threads_are_as_before(tmp_path, kind):
    def fds():
        return len(os.listdir("/proc/self/fd"))

    before = fds()
    for _ in range(3):
        with Machine(STORAGES[kind](tmp_path), guest=Guest(queues=3)) as machine:
            assert machine.guest.request(FLUSH, index=2).wait() == OK
    del machine
    assert fds() == before


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


# The device --------------------------------------------------------------------------


def config_of(disk):
    return dict(zip(CONFIG_FIELDS, CONFIG.unpack(disk.config()), strict=True))


def test_each_feature_comes_with_a_config_value_that_makes_sense(tmp_path):
    workers = Workers()
    path = image(tmp_path / "disk.img")
    for storage, options in [
        (NullStorage(1 << 40), {}),
        (RamStorage(SIZE), {"queues": 1}),
        (FileStorage(path, read_only=True), {"block_size": 4096, "read_only": True}),
        (FileStorage(path, read_only=True), {}),
        (FileStorage(path, read_only=True, block_size=4096), {"queues": 256}),
        (FileStorage(image(tmp_path / "other.img")), {}),
    ]:
        disk = Disk("vb0", storage, workers, **options)
        config = config_of(disk)

        def has(bit, disk=disk):
            return bool(disk.features() >> bit & 1)

        assert config["capacity"] == storage.size_bytes // 512
        assert not has(Feature.BLK_SIZE_MAX) and config["size_max"] == 0
        assert has(Feature.BLK_SEG_MAX) and config["seg_max"] == 126
        assert has(Feature.BLK_BLK_SIZE) and config["blk_size"] in (512, 4096)
        assert config["blk_size"] << config["physical_block_exp"] == 4096
        assert has(Feature.BLK_MQ) == (config["num_queues"] > 1) == (disk.queue_number > 1)
        assert has(Feature.BLK_RO) == disk.read_only
        for name, bit in (("discard", Feature.BLK_DISCARD),
                          ("write_zeroes", Feature.BLK_WRITE_ZEROES)):  # fmt: skip
            assert has(bit) == (not disk.read_only)
            assert (config[f"max_{name}_sectors"] > 0) == has(bit)
            assert (config[f"max_{name}_seg"] > 0) == has(bit)
        # Zeros in a file are no promise of what lies below.
        assert has(Feature.BLK_SECURE_ERASE) == (
            isinstance(storage, RamStorage) and not disk.read_only
        )
        for name in ("max_secure_erase_sectors", "max_secure_erase_seg",
                     "secure_erase_sector_alignment"):  # fmt: skip
            assert (config[name] > 0) == has(Feature.BLK_SECURE_ERASE)
        assert len(disk.config()) == 96
        storage.close()


def test_config_offsets_are_the_standard_s():
    # virtio 1.3, "Block Device / Device configuration layout"
    config = Disk("vb0", RamStorage(SIZE), Workers(), queues=7).config()
    assert struct.unpack_from("<Q", config, 0) == (SECTORS,)
    assert struct.unpack_from("<I", config, 12) == (126,)
    assert struct.unpack_from("<I", config, 20) == (512,)
    assert config[24] == 3 and config[32] == 1
    assert struct.unpack_from("<H", config, 34) == (7,)
    assert struct.unpack_from("<III", config, 36) == (1 << 19, 32, 8)
    assert struct.unpack_from("<II", config, 48) == (1 << 19, 32)
    assert config[56] == 1


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, bytes(8)), (32, b"\2"), (32, b"\0\0"), (33, b"\0"), (32, b""), (95, b"\0")],
)
def test_only_writeback_can_be_written(offset, data):
    disk = Disk("vb0", RamStorage(SIZE), Workers())
    before = disk.config()
    with pytest.raises(ProtocolError, match="SET_CONFIG"):
        disk.write_config(offset, data)
    assert disk.config() == before


def test_bad_options_are_the_operator_s():
    for options in ({"queues": 0}, {"queues": 257}, {"serial": "x" * 21}, {"serial": "é"},
                    {"block_size": 100}):  # fmt: skip
        with pytest.raises(ConfigError, match="vb0"):
            Disk("vb0", RamStorage(SIZE), Workers(), **options)
    with pytest.raises(ConfigError, match="no multiple"):
        Disk("vb0", RamStorage(SIZE - 512), Workers(), block_size=4096)


def test_a_queue_with_requests_under_way_does_not_close():
    storage = GateStorage(SIZE)
    with Guest() as guest:
        queue = DiskQueue(guest.virtqueue(), storage)
        queue.virtqueue.set_live(True)
        sent = guest.request(FLUSH)
        assert queue.step() > 0
        with pytest.raises(RuntimeError, match="1 requests"):
            queue.close()
        storage.open()
        queue.step()
        assert sent.wait() == OK
        queue.close()
