"""What a running ring has of its session, and how it is taken away from it."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import struct
import threading
from collections import Counter

import pytest

from tests.gate import GateStorage
from tests.hanging import held, lingering_socket
from tests.hostile.attacker import EVERYTHING, Attacker, eventfd
from tests.hostile.pagefaults import PageFaults
from tests.hostile.victim import eventually
from tests.serving import serving
from tests.talk import open_fds
from vhostpy._spec import Feature
from vhostpy.backends.blk.device import WRITEBACK_OFFSET, Disk
from vhostpy.backends.net.device import NetDevice
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import Refused
from vhostpy.frontend.frontend import FrontEnd, Queue
from vhostpy.memory.guest import DirtyLog
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import encode
from vhostpy.protocol.payloads import VringFile, VringState
from vhostpy.ring.parts import first_base
from vhostpy.server import connection as connection_module
from vhostpy.server.connection import Connection
from vhostpy.server.listen import Server
from vhostpy.system.fds import OwnedFd
from vhostpy.vswitch.switch import Switch

DEADLINE_S = 10
RINGS = 4
FEATURES = 1 << Feature.VERSION_1 | 1 << Feature.BLK_FLUSH | 1 << Feature.BLK_CONFIG_WCE
LOG_ALL = 1 << Feature.LOG_ALL
PACKED = 1 << Feature.RING_PACKED


@pytest.fixture
def gate():
    """A storage that hangs until it is opened."""
    return GateStorage(1 << 20)


@pytest.fixture
def hung_disk(workers, gate):
    return Disk("disk", gate, workers, queues=RINGS)


@pytest.fixture
def disk(workers):
    return Disk("disk", RamStorage(1 << 20), workers, queues=RINGS)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "s")


@pytest.fixture
def pipe():
    """The end of a pipe that can be written to: what no kick, call or error fd may be."""
    read, write = os.pipe()
    yield write
    os.close(read)
    os.close(write)


@pytest.fixture
def hung(tmp_path):
    """Where a file system hangs."""
    directory = tmp_path / "hung"
    directory.mkdir()
    return directory


def connect(path: str, features: int = FEATURES) -> FrontEnd:
    """A session with features and memory; no ring yet."""
    guest = FrontEnd(path)
    guest.negotiate(features, EVERYTHING)
    guest.set_mem_table()
    return guest


def offer_read(guest: FrontEnd, queue: Queue) -> int:
    """Asks for a sector; returns where it will be."""
    gpa = guest.allocate(4096)
    guest.memory.write(gpa, struct.pack("<IIQ", 0, 0, 0) + b"\xee" * 513)
    queue.ring.add([(gpa, 16)], [(gpa + 16, 512), (gpa + 528, 1)])
    queue.ring.kick()
    return gpa + 16


def hang(guest: FrontEnd, disk: Disk) -> None:
    """Starts all rings; each has a request under way that is not answered."""
    for index in range(RINGS):
        offer_read(guest, guest.start_queue(index, 64))
    eventually(lambda: all(queue["inflight"] for queue in disk.status()["queues"]))


def noted(disk: Disk, monkeypatch) -> list[int]:
    """Which rings are, or were, drained from now on."""
    draining, drain = [], disk.ring_drain

    def ring_drain(index: int, deadline_s: float):
        draining.append(index)
        return drain(index, deadline_s)

    monkeypatch.setattr(disk, "ring_drain", ring_drain)
    return draining


def disconnected(server: Server) -> None:
    """The session has been cleared away."""
    eventually(lambda: server.connection is None, "the session's end")


def watched() -> Counter:
    """What this process's epoll fds look at, by the number it had and its inode."""
    found: Counter = Counter()
    for name in open_fds():
        try:
            if os.readlink(f"/proc/self/fd/{name}") != "anon_inode:[eventpoll]":
                continue
            with open(f"/proc/self/fdinfo/{name}") as info:
                lines = [line.split() for line in info if line.startswith("tfd:")]
        except FileNotFoundError:
            continue
        found.update((name, line[1], *line[-3:]) for line in lines)
    return found


# Notification fds --------------------------------------------------------------------------


