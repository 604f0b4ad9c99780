"""Our own requests to a front-end: told, answered, not read, and on a file of its choice."""

import asyncio
import contextlib
import socket
import struct

import pytest

from tests.hanging import held
from tests.hostile.attacker import EVERYTHING
from tests.hostile.victim import eventually
from tests.serving import serving
from vhostpy._spec import Feature
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.protocol.codec import (
    REQUESTS_TO_FRONT_END,
    BackEndRequest,
    Decoder,
    encode,
    encode_reply,
)
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.payloads import U64, VringState
from vhostpy.server import channel
from vhostpy.server.listen import Server

CHANGED = BackEndRequest.CONFIG_CHANGE_MSG
CALL = BackEndRequest.VRING_CALL
DEADLINE_S = 10


class Asking:
    """A disk, its front-end, and the channel between them; and a disk of somebody else's."""

    def __init__(self, loop, servers, guest: FrontEnd, end: socket.socket, innocent) -> None:
        self.loop = loop
        self.server = servers[0]
        self.guest = guest
        self.end = end
        self.innocent = innocent
        self.decoder = Decoder(REQUESTS_TO_FRONT_END)

    def tell(self, times: int = 1) -> list[bool]:
        async def tell() -> list[bool]:
            return [self.server.tell_config_changed() for _ in range(times)]

        return self.loop.run(tell(), DEADLINE_S)

    def tell_until_full(self) -> int:
        """Until one cannot be written any more; returns how many it were."""
        told = 0
        while not self.server.connection.channel._unsent:
            assert self.tell() == [True]
            told += 1
        return told

    def ask(self, request, payload=b"", acknowledged=True):
        """A future of the answer."""
        work = self.server.connection.channel.ask(request, payload, acknowledged=acknowledged)
        return asyncio.run_coroutine_threadsafe(work, self.loop.loop)

    def hear(self):
        """The next request of the back-end's."""
        while True:
            for message in self.decoder.feed(self.end.recv(self.decoder.wanted)):
                return message

    def serves_others(self) -> bool:
        return self.innocent.request(R.GET_QUEUE_NUM).value == 4


