"""A back-end that means harm to whoever loads it: one clear error, and no waiting."""

import os
import struct
import time

import pytest

from tests.vhostpy.cli.commands import assert_told, run
from tests.vhostpy.load.liar import Liar, R, config
from tests.vhostpy.load.short import request
from vhostpy.errors import ConfigError, ProtocolError, VhostpyError
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.protocol.codec import encode_reply
from vhostpy.protocol.payloads import U64, Inflight
from vhostpy.system.fds import OwnedFd, send

EVENTFD_FULL = 2**64 - 2


def fill(fds):
    """What its sender cannot undo: the counter is full, and a write to it waits."""
    os.set_blocking(fds[0], False)
    os.eventfd_write(fds[0], EVENTFD_FULL)
    os.set_blocking(fds[0], True)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (config(block=0), "blk_size 0, expected a power of two"),
        (config(block=256), "blk_size 256"),
        (config(block=513), "blk_size 513"),
        (config(block=2**32 - 1), "blk_size 4294967295"),
        (config(capacity=2**64 - 1), "18446744073709551615 sectors"),
        (config(capacity=0), "the disk has 0 bytes"),
        (config(size=35), "35 bytes were answered, 36 had been asked"),
        (config(size=60), "60 bytes were answered"),
        (encode_reply(R.GET_CONFIG, b""), "GET_CONFIG: 36 bytes at 0 were refused"),
        (encode_reply(R.GET_CONFIG, b"12345"), "GET_CONFIG: payload of 5 bytes"),
        (encode_reply(R.GET_FEATURES, U64(0)), "GET_FEATURES was answered, "),
        (struct.pack("<III", R.GET_CONFIG, 5, 0xFFFFFFFF), "payload of 4294967295 bytes"),
        (struct.pack("<III", R.GET_CONFIG, 1, 0), "expected a reply"),
        (b"\x1b[2J" * 3, "request 1244814107: flags"),
    ],
)
def test_what_a_back_end_says_of_its_disk_is_looked_at(tmp_path, answer, text):
    path = tmp_path / "s"
    with Liar(path, {R.GET_CONFIG: answer}), pytest.raises(VhostpyError, match=text):
        request(str(path))


def test_the_operator_is_told_in_one_line(tmp_path):
    with Liar(tmp_path / "s", {R.GET_CONFIG: config(block=0)}):
        result = run("load", str(tmp_path / "s"), "--type", "blk")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and "blk_size 0" in result.stderr


def test_a_queue_more_than_there_are_is_not_started(tmp_path):
    path, answers = tmp_path / "s", {R.GET_CONFIG: config(queues=0)}
    with Liar(path, answers), pytest.raises(ConfigError, match="the disk has 0 queues"):
        request(str(path), queues=2)


def test_a_reply_that_comes_a_byte_at_a_time_is_not_waited_for(tmp_path):
    with Liar(tmp_path / "s"), FrontEnd(str(tmp_path / "s"), timeout_s=0.5) as end:
        reply, sock = iter(encode_reply(R.GET_FEATURES, U64(0))), end.sock

        class Dripping:
            """The socket; but a byte comes each time, in time."""

            def recvmsg(self, size, *_):
                time.sleep(0.1)
                return bytes([next(reply)]), [], 0, None

            def __getattr__(self, name):
                return getattr(sock, name)

        end.sock = Dripping()
        with pytest.raises(TimeoutError, match=r"no whole reply in 0\.5 s"):
            end.get_features()


def test_an_eventfd_that_it_fills_and_makes_blocking_ends_the_load(tmp_path):
    with Liar(tmp_path / "s", on={R.SET_VRING_KICK: fill}):
        result = run("load", str(tmp_path / "s"), "--type", "blk", "--seconds", "60")
    assert_told(result, 1, "s: the back-end makes us wait at its kick fd")


def test_a_driver_of_ours_does_not_wait_at_a_kick_fd(tmp_path):
    with Liar(tmp_path / "s", on={R.SET_VRING_KICK: fill}), FrontEnd(str(tmp_path / "s")) as end:
        end.negotiate(1 << 32)
        end.set_mem_table()
        queue = end.start_queue(0, 8)
        # Its answer says that the messages before have been read.
        end.get_features()
        queue.ring.add([(end.allocate(64), 64)], [])
        with pytest.raises(ProtocolError, match="makes us wait at its kick fd"):
            queue.ring.kick()


def test_a_call_that_it_takes_back_is_not_waited_for(tmp_path, monkeypatch):
    calls = []
    on = {R.SET_VRING_CALL: lambda fds: calls.append(os.set_blocking(fds[0], True))}
    with Liar(tmp_path / "s", on=on), FrontEnd(str(tmp_path / "s")) as end:
        end.negotiate(1 << 32)
        end.set_mem_table()
        queue = end.start_queue(0, 8)
        end.get_features()
        assert calls and os.get_blocking(queue.call.fileno())
        # It was there when we looked, and is gone when we take it.
        monkeypatch.setattr("vhostpy.frontend.frontend.select.select", lambda *_: ([1], [], []))
        assert not queue.wait(0.1)


def test_memory_that_it_cuts_short_is_told(tmp_path):
    shared = []
    on = {
        R.SET_MEM_TABLE: shared.extend,
        R.SET_VRING_ENABLE: lambda _: os.ftruncate(shared[0], 0),
    }
    features = U64(1 << 32 | 1 << 30 | 1 << 9)
    with Liar(tmp_path / "s", {R.GET_FEATURES: features}, on):
        result = run("load", str(tmp_path / "s"), "--type", "blk", "--seconds", "60")
    assert_told(result, 1, "s: the guest's memory is gone, or was cut short")


@pytest.mark.parametrize("area", [(0, 0), (4096, 1), (8192, 0), (1, 2**64 - 1), (2**64 - 1, 1)])
def test_memory_for_requests_under_way_lies_in_its_file(tmp_path, area):
    def answer(fds):
        with OwnedFd(os.memfd_create("inflight")) as fd:
            os.ftruncate(fd.fileno(), 4096)
            send(back_end.connection, encode_reply(R.GET_INFLIGHT_FD, Inflight(*area, 1, 8)), [fd])

    path, on = tmp_path / "s", {R.GET_INFLIGHT_FD: answer}
    with Liar(path, on=on) as back_end, FrontEnd(str(path)) as end:
        with pytest.raises(ProtocolError, match=f"{area[0]} bytes at offset {area[1]} of a"):
            end.get_inflight(1, 8)
        assert end.inflight is None