def test_the_call_fd_whose_successor_was_refused_serves_what_was_under_way(
    hung_disk, gate, path, pipe
):
    server = Server(hung_disk, path=path)
    with serving(server):
        gc.collect()  # what earlier tests left would go at any time
        before = open_fds()
        with connect(path) as guest:
            hang(guest, hung_disk)
            while guest.queues[1].wait(0):
                pass
            guest.send_raw(encode(R.SET_VRING_CALL, VringFile(1, True)), [pipe])
            eventually(lambda: server.connection.session.ended)
            gate.open()
            assert guest.queues[1].wait()
            disconnected(server)
        eventually(lambda: open_fds() == before)


@pytest.mark.parametrize("kind", ["net", "blk"])
def test_a_port_serves_again_with_the_kick_fd_whose_successor_was_refused(
    kind, disk, workers, path, pipe
):
    device, index = (NetDevice("net", Switch(workers)), 1) if kind == "net" else (disk, 0)
    server = Server(device, path=path)
    with serving(server), eventfd() as kick:
        before = watched()
        for _ in range(3):
            with Attacker(path, index, start=False) as guest:
                guest.queue.kick = OwnedFd(os.dup(kick.fileno()))
                guest.start()
                if kind == "net":
                    guest.send()
                else:
                    assert guest.request() == 0
                with pytest.raises(Refused):
                    guest.end.request(R.SET_VRING_KICK, VringFile(index, True), [pipe])
                disconnected(server)
            # Not what the worker would have to look at for ever, since we keep the file.
            eventually(lambda: watched() == before, f"{before}, {watched()} now")


def test_a_kick_fd_that_a_ring_goes_by_is_the_rings_though_the_server_closes_meanwhile(
    disk, path, monkeypatch
):
    begun, go, given, at_the_end = threading.Event(), threading.Event(), [], []
    ring_kick, ring_stopped = disk.ring_kick, disk.ring_stopped

    def slow(index, kick_fd):
        given.append(kick_fd)
        begun.set()
        go.wait(DEADLINE_S)
        ring_kick(index, kick_fd)

    def stopped(index):
        at_the_end.append(connection.session.rings[index].kick.fileno())
        ring_stopped(index)

    monkeypatch.setattr(disk, "ring_kick", slow)
    monkeypatch.setattr(disk, "ring_stopped", stopped)
    server = Server(disk, path=path)
    with serving(server) as loop, Attacker(path) as guest, eventfd() as kick:
        connection = server.connection
        guest.end.send_raw(encode(R.SET_VRING_KICK, VringFile(0, True)), [kick])
        assert begun.wait(DEADLINE_S)
        closing = asyncio.run_coroutine_threadsafe(server.close(), loop.loop)
        eventually(lambda: connection not in Connection.open)
        go.set()
        closing.result(DEADLINE_S)
    assert at_the_end == given


@pytest.mark.parametrize("started", [False, True])
def test_an_error_fd_that_is_a_file_is_refused_and_the_file_left_alone(
    started, disk, path, tmp_path
):
    server, file = Server(disk, path=path), tmp_path / "file"
    file.write_text("precious data")
    with serving(server), file.open("r+b") as opened, Attacker(path, start=started) as guest:
        with pytest.raises(Refused):
            guest.end.request(R.SET_VRING_ERR, VringFile(0, True), [opened.fileno()])
            assert not started
            guest.start()
        assert guest.end.hung_up()
        disconnected(server)
    assert file.read_text() == "precious data"


def test_a_disk_calls_by_the_socket_that_its_front_end_gives(disk, path):
    """As User-mode Linux does, before the ring starts and while it runs."""
    call = struct.pack("=Q", 1)
    server = Server(disk, path=path)
    pairs = [socket.socketpair() for _ in range(2)]
    with (
        contextlib.ExitStack() as stack,
        serving(server),
        Attacker(path, start=False) as guest,
    ):
        (ours, theirs), (second, thirds) = [map(stack.enter_context, pair) for pair in pairs]
        for end in (theirs, thirds):
            end.settimeout(DEADLINE_S)
        guest.queue.call.close()
        guest.queue.call = OwnedFd(ours.detach())
        guest.start()
        assert guest.request() == 0
        assert theirs.recv(8) == call
        guest.end.request(R.SET_VRING_CALL, VringFile(0, True), [second.fileno()])
        assert thirds.recv(8) == call  # the driver may have missed one
        assert guest.request() == 0
        assert thirds.recv(8) == call


