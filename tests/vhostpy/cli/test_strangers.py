"""What strangers make up, on the operator's terminal and in his log."""

import contextlib
import os
import re
import socket
import threading
from pathlib import Path

import pytest

from tests.vhostpy.cli.commands import Running, run
from vhostpy import cli
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.cli import answers
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.protocol.codec import FrontEndRequest
from vhostpy.protocol.payloads import VringState
from vhostpy.site import control
from vhostpy.system.lines import BURST

EVIL = "x\x1b[2J\x1b]0;owned\x07\nvhostpy net: vu1: forged"


def lines_and_left_out(log, text):
    """How many lines have `text`, and how many more they speak of."""
    lines = [line for line in log.splitlines() if text in line]
    more = (re.search(r"… ([\d,]+) more like this", line) for line in lines)
    return len(lines), sum(int(found[1].replace(",", "")) for found in more if found)


def test_the_name_of_a_file_that_a_front_end_sends_makes_no_line_in_the_log(place):
    with Running("net", "--socket", "vu0", "--socket", "vu1") as running, FrontEnd("vu0") as guest:
        guest.negotiate(1 << Feature.VERSION_1)
        guest.set_mem_table()
        guest.start_queue(1, 8)
        with open(os.memfd_create(EVIL), "wb") as evil:
            guest.set_ring_file(FrontEndRequest.SET_VRING_CALL, 1, evil.fileno())
        assert guest.hung_up()
    (line,) = [line for line in running.stderr.splitlines() if "session ended" in line]
    assert r"x\x1b[2J\x1b]0;owned\x07\nvhostpy net: vu1: forged" in line
    assert all(c.isprintable() or c == "\n" for c in running.stderr)
    assert not re.search(r"^vhostpy net: vu1: forged", running.stderr, re.M)


def test_front_ends_that_come_and_go_do_not_fill_the_log(place):
    with Running("net", "--socket", "vu0", "--socket", "vu1") as running:
        for _ in range(200):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
                one.settimeout(10)
                one.connect("vu0")
                one.shutdown(socket.SHUT_WR)
                assert one.recv(1) == b""
    for text in ("vu0: front-end connected", "vu0: front-end disconnected"):
        said, left_out = lines_and_left_out(running.stderr, text)
        assert said <= BURST + 1 and said + left_out == 200


def test_a_guest_that_breaks_its_ring_again_and_again_does_not_fill_the_log(place):
    with Running("net", "--socket", "vu0", "--socket", "vu1") as running, FrontEnd("vu0") as guest:
        guest.negotiate(1 << Feature.VERSION_1, 1 << ProtocolFeature.REPLY_ACK)
        guest.set_mem_table()
        queue = guest.start_queue(1, 8)
        for _ in range(50):
            guest.memory.write(queue.avail_gpa, (60000 << 16).to_bytes(4, "little"))
            os.eventfd_write(queue.kick.fileno(), 1)
            assert queue.wait_err()
            guest.request(FrontEndRequest.GET_VRING_BASE, VringState(1, 0))
            guest.memory.write(queue.avail_gpa, bytes(4))
            guest.announce(queue, base=0)
    said, left_out = lines_and_left_out(running.stderr, "indexes make no sense")
    assert said <= BURST + 1 and said + left_out == 50


def test_a_process_that_lies_steers_no_terminal(place):
    """A control socket may be anybody's, where --control names it."""
    worker = dict.fromkeys(("busy_share", "turns", "sleeps"), 0.5) | {"index": EVIL}
    status = {
        **dict.fromkeys(("name", "version", "pid"), EVIL),
        "kind": "net", "uptime_s": 1, "memory_bytes": 1, "workers": [worker],
        "switch": {EVIL: EVIL},
        "sockets": [{
            **dict.fromkeys(("name", "socket", "handshake", "waits_for", "sessions"), EVIL),
            "connected": EVIL,
            "device": {EVIL: EVIL},
        }],
    }  # fmt: skip
    port = {"port": EVIL, "kind": EVIL, "socket": EVIL}
    answers_of = {
        "status": status,
        "stats": [{**port, "queues": [{"index": EVIL, EVIL: 1}], "latency": {}}],
        "workers": [],
        "fdb_flush": {"flushed": EVIL},
    }

    def reply(message):
        if message["do"] == "fdb":
            return control.refusal(message["id"], control.ControlError(EVIL, EVIL))
        return {"ok": True, "result": answers_of[message["do"]]}

    with liar("liar", reply):
        for words, failed in (("status", 0), ("stats", 0), ("fdb flush", 0), ("fdb show", 1)):
            result = run(*words.split(), "--control", "liar")
            assert result.returncode == failed, result.stderr
            shown = result.stdout + result.stderr
            assert all(c.isprintable() or c == "\n" for c in shown), words
            assert r"\x1b[2J" in shown
            assert not re.search(r"^vhostpy net: vu1: forged", shown, re.M)


