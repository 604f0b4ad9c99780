"""A guest one of whose memories is not shared: a pc-dimm with a private backend.

Its driver puts data, tables and status bytes there as anywhere else, and uses the same status
bytes again and again: where a request ends without an answer, it reads OK of the one before.
"""

import os
import random
import struct

import pytest

from tests.backends.guest import IN, IOERR, OK, OUT
from tests.hostile.attacker import EVERYTHING
from tests.hostile.victim import eventually
from tests.serving import serving
from tests.vhostpy.test_inflight import SIZE, marked
from vhostpy._spec import Feature
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.backends.storage.uring import UringStorage
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.memory.guest import DirtyLog
from vhostpy.ring.inflight import region_bytes
from vhostpy.runtime.pool import Workers
from vhostpy.server.listen import Server
from vhostpy.system.fds import OwnedFd

SHARED, DIMM = (0x10_0000, 8 << 20), (1 << 32, 8 << 20)
LOG_BYTES = (DIMM[0] + DIMM[1]) // 4096 // 8
BLOCK = 4096
BLOCKS = 64
FEATURES = 1 << Feature.VERSION_1 | 1 << Feature.INDIRECT_DESC | 1 << Feature.EVENT_IDX
RING_FEATURES = {"split": FEATURES, "packed": FEATURES | 1 << Feature.RING_PACKED}
each_layout = pytest.mark.parametrize("layout", RING_FEATURES)
each_way = pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])


class Guest(FrontEnd):
    """A driver whose requests have their headers and status bytes in the same places."""

    def __init__(self, path):
        super().__init__(path, layout=(SHARED, DIMM))

    def begin(self, layout, log=None):
        self.layout_name = layout
        features = RING_FEATURES[layout] | (1 << Feature.LOG_ALL if log is not None else 0)
        self.negotiate(features, EVERYTHING)
        self.get_inflight(1, SIZE)
        self.set_inflight()
        self.add_mem_reg(self.shared.regions[0])
        if log is not None:
            self.set_log(log, LOG_BYTES)
        self.driver = self.start_queue(0, SIZE).ring
        self.headers = self.allocate(4096)
        self.tables = self.allocate(4096)

    def ask(self, kind, block, data, number=0, *, status=None, table=None):
        """A request of a block, whose data is to go to `data` or to come from there."""
        header = self.headers + 32 * number
        status = header + 16 if status is None else status
        self.memory.write(header, struct.pack("<IIQ", kind, 0, block * BLOCK // 512))
        out = [(header, 16)] if kind == IN else [(header, 16), (data, BLOCK)]
        back = [(data, BLOCK), (status, 1)] if kind == IN else [(status, 1)]
        self.driver.add(out, back, table)
        self.driver.kick()

    def answer(self, number=0):
        """The used length and the status of the one request that is out."""
        ((_, length),) = self.queues[0].wait_used()
        return length, self.memory.read(self.headers + 32 * number + 16, 1)[0]

    def under_way(self):
        return marked(os.pread(self.inflight[1].fileno(), region_bytes(SIZE), 0), self.layout_name)


@pytest.fixture
def workers():
    workers = Workers(1)
    workers.start()
    yield workers
    workers.stop()


def serve(tmp_path, storage, workers):
    return Server(Disk("vb0", storage, workers, queues=1), path=str(tmp_path / "s"))


@each_layout
@each_way
def test_requests_with_data_there_fail_and_all_others_are_done(tmp_path, workers, layout, indirect):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(BLOCK * BLOCKS))
    server = serve(tmp_path, UringStorage(str(image)), workers)
    dice = random.Random(layout)
    wanted = [bytes(BLOCK) for _ in range(BLOCKS)]
    failed = 0
    with serving(server), Guest(server.path) as guest:
        guest.begin(layout)
        near, far = guest.allocate(BLOCK), DIMM[0] + 5 * BLOCK
        for i in range(400):
            kind, block, number = dice.choice([IN, OUT]), dice.randrange(BLOCKS), i % SIZE
            data = dice.choice([near, far])
            mine = dice.randbytes(BLOCK)
            guest.memory.write(data, mine)
            table = guest.tables + 64 * number if indirect else None
            guest.ask(kind, block, data, number, table=table)
            length, status = guest.answer(number)
            if data == far:
                assert (length, status) == (1, IOERR)
                assert guest.memory.read(far, BLOCK) == mine
                failed += 1
            elif kind == IN:
                assert (length, status) == (BLOCK + 1, OK)
                assert guest.memory.read(near, BLOCK) == wanted[block]
            else:
                assert (length, status) == (1, OK)
                wanted[block] = mine
            eventually(lambda: guest.under_way() == [])
        assert server.device.status()["queues"][0]["chain_faults"]["unmapped"] == failed > 100
    assert image.read_bytes() == b"".join(wanted)


@each_layout
@each_way
def test_while_it_migrates_the_page_of_the_status_is_logged(tmp_path, workers, layout, indirect):
    server = serve(tmp_path, RamStorage(BLOCK * BLOCKS), workers)
    with (
        serving(server),
        Guest(server.path) as guest,
        OwnedFd(os.memfd_create("log")) as log,
    ):
        os.ftruncate(log.fileno(), LOG_BYTES)
        guest.begin(layout, log)
        table = guest.tables if indirect else None
        guest.ask(IN, 0, DIMM[0], table=table)
        assert guest.answer() == (1, IOERR)
        pages = DirtyLog(log.fileno(), 0, LOG_BYTES).pages()
        assert pages == [guest.headers >> 12]


@each_layout
@pytest.mark.parametrize("where", ["status", "table"])
def test_a_request_that_cannot_be_answered_waits_until_that_memory_is_shared(
    tmp_path, workers, layout, where, caplog
):
    """By whoever is told the base, here or elsewhere; and here as soon as it is shared."""
    server = serve(tmp_path, RamStorage(BLOCK * BLOCKS), workers)
    with serving(server), Guest(server.path) as guest:
        guest.begin(layout)
        queue, data = guest.queues[0], guest.allocate(BLOCK)
        guest.memory.write(data, b"precious" * (BLOCK // 8))
        guest.ask(OUT, 3, data)
        assert guest.answer() == (1, OK)
        status = {"status": DIMM[0] + 100} if where == "status" else {"table": DIMM[0] + 4096}
        at = status.get("status", guest.headers + 16)
        for _ in range(2):
            guest.memory.write(at, bytes([OK]))  # of the request before
            guest.memory.write(data, bytes(BLOCK))
            base = guest.driver.base
            guest.ask(IN, 3, data, **status)
            assert queue.wait_err()
            eventually(lambda: guest.under_way() == [])
            assert "share=on to every memory backend" in server.status()["waits_for"]
            assert guest.stop_queue(0) == base
            guest.announce(queue, base=base)
            assert queue.wait_err(), "by the same request"
            assert guest.driver.used() == []
            assert guest.memory.read(data, BLOCK) == bytes(BLOCK)
            guest.memory.write(at, b"\xee")
            guest.add_mem_reg(guest.shared.regions[1])
            (length,) = (length for _, length in queue.wait_used())
            assert (length, guest.memory.read(at, 1)) == (BLOCK + 1, bytes([OK]))
            assert guest.memory.read(data, BLOCK) == b"precious" * (BLOCK // 8)
            eventually(lambda: server.status()["waits_for"] == "")
            guest.rem_mem_reg(guest.shared.regions[1])
    assert caplog.text.count("a request cannot be answered") == 4