@pytest.mark.parametrize("what", ["pipe", "tcp"])
@pytest.mark.parametrize("started", [False, True])
def test_a_call_fd_whose_writers_could_wait_for_ever_is_refused(
    started, what, disk, path, hung, pipe
):
    """Its lock is held by somebody in a page fault: no flag helps who touches it."""
    server = Server(disk, path=path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving(server))
        fd = pipe if what == "pipe" else stack.enter_context(lingering_socket()).fileno()
        if not stack.enter_context(held(hung, fd)):
            pytest.skip("cannot mount FUSE: run as root")
        guest = stack.enter_context(Attacker(path, start=started))
        with pytest.raises(Refused):
            guest.end.request(R.SET_VRING_CALL, VringFile(0, True), [fd])
            assert not started
            guest.start()
        assert guest.end.hung_up()
        disconnected(server)
        with Attacker(path) as again:
            assert again.request() == 0


def test_a_channel_whose_writers_could_wait_for_ever_is_not_written_to(disk, path, hung):
    server = Server(disk, path=path)
    with (
        serving(server) as loop,
        Attacker(path) as guest,
        lingering_socket() as channel,
        held(hung, channel.fileno()) as holds,
    ):
        if not holds:
            pytest.skip("cannot mount FUSE: run as root")

        async def tell() -> bool:
            return server.tell_config_changed()

        guest.end.request(R.SET_BACKEND_REQ_FD, fds=[channel.fileno()])
        assert loop.run(tell(), DEADLINE_S) is False
        assert guest.request() == 0


# Where a ring starts -----------------------------------------------------------------------


def test_base_0_of_a_packed_ring_means_a_new_one_until_its_descriptors_say_otherwise(disk, path):
    """User-mode Linux says 0 of any new ring; others mean that it has been around once.

    Each request takes three of the nine descriptors.
    """
    server = Server(disk, path=path)
    with serving(server), Attacker(path, kind="packed", size=9, base=0, start=False) as guest:
        guest.ring.restart(first_base(guest.end.features))
        guest.start(0)
        for expected in (0x80008000, 0, 0x80008000):
            base = guest.end.stop_queue(0)
            assert base == expected
            guest.start(base)
            for _ in range(3):
                assert guest.request() == 0


# Dirty log ---------------------------------------------------------------------------------


def test_a_ring_of_a_guest_that_migrates_starts_when_its_log_is_there(disk, path):
    """QEMU sends SET_LOG_BASE behind the kick fds when it connects in the middle of one."""
    server = Server(disk, path=path)
    with serving(server), connect(path, FEATURES | LOG_ALL) as guest:
        queue = guest.start_queue(0, 64)
        data = offer_read(guest, queue)
        guest.get_features()
        assert server.connection.plane.virtqueues == {}
        with OwnedFd(os.memfd_create("log")) as log:
            os.ftruncate(log.fileno(), 4096)
            guest.set_log(log, 4096)
            queue.wait_used()
            assert DirtyLog(log.fileno(), 0, 4096).pages() == [data >> 12]
        assert guest.memory.read(data, 513) == bytes(513)


def test_the_log_is_forgotten_when_the_migration_ends(disk, path):
    server = Server(disk, path=path)
    with serving(server), connect(path, FEATURES | LOG_ALL) as guest:
        with OwnedFd(os.memfd_create("log")) as log:
            os.ftruncate(log.fileno(), 4096)
            guest.set_log(log, 4096)
        plane = server.connection.plane
        assert plane.log is not None
        features = guest.features
        guest.set_features(features & ~LOG_ALL)
        assert plane.log is None
        guest.set_features(features)
        guest.start_queue(0, 64)
        assert plane.virtqueues == {}


# Memory in which a page fault lasts ---------------------------------------------------------


