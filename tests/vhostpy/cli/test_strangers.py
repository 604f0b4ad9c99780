"""What strangers make up, on the operator's terminal and in his log."""

import os
import re
import socket
import threading

from tests.vhostpy.cli.commands import Running, run
from vhostpy._spec import Feature, ProtocolFeature
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
            "device": {EVIL: EVIL},
        }],
    }  # fmt: skip
    port = {"port": EVIL, "kind": EVIL, "socket": EVIL}
    answers = {
        "status": status,
        "stats": [{**port, "queues": [{"index": EVIL, EVIL: 1}], "latency": {}}],
        "workers": [],
        "fdb_flush": {"flushed": EVIL},
    }

    def serve(listener):
        while True:
            decoder = control.Decoder()
            try:
                connection, _ = listener.accept()
            except OSError:  # all has been asked
                return
            with connection:
                while data := connection.recv(4096):
                    for message in decoder.feed(data):
                        if message["do"] == "fdb":
                            error = control.ControlError(EVIL, EVIL)
                            connection.sendall(control.refusal(message["id"], error))
                        else:
                            result = {"ok": True, "result": answers[message["do"]]}
                            connection.sendall(control.encode(result))

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("liar")
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        for words, failed in (("status", 0), ("stats", 0), ("fdb flush", 0), ("fdb show", 1)):
            result = run(*words.split(), "--control", "liar")
            assert result.returncode == failed, result.stderr
            shown = result.stdout + result.stderr
            assert all(c.isprintable() or c == "\n" for c in shown), words
            assert r"\x1b[2J" in shown
            assert not re.search(r"^vhostpy net: vu1: forged", shown, re.M)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
