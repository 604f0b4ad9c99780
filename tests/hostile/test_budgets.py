"""Who uses up what is finite in the process: fds, closings, addresses. Others do not notice.

Over sockets, beside the innocent.
"""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from tests.hanging import lingering_socket
from tests.hostile.victim import eventually
from vhostpy._spec import Feature
from vhostpy.errors import Refused
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import encode
from vhostpy.protocol.payloads import MemoryRegion
from vhostpy.system.fds import FDS_ROOM, OwnedFd

EVERYTHING = (1 << 24) - 1
BOUND_S = 0.1  # what an innocent may wait for an answer
TURNS = 5  # of which one has to be undisturbed by what else the machine does
PACE_S = 0.01  # between two closings that end: less than what was once waited for each
LINGERING = 100


def negotiated(path: str) -> FrontEnd:
    guest = FrontEnd(path, timeout_s=20)
    guest.negotiate(1 << Feature.VERSION_1, EVERYTHING)
    return guest


@contextlib.contextmanager
def last_hold(path: str, files: Sequence[socket.socket]) -> Iterator[FrontEnd]:
    """The back-end gets `files` with a message that must have none.

    Nobody else holds them any more when it does: the session before ends only then.
    """
    with FrontEnd(path, timeout_s=20) as occupant:
        occupant.get_features()
        guest = FrontEnd(path, timeout_s=20)
        guest.send_raw(encode(R.GET_FEATURES), [file.fileno() for file in files])
        for file in files:
            file.close()
    with guest:
        yield guest


def test_closings_that_hang_use_up_neither_fds_nor_threads_of_others(place):
    """What is closed behind them stays open: once more with every connection, for ever."""
    plain = socket.socket()
    with place.unnoticed(), plain, negotiated(place.path("bad1")) as innocent:
        process = f"/proc/{place.victim.process.pid}"
        fds, threads = (len(os.listdir(f"{process}/{kind}")) for kind in ("fd", "task"))
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(lingering_socket()) for _ in range(8)]
            with last_hold(place.path("bad0"), sockets) as bad:
                assert bad.hung_up()
            for _ in range(2):
                with FrontEnd(place.path("bad0"), timeout_s=20) as bad:
                    bad.send_raw(encode(R.GET_FEATURES), [plain.fileno()] * FDS_ROOM)
                    assert bad.hung_up()
            assert len(os.listdir(f"{process}/fd")) < fds + 20
            assert len(os.listdir(f"{process}/task")) < threads + 2
            account = place.victim.status("bad0")["account"]
            assert 0 < account["closing"] <= account["fds"] < account["fds_share"]
            innocent.set_mem_table()
            with negotiated(place.path("bad2")) as other:
                other.set_mem_table()
        eventually(lambda: not place.victim.status("bad0")["account"]["fds"])
        with negotiated(place.path("bad0")) as again:
            again.set_mem_table()


@contextlib.contextmanager
def released_one_after_the_other(count: int) -> Iterator[list[socket.socket]]:
    """Lingering sockets whose closings end one by one, once the block has begun to wait."""
    with socket.create_server(("127.0.0.1", 0), backlog=count) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        pairs = []
        for _ in range(count):
            ours = socket.socket()
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            ours.connect(listener.getsockname())
            pairs.append((ours, listener.accept()[0]))
    for ours, peer in pairs:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        yield [ours for ours, _ in pairs]
        start = time.monotonic()
        for i, (_, peer) in enumerate(pairs):
            time.sleep(max(0.0, start + PACE_S * (i + 1) - time.monotonic()))
            peer.close()
    finally:
        for pair in pairs:
            for one in pair:
                one.close()


def slowest_answer(innocent: FrontEnd, stop: threading.Event, slowest: list[float]) -> None:
    while not stop.wait(0.002):
        start = time.monotonic()
        innocent.get_features()
        slowest.append(time.monotonic() - start)


def test_closings_that_take_their_time_hold_up_no_answer(place):
    """Once up to 20 ms for each of the 253 that a message may have: seconds."""
    with place.unnoticed(), negotiated(place.path("bad1")) as innocent:
        turns = []
        while len(turns) < TURNS and min(turns, default=1) >= BOUND_S:
            slowest: list[float] = []
            stop = threading.Event()
            asks = threading.Thread(target=slowest_answer, args=(innocent, stop, slowest))
            with released_one_after_the_other(LINGERING) as sockets:
                asks.start()
                with last_hold(place.path("bad0"), sockets):
                    pass
            stop.set()
            asks.join()
            turns.append(max(slowest))
            eventually(lambda: not place.victim.status("bad0")["connected"])
        assert turns[-1] < BOUND_S, turns


def test_sparse_memory_uses_up_the_addresses_of_one_socket(place):
    size = 1 << 40
    with (
        place.unnoticed(),
        negotiated(place.path("bad0")) as bad,
        OwnedFd(os.memfd_create("sparse")) as fd,
    ):
        os.ftruncate(fd.fileno(), size)
        share = "GiB of addresses: the share of each of 9 sockets"
        with place.one_error("bad0", share), pytest.raises(Refused):
            for gpa in range(0, 65 * size, size):
                bad.add_mem_reg(MemoryRegion(gpa, size, gpa, 0), fd)
        for name in ("bad1", "bad2", "badram", "bad0"):
            eventually(lambda: not place.victim.status("bad0")["account"]["mappings"])
            with negotiated(place.path(name)) as innocent:
                innocent.set_mem_table()


def test_as_many_regions_as_there_may_be_fit_into_a_share(place):
    with (
        place.unnoticed(),
        negotiated(place.path("bad0")) as guest,
        OwnedFd(os.memfd_create("regions")) as fd,
    ):
        size = 4096
        os.ftruncate(fd.fileno(), size)
        for gpa in range(0, 509 * size, size):
            guest.add_mem_reg(MemoryRegion(gpa, size, gpa, 0), fd)
        account = place.victim.status("bad0")["account"]
        assert account["mappings"] == 509
        assert account["mapped_bytes"] == 509 * size
        # Among a hundred sockets there would be room for them and for a log, too.
        assert account["mappings_share"] * 9 // 100 > 520