@pytest.mark.parametrize(
    ("packed", "base", "which"),
    [
        (False, 0, "used"),
        (False, 0, "avail"),
        (True, 0, "desc"),
        (True, first_base(PACKED), "desc"),
    ],
)
def test_a_page_fault_of_a_ring_that_starts_holds_up_no_other_session(
    packed, base, which, disk, workers, path, tmp_path
):
    size, layout = 256, ((0x100000, 64 << 20),)
    slow = 0x100000 + (32 << 20)
    parts = {name: 0x100000 + ((16 + i) << 20) for i, name in enumerate(("desc", "avail", "used"))}
    parts[which] = slow
    net = NetDevice("net", Switch(workers))
    servers = Server(net, path=path), Server(disk, path=str(tmp_path / "disk"))
    with serving(*servers), FrontEnd(path, layout=layout) as guest:
        guest.negotiate(FEATURES | (PACKED if packed else 0))
        guest.set_mem_table()
        queue = Queue(
            1, size, guest.features, *parts.values(), None, eventfd(), eventfd(), eventfd()
        )
        guest.queues[1] = queue
        memory = eventually(lambda: servers[0].connection.plane.memory)
        with PageFaults(memory, slow, 1 << 20) as faults:
            guest.announce(queue, base=base)
            page = faults.begun()
            with connect(str(tmp_path / "disk")) as other:
                offer_read(other, other.start_queue(0, 64))
                other.queues[0].wait_used()
            faults.end(page)
            eventually(lambda: net.status()["rings_started"])


def test_a_worker_in_a_page_fault_holds_up_who_stops_a_disks_ring_and_no_other_session(
    disk, workers, path, tmp_path, monkeypatch
):
    draining = noted(disk, monkeypatch)
    slow = 0x100000 + (32 << 20)
    net = NetDevice("net", Switch(workers))
    servers = Server(net, path=path), Server(disk, path=str(tmp_path / "disk"))
    with (
        serving(*servers),
        FrontEnd(path, layout=((0x100000, 64 << 20),)) as guest,
        connect(str(tmp_path / "disk")) as other,
    ):
        guest.negotiate(FEATURES)
        guest.set_mem_table()
        queue = guest.start_queue(1, 64)
        other.start_queue(0, 64)
        memory = eventually(lambda: servers[0].connection.plane.memory)
        with PageFaults(memory, slow, 1 << 20) as faults:
            queue.ring.add([(slow, 100)], [])
            queue.ring.kick()
            page = faults.begun()
            stops = threading.Thread(target=other.stop_queue, args=[0])
            stops.start()
            eventually(lambda: draining)
            assert guest.get_features()
            faults.end(page)
            stops.join()


# The end of a session ----------------------------------------------------------------------


def test_hung_rings_are_waited_for_all_at_once(hung_disk, gate, path, monkeypatch, caplog):
    monkeypatch.setattr("vhostpy.server.plane.DRAIN_DEADLINE_S", 0.1)
    drain, waiting, most = hung_disk.ring_drain, 0, 0

    async def counted(index: int, deadline_s: float) -> bool:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        try:
            return await drain(index, deadline_s)
        finally:
            waiting -= 1

    monkeypatch.setattr(hung_disk, "ring_drain", counted)
    server = Server(hung_disk, path=path)
    with serving(server):
        with connect(path) as guest:
            hang(guest, hung_disk)
        disconnected(server)
        assert most == RINGS
        assert caplog.text.count("requests still under way after") == RINGS
        # One table of memory is one line, however many rings were in it.
        assert caplog.text.count("requests still use guest memory") == 1
        gate.open()
        with connect(path) as guest:
            queue = guest.start_queue(0, 64)
            offer_read(guest, queue)
            queue.wait_used()