@pytest.fixture
def asking(workers, tmp_path):
    disks = [Disk(name, RamStorage(1 << 20), workers, queues=4) for name in ("disk", "innocent")]
    servers = [Server(disk, path=str(tmp_path / disk.name)) for disk in disks]
    ours, theirs = socket.socketpair()
    with (
        serving(*servers) as loop,
        ours,
        FrontEnd(servers[0].path) as guest,
        FrontEnd(servers[1].path) as innocent,
    ):
        ours.settimeout(DEADLINE_S)
        guest.negotiate(1 << Feature.VERSION_1, EVERYTHING)
        with theirs:
            guest.request(R.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        yield Asking(loop, servers, guest, ours, innocent)


def test_answers_are_matched_with_what_was_asked(asking):
    first, second = asking.ask(CHANGED), asking.ask(CALL, VringState(1, 0))
    heard = [asking.hear(), asking.hear()]
    assert [(m.request, m.payload, m.need_reply) for m in heard[1:]] == [
        (CALL, VringState(1, 0), True)
    ]
    answers = encode_reply(CHANGED, U64(3)) + encode_reply(CALL, U64(0))
    for at in range(len(answers)):  # a byte at a time
        asking.end.send(answers[at : at + 1])
    assert first.result(DEADLINE_S).payload == U64(3)
    assert second.result(DEADLINE_S).payload == U64(0)
    assert asking.ask(CHANGED, acknowledged=False).result(DEADLINE_S) is None
    assert not asking.hear().need_reply


@pytest.mark.parametrize(
    ("garbage", "words"),
    [
        (encode_reply(CALL, U64(0)), "VRING_CALL was answered, CONFIG_CHANGE_MSG had been asked"),
        (encode(CHANGED), "CONFIG_CHANGE_MSG: flags 0x1, expected a reply"),
        (encode_reply(CHANGED, bytes(12)), "CONFIG_CHANGE_MSG: payload of 12 bytes, expected 8"),
        (b"\xff" * 64, "request 4294967295: flags 0xffffffff"),
        (b"", "it ended before an answer came"),
    ],
    ids=["another", "no reply", "form", "noise", "end"],
)
def test_a_front_end_that_answers_garbage_loses_its_session(asking, caplog, garbage, words):
    asked = asking.ask(CHANGED)
    asking.hear()
    asking.end.sendall(garbage) if garbage else asking.end.close()
    assert asking.guest.hung_up()
    assert asked.result(DEADLINE_S) is None
    eventually(lambda: f"disk: back-end channel: {words}" in caplog.text)
    assert asking.serves_others()


@pytest.mark.parametrize("how", ["too many", "too long", "unanswered"])
def test_a_front_end_that_does_not_read_or_answer_loses_its_session(
    asking, caplog, monkeypatch, how
):
    if how != "too many":
        monkeypatch.setattr(channel, "PATIENCE_S", 0.05)
    asked = asking.ask(CHANGED) if how == "unanswered" else None
    if how == "too many":
        asking.tell_until_full()
        told = asking.tell(channel.PENDING_MAX + 1)
        assert told.count(True) == channel.PENDING_MAX - 1 and not told[-1]
    elif how == "too long":
        with contextlib.suppress(AssertionError, AttributeError):  # it may have ended just now
            asking.tell_until_full()
    assert asking.guest.hung_up()
    assert asked is None or asked.result(DEADLINE_S) is None
    eventually(lambda: "disk: back-end channel: " in caplog.text)
    assert asking.serves_others()


def test_a_front_end_that_reads_late_is_told_all_of_it(asking):
    told = asking.tell_until_full()
    told += sum(asking.tell(20))
    assert [asking.hear().request for _ in range(told)] == [CHANGED] * told
    assert asking.tell() == [True] and asking.hear().request == CHANGED
    assert asking.guest.get_features()


def test_a_channel_that_was_closed_or_is_no_stream_is_not_told(asking):
    asking.end.close()
    assert asking.tell() == [False]
    datagram = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener = socket.socket(socket.AF_UNIX)
    with datagram[0], datagram[1], listener:
        for file in (datagram[0], listener):
            asking.guest.request(R.SET_BACKEND_REQ_FD, fds=[file.fileno()])
            assert asking.tell() == [False]
            assert asking.ask(CHANGED).result(DEADLINE_S) is None
    assert asking.guest.get_features()


def test_a_channel_that_is_replaced_answers_nobody_and_the_next_one_serves(asking):
    asked = asking.ask(CHANGED)
    asking.hear()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        asking.guest.request(R.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        assert asked.result(DEADLINE_S) is None
        assert asking.end.recv(1) == b""  # nobody has it any more
        assert asking.tell() == [True]
        assert ours.recv(100) == encode(CHANGED)
    assert asking.guest.get_features()


def test_a_reader_in_a_page_fault_holds_up_no_other_session(asking, tmp_path, monkeypatch):
    """It has the lock that readers of a Unix socket wait for, whatever their flags."""
    (directory := tmp_path / "hung").mkdir()
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        stack.enter_context(theirs)
        ours.send(struct.pack("=Q", 0))
        if not stack.enter_context(held(directory, theirs.fileno(), "read")):
            pytest.skip("cannot mount FUSE: run as root")
        asking.guest.request(R.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        monkeypatch.setattr(channel, "PATIENCE_S", 0.2)
        asked = asking.ask(CHANGED)
        ours.sendall(encode_reply(CHANGED, U64(0)))
        assert asking.serves_others()
        assert asking.guest.hung_up()
        assert asked.result(DEADLINE_S) is None
        # The next one would come to wait for the same thread.
        assert asking.server.account.closing.left
        assert asking.serves_others()
    eventually(lambda: not asking.server.account.closing.left)
