"""Messages that a hostile front-end sends: its session ends, and nobody else notices.

Each attack goes to a RAM disk over a real socket, beside an innocent front-end of the same
process that writes and verifies blocks all the while. The names are those of the bugs that
shipped elsewhere. `tests/vhostpy/handlers/` has the same faults without a socket.
"""

import contextlib
import gc
import os
import random
import socket
import struct
import threading

import pytest

from tests.serving import serving
from tests.talk import PROTOCOL_FEATURES, REGION, Talk, eventfd, open_fds, ready
from vhostpy._spec import Feature
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import ProtocolError, Refused, VhostpyError
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.frontend.sharedmemory import UVA_BASE
from vhostpy.protocol.codec import Decoder, Header, encode
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.payloads import (
    U64,
    Config,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostpy.runtime.pool import Workers
from vhostpy.server.listen import Server
from vhostpy.system.fds import OwnedFd

FEATURES = 1 << Feature.VERSION_1 | 1 << Feature.EVENT_IDX
EVERYTHING = (1 << 24) - 1
TOP = 1 << 64
DISK_SIZE = 1 << 20


class Innocent:
    """Writes and verifies blocks on a thread of its own; `moved` counts them."""

    def __init__(self, path: str) -> None:
        self.guest = FrontEnd(path)
        self.guest.negotiate(FEATURES, EVERYTHING)
        self.guest.set_mem_table()
        self.queue = self.guest.start_queue(0, 16)
        self.header, self.buffer, self.status = (self.guest.allocate(4096) for _ in range(3))
        self.moved = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="innocent")
        self._thread.start()

    def wait(self, count: int = 1) -> None:
        """Until it has moved `count` blocks more."""
        with self._moved:
            goal = self.moved + count
            assert self._moved.wait_for(lambda: self.failure or self.moved >= goal, timeout=20)
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.guest.close()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                sector, block = self.moved % 100, os.urandom(512)
                self._request(1, sector, block)
                assert self._request(0, sector, bytes(512)) == block
                with self._moved:
                    self.moved += 1
                    self._moved.notify_all()
        except BaseException as error:
            with self._moved:
                self.failure = error
                self._moved.notify_all()

    def _request(self, kind: int, sector: int, block: bytes) -> bytes:
        memory = self.guest.memory
        memory.write(self.header, struct.pack("<IIQ", kind, 0, sector))
        memory.write(self.buffer, block)
        data = [(self.buffer, 512)]
        readable, writable = (data, []) if kind else ([], data)
        self.queue.ring.add([(self.header, 16), *readable], [*writable, (self.status, 1)])
        self.queue.ring.kick()
        self.queue.wait_used()
        assert memory.read(self.status, 1) == b"\0"
        return memory.read(self.buffer, 512)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Path of the disk under attack, and the innocent front-end on its neighbour."""
    workers = Workers(1)
    workers.start()
    where = tmp_path_factory.mktemp("sockets")
    servers = [
        Server(Disk(name, RamStorage(DISK_SIZE), workers, queues=256), path=str(where / name))
        for name in ("attacked", "innocent")
    ]
    with serving(*servers):
        innocent = Innocent(servers[1].path)
        try:
            yield servers[0].path, innocent
        finally:
            innocent.close()
    workers.stop()


def prepared(path: str) -> FrontEnd:
    """A front-end that has done all that QEMU does, with one ring running."""
    guest = FrontEnd(path)
    guest.negotiate(FEATURES, EVERYTHING)
    guest.set_mem_table()
    guest.start_queue(0, 16)
    return guest


# Attacks: bytes and fds, or a function that sends some. ------------------------------------


def files(count: int) -> list[OwnedFd]:
    return [eventfd() for _ in range(count)]


def inflight_of(make_fd, payload: Inflight):
    def attack(guest: FrontEnd) -> None:
        guest.stop_queue(0)
        with OwnedFd(make_fd()) as fd, contextlib.suppress(ConnectionError):
            guest.send_raw(encode(R.SET_INFLIGHT_FD, payload), [fd])

    return attack


def inflight_with(head: bytes):
    """Memory that begins like this, met when the ring starts."""

    def attack(guest: FrontEnd) -> None:
        with OwnedFd(memfd(4096)) as fd:
            os.pwrite(fd.fileno(), head, 0)
            guest.stop_queue(0)
            guest.send_raw(encode(R.SET_INFLIGHT_FD, Inflight(4096, 0, 1, 16)), [fd])
        with contextlib.suppress(ConnectionError, Refused):
            guest.announce(guest.queues[0], base=0)

    return attack


def inflight_truncated(guest: FrontEnd) -> None:
    """Under a running ring, whose worker then writes there."""
    with OwnedFd(memfd(4096)) as fd:
        guest.stop_queue(0)
        guest.request(R.SET_INFLIGHT_FD, Inflight(4096, 0, 1, 16), [fd])
        guest.announce(guest.queues[0], base=0)
        os.ftruncate(fd.fileno(), 0)
    buffer = guest.allocate(4096)
    guest.queues[0].ring.add([(buffer, 16)], [(buffer + 512, 513)])
    guest.queues[0].ring.kick()


def say(request, payload=b"", fds=0, **flags):
    return lambda guest: _send(guest, encode(request, payload, **flags), fds)


def raw(data: bytes, fds=0):
    return lambda guest: _send(guest, data, fds)


def _send(guest: FrontEnd, data: bytes, count: int) -> None:
    fds = files(count)
    with contextlib.suppress(ConnectionError):  # what came before may have ended it
        guest.send_raw(data, fds)
    for fd in fds:
        fd.close()


def header(request, size, flags=1) -> bytes:
    return Header(request, flags, size).pack()


def region(gpa=1 << 40, size=1 << 20, uva=1 << 41, offset=0):
    return SingleRegion(MemoryRegion(gpa, size, uva, offset))


def ring_at(index=1, flags=0, desc=UVA_BASE, used=UVA_BASE, avail=UVA_BASE, log=0):
    return VringAddress(index, flags, desc, used, avail, log)


def add_region_of(make_fd, **place):
    def attack(guest: FrontEnd) -> None:
        with OwnedFd(make_fd()) as fd:
            guest.send_raw(encode(R.ADD_MEM_REG, region(**place)), [fd])

    return attack


def memfd(size: int) -> int:
    fd = os.memfd_create("hostile")
    os.ftruncate(fd, size)
    return fd


def ring_of(num: int):
    def attack(guest: FrontEnd) -> None:
        guest.send_raw(encode(R.SET_VRING_NUM, VringState(1, num)))

    return attack


def ring_lies_at(**place):
    """A ring whose addresses are wrong, kicked."""

    def attack(guest: FrontEnd) -> None:
        at = UVA_BASE + guest.allocate(1 << 16)
        where = {"desc": at, "avail": at + 4096, "used": at + 8192} | place
        guest.request(R.SET_VRING_NUM, VringState(1, 256))
        guest.send_raw(encode(R.SET_VRING_ADDR, ring_at(**where)))
        _send(guest, encode(R.SET_VRING_KICK, VringFile(1, True)), 1)

    return attack


def kick_by(make_fd):
    def attack(guest: FrontEnd) -> None:
        guest.request(R.GET_VRING_BASE, VringState(0, 0))
        with OwnedFd(make_fd()) as fd:
            guest.send_raw(encode(R.SET_VRING_KICK, VringFile(0, True)), [fd])

    return attack


def log_of(size: int, offset: int, file_size: int = 4096):
    def attack(guest: FrontEnd) -> None:
        with OwnedFd(memfd(file_size)) as fd:
            guest.send_raw(encode(R.SET_LOG_BASE, Log(size, offset)), [fd])

    return attack


def too_many_fds(guest: FrontEnd) -> None:
    _send(guest, encode(R.SET_MEM_TABLE, MemoryTable((REGION,))), 253)


def fds_with_the_payload(guest: FrontEnd) -> None:
    wire = encode(R.SET_VRING_KICK, VringFile(0, True))
    guest.send_raw(wire[:12])
    _send(guest, wire[12:], 1)


ATTACKS = {
    "CVE-2019-14818: fd on SET_VRING_NUM": say(R.SET_VRING_NUM, VringState(1, 16), 1),
    "CVE-2019-14818: two fds on SET_VRING_KICK": say(R.SET_VRING_KICK, VringFile(1, True), 2),
    "CVE-2019-14818: fd in spite of bit 8": say(R.SET_VRING_CALL, VringFile(1, False), 1),
    "CVE-2022-0669: 8 fds on GET_FEATURES": say(R.GET_FEATURES, b"", 8),
    "CVE-2022-0669: fds on an unknown request": say(99, b"abc", 8),
    "CVE-2022-0669: fds on SET_INFLIGHT_FD": say(R.SET_INFLIGHT_FD, Inflight(1, 1, 1, 1), 3),
    "CVE-2020-10722: log offset wraps": log_of(4096, TOP - 1),
    "CVE-2020-10722: log size wraps": log_of(TOP - 1, 4096),
    "log beyond its file": log_of(8192, 0),
    "log of no bytes": log_of(0, 0),
    "log without a file": say(R.SET_LOG_BASE, Log(4096, 0)),
    "CVE-2020-10723: ring 256": say(R.SET_VRING_NUM, VringState(256, 16)),
    "CVE-2020-10723: ring 2**32 - 1": say(R.SET_VRING_BASE, VringState((1 << 32) - 1, 0)),
    "CVE-2020-10723: ring 512 by its kick": say(R.SET_VRING_KICK, VringFile(512, True), 1),
    "CVE-2020-10723: ring 2**63 by its call": say(R.SET_VRING_CALL, VringFile(1 << 63, True), 1),
    "CVE-2020-10723: address of ring 256": say(R.SET_VRING_ADDR, ring_at(256)),
    "CVE-2020-10723: base of ring 256": say(R.GET_VRING_BASE, VringState(256, 0)),
    "CVE-2020-10724: crypto session": say(R.CREATE_CRYPTO_SESSION, b"\xff" * 4096),
    "CVE-2021-3839: inflight beyond its file": say(
        R.SET_INFLIGHT_FD, Inflight(1 << 40, 0, 65535, 65535), 1
    ),
    "inflight: no queues": say(R.GET_INFLIGHT_FD, Inflight(0, 0, 0, 16), need_reply=True),
    "inflight: while a ring runs": say(R.SET_INFLIGHT_FD, Inflight(4096, 0, 1, 16), 1),
    "inflight: an eventfd": inflight_of(lambda: os.eventfd(0), Inflight(4096, 0, 1, 16)),
    "inflight: larger than its file": inflight_of(lambda: memfd(4096), Inflight(8192, 0, 1, 16)),
    "inflight: behind its file's end": inflight_of(
        lambda: memfd(4096), Inflight(4096, 4096, 1, 16)
    ),
    "inflight: offset wraps": inflight_of(lambda: memfd(4096), Inflight(4096, TOP - 4096, 1, 16)),
    "inflight: too small for its queues": inflight_of(
        lambda: memfd(4096), Inflight(4096, 0, 256, 32768)
    ),
    "inflight: unaligned": inflight_of(lambda: memfd(8192), Inflight(4096, 4, 1, 16)),
    "inflight: queues of 0": inflight_of(lambda: memfd(4096), Inflight(4096, 0, 1, 0)),
    "inflight: truncated under a ring": inflight_truncated,
    "inflight: of another version": inflight_with(struct.pack("<QHH", 0, 2, 16)),
    "inflight: of another size": inflight_with(struct.pack("<QHH", 0, 1, 15)),
    "size: 4 GiB of payload": raw(header(R.SET_MEM_TABLE, 0xFFFFFFFF)),
    "size: a table too large by one region": raw(header(R.SET_MEM_TABLE, 8 + 9 * 32), 8),
    "size: a config that lies": raw(header(R.SET_CONFIG, 16) + struct.pack("<IIII", 0, 256, 0, 0)),
    "size: payload where none is": raw(header(R.GET_FEATURES, 8) + bytes(8)),
    "header: version 2": raw(header(R.GET_FEATURES, 0, flags=2)),
    "header: a reply": raw(header(R.GET_FEATURES, 0, flags=5)),
    "header: ones": raw(b"\xff" * 64),
    "header: zeros": raw(bytes(64)),
    "MSG_CTRUNC: 253 fds": too_many_fds,
    "fds with the payload": fds_with_the_payload,
    "region: size 0": say(R.ADD_MEM_REG, region(size=0), 1),
    "region: GPA wraps": say(R.ADD_MEM_REG, region(gpa=TOP - 4096), 1),
    "region: UVA wraps": say(R.ADD_MEM_REG, region(uva=TOP - 4096), 1),
    "region: offset wraps": say(R.ADD_MEM_REG, region(offset=TOP - 4096), 1),
    "region: offset beyond off_t": say(R.ADD_MEM_REG, region(offset=1 << 63), 1),
    "region: overlaps": say(R.ADD_MEM_REG, region(gpa=0x10_0000), 1),
    "region: all there is": say(R.ADD_MEM_REG, region(0, TOP - 1, 0), 1),
    "region: an eventfd": add_region_of(lambda: os.eventfd(0)),
    "region: a socket": add_region_of(lambda: socket.socketpair()[0].detach()),
    "region: a directory": add_region_of(lambda: os.open("/", os.O_RDONLY)),
    "region: /dev/zero": add_region_of(lambda: os.open("/dev/zero", os.O_RDWR)),
    "region: larger than its file": add_region_of(lambda: memfd(4096)),
    "region: behind its file's end": add_region_of(lambda: memfd(1 << 20), offset=4096),
    "table: no regions": say(R.SET_MEM_TABLE, MemoryTable(())),
    "table: the same region twice": say(R.SET_MEM_TABLE, MemoryTable((REGION, REGION)), 2),
    "ring: 0 descriptors": ring_of(0),
    "ring: 3 descriptors": ring_of(3),
    "ring: 65535 descriptors": ring_of(65535),
    "ring: 2**32 - 1 descriptors": ring_of((1 << 32) - 1),
    "ring: unaligned descriptors": ring_lies_at(desc=UVA_BASE + 0x10_0008),
    "ring: unaligned avail ring": ring_lies_at(avail=UVA_BASE + 0x10_0001),
    "ring: unaligned used ring": ring_lies_at(used=UVA_BASE + 0x10_0002),
    "ring: outside memory": ring_lies_at(desc=0x1000),
    "CVE-2018-1059: ring begins in memory and ends outside": ring_lies_at(
        desc=UVA_BASE + 0x10_0000 + (32 << 20) - 16
    ),
    "ring: wraps": ring_lies_at(used=TOP - 4),
    "ring: logged at a wrapping address": ring_lies_at(flags=1, log=TOP - 1),
    "running ring: moved out of memory": say(R.SET_VRING_ADDR, ring_at(0, desc=0, used=0, avail=0)),
    "kick by a regular file": kick_by(lambda: memfd(8)),
    "kick by a socket": kick_by(lambda: socket.socketpair()[0].detach()),
    "config: unknown flags": say(R.SET_CONFIG, Config(0, 0xFFFFFFFF, b"a")),
    "config: beyond its end": say(R.SET_CONFIG, Config(0xFFFFFFFF, 0, b"a")),
    "enable: 2": say(R.SET_VRING_ENABLE, VringState(0, 2)),
    "features: all": say(R.SET_FEATURES, U64(TOP - 1)),
    "protocol features: all": say(R.SET_PROTOCOL_FEATURES, U64(TOP - 1)),
    "status: 9 bits": say(R.SET_STATUS, U64(256)),
    "postcopy without negotiation": say(R.POSTCOPY_LISTEN),
    "unknown request": say(46, b""),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_attack_ends_its_session_and_nobody_else_notices(place, attack, caplog):
    path, innocent = place
    with FrontEnd(path) as after:
        after.get_features()  # the last session's cleaning is done
    before = len(open_fds())
    with prepared(path) as guest:
        attack(guest)
        assert guest.hung_up()
    innocent.wait(3)
    with prepared(path) as after:  # the device is there for the next one
        after.stop_queue(0)
    with FrontEnd(path) as after:
        after.get_features()
        assert len(open_fds()) <= before + 2
    ends = [r.getMessage() for r in caplog.records if "session ended" in r.getMessage()]
    assert len(ends) == 1  # one clear error
    assert ends[0].startswith("attacked: session ended: ")
    assert "Traceback" not in caplog.text


def test_half_a_message_or_a_byte_at_a_time_holds_up_nobody(place):
    path, innocent = place
    wire = encode(R.SET_VRING_NUM, VringState(1, 16), need_reply=True)
    with prepared(path) as guest:
        for byte in wire:
            guest.send_raw(bytes([byte]))
            innocent.wait()
        assert guest.receive().payload == U64(0)
        _send(guest, header(R.SET_MEM_TABLE, 264), 8)
        innocent.wait(3)
    with prepared(path) as after:
        after.stop_queue(0)


def test_repeated_setters_leak_nothing(place):
    # CVE-2019-14818, CVE-2020-10726: each repetition kept what the one before had made.
    path, innocent = place
    with prepared(path) as guest:
        counts = []
        for _ in range(3):
            for _ in range(100):
                guest.request(R.SET_VRING_NUM, VringState(1, 16))
                for request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR):
                    for index in (0, 1):
                        fds = files(1)
                        guest.request(request, VringFile(index, True), fds)
                        fds[0].close()
                guest.request(R.GET_INFLIGHT_FD, Inflight(0, 0, 1, 16))
                fds = files(1)
                guest.request(R.SET_BACKEND_REQ_FD, b"", fds)
                fds[0].close()
                guest.set_features(guest.features)
            counts.append(len(open_fds()))
        assert counts[0] == counts[2]
    innocent.wait()


def test_guest_that_toggles_as_fast_as_it_can_starves_nobody(place):
    path, innocent = place
    with prepared(path) as guest:
        start = innocent.moved
        for i in range(2000):
            guest.send_raw(encode(R.SET_VRING_ENABLE, VringState(0, i % 2)))
            guest.send_raw(encode(R.SET_FEATURES, U64(guest.features ^ (i % 2) << 26)))
        guest.get_features()  # all of it was handled
        assert innocent.moved > start
    innocent.wait()


# Mutated conversations ---------------------------------------------------------------------


def conversation(rng: random.Random) -> list[tuple[bytes, int]]:
    """What a good front-end says, some of it changed; (bytes, count of fds)."""
    at = UVA_BASE
    good = [
        (encode(R.GET_FEATURES), 0),
        (encode(R.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES)), 0),
        (encode(R.SET_FEATURES, U64(FEATURES | 1 << 30)), 0),
        (encode(R.ADD_MEM_REG, SingleRegion(MemoryRegion(0, 1 << 20, at, 0))), 1),
        (encode(R.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 1 << 20, at, 0),))), 1),
        (encode(R.SET_VRING_NUM, VringState(0, 16)), 0),
        (encode(R.SET_VRING_BASE, VringState(0, 0)), 0),
        (encode(R.SET_VRING_ADDR, ring_at(0, 0, at, at + 0x2000, at + 0x1000)), 0),
        (encode(R.SET_VRING_KICK, VringFile(0, True)), 1),
        (encode(R.SET_VRING_CALL, VringFile(0, True)), 1),
        (encode(R.SET_VRING_ENABLE, VringState(0, 1)), 0),
        (encode(R.SET_LOG_BASE, Log(4096, 0)), 1),
        (encode(R.GET_CONFIG, Config(0, 0, bytes(60))), 0),
        (encode(R.GET_VRING_BASE, VringState(0, 0)), 0),
        (encode(R.RESET_DEVICE), 0),
    ]
    said = []
    for wire, count in good:
        roll = rng.random()
        if roll < 0.05:
            continue
        if roll < 0.1:
            said.append((wire, count))
        if roll < 0.2:
            wire = bytearray(wire)
            wire[rng.randrange(len(wire))] = rng.choice([0, 1, 2, 8, 0x7F, 0x80, 0xFF])
            wire = bytes(wire)
        elif roll < 0.25:
            count = rng.choice([0, 1, 2, 8])
        elif roll < 0.28:
            wire = wire[:12] + rng.randbytes(len(wire) - 12)
        said.append((wire, count))
    return said


@pytest.mark.parametrize("seed", range(20))
def test_mutated_conversation_ends_in_answers_or_one_error_and_no_file(seed):
    gc.collect()  # what earlier tests left in garbage would go at any time
    rng, before = random.Random(seed), open_fds()
    sessions_ended = 0
    for _ in range(100):
        talk, decoder = Talk(), Decoder()
        talk.decoder = decoder
        for wire, count in conversation(rng):
            fds = tuple(files(count))
            try:
                for message in decoder.feed(wire, fds):
                    talk.take(message)
            except ProtocolError:
                sessions_ended += 1
                break
        decoder.close()
        talk.close()
        del talk
    assert sessions_ended > 50  # else nothing was mutated
    assert open_fds() <= before  # a close of before may have been slow


def memory_file() -> OwnedFd:
    return OwnedFd(memfd(1 << 20))


def test_session_that_was_ended_takes_nothing_more():
    talk = ready()
    with pytest.raises(VhostpyError):
        talk.num(256)
    for _ in range(2):
        with pytest.raises(ProtocolError, match=r"after the session ended: .*ring 256"):
            talk.table(REGION)
    talk.close()