@pytest.mark.parametrize("how", ["stopping a ring", "after hanging up", "in a hurry"])
def test_a_server_that_closes_while_rings_drain_leaves_none_behind(
    how, hung_disk, gate, path, monkeypatch
):
    monkeypatch.setattr("vhostpy.server.plane.DRAIN_DEADLINE_S", 0.3)
    server = Server(hung_disk, path=path)

    async def close_impatiently() -> None:
        """As whoever gives up to wait for the end: cancelled again and again meanwhile."""
        closing = asyncio.ensure_future(server.close())
        for _ in range(10):
            await asyncio.sleep(0)
            closing.cancel()
        await asyncio.wait([closing])
        await asyncio.wait([server._task])

    with serving(server) as loop, connect(path) as guest:
        hang(guest, hung_disk)
        connection = server.connection
        virtqueues = list(connection.plane.virtqueues.values())
        draining = noted(hung_disk, monkeypatch)
        if how == "stopping a ring":
            guest.send_raw(encode(R.GET_VRING_BASE, VringState(0, 0)))
        else:
            guest.close()
        eventually(lambda: draining)
        loop.run(close_impatiently() if how == "in a hurry" else server.close())
        assert not any(virtqueue.live for virtqueue in virtqueues)
        assert not any(queue["running"] for queue in hung_disk.status()["queues"])
        assert connection.sock.fileno() == -1
        assert all(ring.call is None and ring.kick is None for ring in connection.session.rings)
        gate.open()
        eventually(lambda: not hung_disk.status()["hung_requests"])


def test_a_ring_whose_device_fails_to_drain_it_is_taken_away_all_the_same(
    disk, path, monkeypatch, caplog
):
    async def defect(index: int, deadline_s: float) -> bool:
        raise RuntimeError("cannot drain")

    server = Server(disk, path=path)
    with serving(server):
        with connect(path) as guest:
            guest.start_queue(0, 64)
            virtqueue = server.connection.plane.virtqueues[0]
            monkeypatch.setattr(disk, "ring_drain", defect)
        disconnected(server)
        assert not virtqueue.live
        assert "cannot drain" in caplog.text
        monkeypatch.undo()
        with Attacker(path) as guest:
            assert guest.request() == 0


def test_memory_that_we_make_for_requests_under_way_cannot_be_truncated(disk, path):
    with serving(Server(disk, path=path)), connect(path) as guest:
        guest.get_inflight(RINGS, 64)
        with pytest.raises(PermissionError):
            os.ftruncate(guest.inflight[1].fileno(), 0)
        guest.set_inflight()
        offer_read(guest, queue := guest.start_queue(0, 64))
        queue.wait_used()


def test_requests_that_hang_are_not_done_again_before_they_have_ended(
    hung_disk, gate, path, monkeypatch, caplog
):
    """And the operator hears of each cause once, however often the front-end tries."""
    monkeypatch.setattr("vhostpy.server.plane.DRAIN_DEADLINE_S", 0.1)
    monkeypatch.setattr(connection_module, "SETTLED_S", 0.05)
    caplog.set_level(logging.INFO, "vhostpy")

    async def hung_requests() -> int:  # on the thread that the disk belongs to
        return hung_disk.status()["hung_requests"]

    server = Server(hung_disk, path=path)
    with serving(server) as loop, FrontEnd(path) as guest:
        guest.negotiate(FEATURES, EVERYTHING)
        guest.set_mem_table()
        guest.get_inflight(RINGS, 64)
        guest.set_inflight()
        hang(guest, hung_disk)
        assert hung_disk.status()["queues"][0]["inflight"] == 1
        guest.send_raw(encode(R.GET_VRING_BASE, VringState(0, 0)))
        assert guest.hung_up()
        for _ in range(5):
            with contextlib.suppress(ConnectionError, Refused):
                guest.connect_again(path)
            assert guest.hung_up()
        gate.open()
        eventually(lambda: not loop.run(hung_requests()))
        guest.connect_again(path)
        for queue in guest.queues.values():
            assert len(queue.wait_used()) == 1
        eventually(lambda: "works again" in caplog.text)
        for text in (
            "front-end connected",
            "ring 0: 1 requests would be done again",
            "the errors before came 4 more times",
            "that hung have ended",
            "ring 0: 1 requests that were under way are done again",
        ):
            assert caplog.text.count(text) == 1, caplog.text


# Between sessions --------------------------------------------------------------------------


def test_a_guests_choice_of_write_through_outlives_a_reconnect(disk, path):
    server = Server(disk, path=path)
    with serving(server):
        with connect(path) as guest:
            guest.set_config(WRITEBACK_OFFSET, b"\0")
            assert not disk.status()["write_cache"]
        disconnected(server)
        with connect(path) as guest:
            guest.get_features()
            assert not disk.status()["write_cache"]
            assert guest.get_config(WRITEBACK_OFFSET, 1) == b"\0"
