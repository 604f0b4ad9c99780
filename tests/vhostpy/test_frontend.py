"""The front-end against a real back-end: a RAM disk behind a socket of this process."""

import os
import struct

import pytest

from tests.rings import base_of
from tests.serving import serving
from tests.talk import open_fds
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import Refused
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.memory.guest import DirtyLog
from vhostpy.protocol.codec import FrontEndRequest, encode
from vhostpy.protocol.payloads import VringState
from vhostpy.runtime.pool import Workers
from vhostpy.server.listen import Server
from vhostpy.system.fds import OwnedFd

SIZE = 1 << 20
FEATURES = 1 << Feature.VERSION_1 | 1 << Feature.EVENT_IDX | 1 << Feature.INDIRECT_DESC
EVERYTHING = (1 << 24) - 1
LAYOUT = ((0, 1 << 20), (1 << 32, 4 << 20))
IN, OUT = 0, 1
STATUS_OK = 0


@pytest.fixture
def server(tmp_path):
    workers = Workers(1)
    workers.start()
    disk = Disk("vb0", RamStorage(SIZE), workers, queues=4)
    path = str(tmp_path / "vb0")
    server = Server(disk, path=path)
    with serving(server):
        yield server
    workers.stop()


@pytest.fixture(params=[0, 1 << Feature.RING_PACKED], ids=["split", "packed"])
def guest(server, request):
    with FrontEnd(server.path, layout=LAYOUT) as guest:
        guest.negotiate(FEATURES | request.param, EVERYTHING)
        assert guest.features & 1 << Feature.RING_PACKED == request.param
        guest.set_mem_table()
        yield guest


def transfer(guest, queue, kind, sector, data):
    """One request; the data that came back, or went."""
    header, buffer, status = (guest.allocate(n, 16) for n in (16, len(data), 1))
    guest.memory.write(header, struct.pack("<IIQ", kind, 0, sector))
    guest.memory.write(buffer, data)
    guest.memory.write(status, b"\xff")
    pieces = [(header, 16)], [(buffer, len(data))], [(status, 1)]
    if kind == OUT:
        queue.ring.add([*pieces[0], *pieces[1]], pieces[2])
    else:
        queue.ring.add(pieces[0], [*pieces[1], *pieces[2]])
    queue.ring.kick()
    ((_, written),) = queue.wait_used()
    assert guest.memory.read(status, 1) == bytes([STATUS_OK])
    assert written == 1 + (len(data) if kind == IN else 0)
    return guest.memory.read(buffer, len(data))


def base_after(guest, size, requests, start=0):
    """Where a ring is that began behind `start` chains (split) or descriptors (packed)."""
    if guest.features >> Feature.RING_PACKED & 1:
        return base_of("packed", size, start + 3 * requests)
    return base_of("split", size, start + requests)