NOBODY = {"name": 1, "version": 1, "pid": 1, "kind": "net", "uptime_s": 1, "memory_bytes": 1}
DISK = {**NOBODY, "kind": "blk", "workers": [], "sockets": []}
# What is answered to a verb, and what is said of it.
GARBAGE = [
    ("status", {}, "name is missing"),
    ("status", None, "the answer is nothing, expected a map"),
    ("status", [], "the answer is a list, expected a map"),
    ("status", {**NOBODY, "workers": []}, "sockets is missing"),
    ("status", {**NOBODY, "workers": 7, "sockets": []}, "workers is a whole number"),
    ("status", {**NOBODY, "workers": [{}], "sockets": []}, "workers[0].index is missing"),
    ("status", {**DISK, "sockets": [7]}, "sockets[0] is a whole number, expected a map"),
    ("status", {**DISK, "uptime_s": "long"}, "uptime_s is text, expected a whole number or"),
    ("status", {**DISK, "uptime_s": float("inf")}, "uptime_s is inf, expected a number"),
    ("status", {**DISK, "switch": []}, "switch is a list, expected a map"),
    ("status", {**DISK, "more": b"\xff"}, "more is bytes"),
    ("status --json", {**DISK, "more": [b""]}, "more[0] is bytes"),
    ("stats", [{}], "the answer[0].port is missing"),
    ("stats", {}, "the answer is a map, expected a list"),
    ("fdb show", [{"vlan": 1}], "the answer[0].mac is missing"),
    ("fdb flush", {}, "flushed is missing"),
    ("limit", {"port": "x", "requests_per_s": None, "bytes_per_s": "many"}, "burst_s is missing"),
    ("resize", {"port": "x"}, "size_before_bytes is missing"),
]


@pytest.mark.parametrize(("words", "answer", "wrong"), GARBAGE)
def test_an_answer_that_lacks_something_is_one_error(words, answer, wrong, place, capsys):
    verb = words.split()[0]
    kind = "blk" if verb in ("limit", "resize") else "net"

    def reply(message):
        asked = message["do"] == "status" and verb != "status"
        return {"ok": True, "result": {**DISK, "kind": kind} if asked else answer}

    with liar("liar", reply):
        assert cli.main([*words.split(), "--control", "liar"]) == 1
    error = capsys.readouterr().err
    assert "error: liar: cannot understand the answer to" in error
    assert wrong in error
    assert "next: restart that process with this version, vhostpy" in error
    assert error.count("\n") == 2


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (b"\0\0\0\1\xc1", "liar: not a message"),
        (b"\xff\xff\xff\xff", "liar: a message of 4294967295 bytes"),
        (b"\0\0\0\1\x90", "liar: answers with list, not a map"),
        (b"\0\0\0\1\x80", "None"),
    ],
)
def test_an_answer_that_is_none_is_one_error(reply, wrong, place, capsys):
    with liar("liar", lambda message: reply):
        assert cli.main(["status", "--control", "liar"]) == 1
    error = capsys.readouterr().err
    assert wrong in error and "Traceback" not in error


def test_a_stranger_among_those_that_run_is_one_row(place, capsys):
    (place / "vhostpy").mkdir()
    with liar("vhostpy/liar.sock", lambda message: {"ok": True, "result": {"sockets": 1}}):
        assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "liar" in shown and "cannot understand the answer to 'status'" in shown


def test_nesting_without_end_is_refused():
    deep = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(control.ControlError, match="too many maps and lists"):
        answers.check(Path("liar"), "fdb", deep)


@contextlib.contextmanager
def liar(path, reply):
    """A process that answers every request as `reply` says: a message, or bytes."""

    def serve():
        while True:
            decoder = control.Decoder()
            try:
                connection, _ = listener.accept()
            except OSError:  # all has been asked
                return
            with connection:
                while data := connection.recv(4096):
                    for message in decoder.feed(data):
                        answer = reply(message)
                        if not isinstance(answer, bytes):
                            answer = control.encode(answer)
                        connection.sendall(answer)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