def test_block_that_was_written_is_read_back(guest):
    assert guest.negotiated(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    (sectors,) = struct.unpack_from("<Q", guest.get_config())
    assert sectors == SIZE // 512
    queue = guest.start_queue(0, 64)
    data = os.urandom(4096)
    assert transfer(guest, queue, OUT, 8, data) == data
    assert transfer(guest, queue, IN, 8, bytes(4096)) == data
    assert guest.stop_queue(0) == base_after(guest, 64, 2)


def test_queue_goes_on_where_it_was_stopped(guest):
    base = base_after(guest, 8, 0, start=65530)
    queue = guest.start_queue(1, 8, base=base)
    data = os.urandom(512)
    for sector in range(20):
        transfer(guest, queue, OUT, sector, data)
        base = base_after(guest, 8, sector + 1, start=65530)
        assert guest.stop_queue(1) == base
        guest.announce(queue, base=base)
    assert transfer(guest, queue, IN, 19, bytes(512)) == data


def test_queue_that_was_stopped_starts_again_as_another_one(guest):
    """What a driver's reset of one queue comes to (virtio 1.3, "Virtqueue Reset")."""
    data = os.urandom(512)
    for sector, size in enumerate((8, 64, 4, 128)):
        queue = guest.start_queue(0, size)
        transfer(guest, queue, OUT, sector, data)
        assert transfer(guest, queue, IN, sector, bytes(512)) == data
        assert guest.stop_queue(0) == base_after(guest, size, 2)


def test_front_ends_in_turn_may_use_any_layout(server):
    data = os.urandom(512)
    for sector, layout in enumerate([0, 1 << Feature.RING_PACKED, 0, 1 << Feature.RING_PACKED]):
        with FrontEnd(server.path, layout=LAYOUT) as guest:
            guest.negotiate(FEATURES | layout, EVERYTHING)
            guest.set_mem_table()
            for index in range(2):
                queue = guest.start_queue(index, 8)
                transfer(guest, queue, OUT, sector, data)
                assert transfer(guest, queue, IN, sector, bytes(512)) == data


def test_queue_that_is_polled_needs_no_kick(guest):
    queue = guest.start_queue(0, 8, poll=True)
    data = os.urandom(512)
    transfer(guest, queue, OUT, 0, data)
    assert transfer(guest, queue, IN, 0, bytes(512)) == data


def test_queue_survives_its_memory_being_taken_and_put_back(guest):
    guest.allocate(LAYOUT[0][1])  # rings and buffers lie in the second region
    queue = guest.start_queue(0, 8)
    region = guest.shared.regions[1]
    for sector in range(5):
        data = os.urandom(512)
        transfer(guest, queue, OUT, sector, data)
        guest.rem_mem_reg(region)
        guest.add_mem_reg(region)
        assert transfer(guest, queue, IN, sector, bytes(512)) == data


def test_pages_that_the_disk_writes_are_logged_and_no_others(guest):
    queue = guest.start_queue(0, 8)
    with OwnedFd(os.memfd_create("log")) as fd:
        os.ftruncate(fd.fileno(), 4 << 20)
        guest.set_log(fd, 4 << 20)
        log = DirtyLog(fd.fileno(), 0, 4 << 20)
        transfer(guest, queue, IN, 0, bytes(4096))
        assert log.pages() == []  # LOG_ALL is not negotiated yet
        guest.set_features(guest.features | 1 << Feature.LOG_ALL)
        used_log_gpa = 123 << 12  # the log's own address, wherever the ring lies
        guest.set_addresses(queue, used_log_gpa)
        before = guest.allocate(4096)
        transfer(guest, queue, IN, 0, bytes(3 * 4096))
        after = guest.allocate(4096)
        pages = set(log.pages())
        assert 123 in pages
        written = sorted(pages - {123})
        if guest.features >> Feature.RING_PACKED & 1:
            # Used descriptors are where available ones were.
            written.remove(queue.desc_gpa >> 12)
        assert before >> 12 < written[0]
        assert written[-1] < after >> 12
        # The buffer's three or four pages, and the status byte's.
        assert 3 <= len(written) <= 5


def test_refusals_are_raised_and_the_session_goes_on(guest):
    with pytest.raises(Refused, match="GET_CONFIG"):
        guest.get_config(200, 100)
    with pytest.raises(Refused, match="SET_FEATURES"):
        guest.set_features(1 << 63)
    assert guest.request(FrontEndRequest.GET_QUEUE_NUM).value == 4


def test_front_end_sees_that_the_back_end_hangs_up(server, guest):
    guest.send_raw(encode(FrontEndRequest.SET_VRING_NUM, VringState(4, 8)))
    assert guest.hung_up()
    with FrontEnd(server.path) as again:
        assert again.get_features()


def test_a_hundred_sessions_leave_no_file_behind(server):
    def session():
        with FrontEnd(server.path) as guest:
            guest.negotiate(FEATURES, EVERYTHING)
            guest.set_mem_table()
            queue = guest.start_queue(0, 8)
            transfer(guest, queue, OUT, 0, bytes(512))
            # Whole conversations end with an answer, so that the counts below are fair.
            guest.stop_queue(0)

    for _ in range(5):
        session()
    before = len(open_fds())
    for _ in range(100):
        session()
    with FrontEnd(server.path) as guest:
        guest.get_features()  # served: the last session's cleaning is done
        assert len(open_fds()) <= before + 4
