"""Who gets to talk to a device, and what a front-end that comes or goes does to others."""

import gc
import os
import resource
import socket
import subprocess
import sys

import pytest

from tests.hostile.attacker import Attacker
from tests.hostile.victim import eventually
from tests.serving import serving
from tests.talk import open_fds
from vhostpy import errors
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import encode
from vhostpy.protocol.payloads import U64
from vhostpy.server import connection, listen
from vhostpy.server.listen import Server
from vhostpy.session.handlers import SERVED, Served
from vhostpy.session.steps import Expect, Reply


@pytest.fixture
def disk(workers):
    return Disk("disk", RamStorage(1 << 20), workers, queues=4)


def answers(guest: FrontEnd) -> bool:
    """Whether the back-end at the other end serves."""
    return guest.request(R.GET_QUEUE_NUM).value == 4


def refuses(one: Server, text: str) -> None:
    """It does not start, and says why."""
    with pytest.raises(errors.ConfigError, match=text), serving(one):
        pass


def test_a_second_front_end_is_hung_up_on_and_the_first_goes_on(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(listen, "HANDOVER_S", 0.05)
    path = str(tmp_path / "s")
    with serving(Server(disk, path=path)), FrontEnd(path) as first:
        assert answers(first)
        with FrontEnd(path) as second:
            assert second.hung_up()
        assert answers(first)


def test_the_next_front_end_is_served_as_soon_as_the_last_has_gone(disk, tmp_path):
    path = str(tmp_path / "s")
    one = Server(disk, path=path)
    with serving(one):
        for _ in range(20):
            with FrontEnd(path) as guest:
                assert answers(guest)
        assert one.sessions == 20


def test_a_front_end_is_hung_up_on_only_when_its_rings_are_at_rest(disk, tmp_path, monkeypatch):
    hung_up = []
    path = str(tmp_path / "s")
    with serving(Server(disk, path=path)), FrontEnd(path) as guest:
        monkeypatch.setattr(disk, "closed", lambda: hung_up.append(guest.hung_up(0.05)))
        guest.send_raw(b"\xff" * 12)
        assert guest.hung_up()
    assert hung_up == [False]


def test_a_client_comes_back_to_a_front_end_that_was_started_anew(disk, tmp_path):
    path = str(tmp_path / "s")
    with serving(Server(disk, path=path, client=True)):
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen()
                listener.settimeout(10)
                connection, _ = listener.accept()
                with FrontEnd(connection) as guest:
                    assert answers(guest)
            os.unlink(path)


def test_a_connected_fd_is_served(disk):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with serving(Server(disk, fd=theirs.detach())), FrontEnd(ours) as guest:
        assert answers(guest)


def test_an_fd_that_is_no_unix_stream_socket_is_refused(disk):
    read, write = os.pipe()
    internet = socket.socket(socket.AF_INET)
    for fd, text in (
        (read, "not a socket"),
        (internet.fileno(), "not a Unix stream socket"),
        (999, "Bad file descriptor"),
    ):
        refuses(Server(disk, fd=os.dup(fd) if fd < 999 else fd), text)
    os.close(read)
    os.close(write)
    internet.close()


def test_what_is_not_a_dead_socket_is_left_alone(disk, workers, tmp_path):
    path = tmp_path / "s"
    path.write_text("precious")
    refuses(Server(disk, path=str(path)), "not a socket")
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    other = Disk("other", RamStorage(1 << 20), workers, queues=4)
    with serving(Server(disk, path=str(path))), FrontEnd(str(path)) as guest:
        refuses(Server(other, path=str(path)), "in use")
        assert answers(guest)
    assert not path.exists()


def test_who_finds_a_socket_in_use_leaves_no_trace_there(disk, workers, tmp_path, caplog):
    path = str(tmp_path / "s")
    other = Disk("other", RamStorage(1 << 20), workers, queues=4)
    with caplog.at_level("DEBUG", "vhostpy"), serving(one := Server(disk, path=path)):
        refuses(Server(other, path=path), "in use")
        with FrontEnd(path) as guest:  # who came before has been accepted before
            assert answers(guest) and one.sessions == 1
            caplog.clear()
            refuses(Server(other, path=path), "in use")
            assert answers(guest)
        with FrontEnd(path) as guest:
            assert answers(guest) and one.sessions == 2
    assert "refused" not in caplog.text


def test_a_front_end_that_takes_no_answers_stops_only_itself(disk, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "SEND_TIMEOUT_S", 0.2)
    other = Disk("other", RamStorage(1 << 20), workers, queues=4)
    paths = [str(tmp_path / name) for name in ("deaf", "innocent")]
    deaf_server = Server(disk, path=paths[0])
    with serving(deaf_server, Server(other, path=paths[1])):
        with FrontEnd(paths[0]) as deaf, FrontEnd(paths[1]) as innocent:
            question = encode(R.GET_QUEUE_NUM)
            deaf.sock.settimeout(5)
            with pytest.raises(OSError):
                while True:  # until our own socket is full, and then closed by the other end
                    deaf.sock.sendall(question * 1000)
            assert answers(innocent)
        with FrontEnd(paths[0]) as next_one:
            assert answers(next_one)


def test_a_shortage_of_fds_ends_neither_the_listener_nor_the_session(
    disk, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(listen, "SHORTAGE_S", 0)
    path = str(tmp_path / "s")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(Server(disk, path=path)), FrontEnd(path) as first:
        assert answers(first)
        late = socket.socket(socket.AF_UNIX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            late.connect(path)
            eventually(lambda: "cannot accept" in caplog.text)
            for _ in range(10):  # meanwhile it tries again and again, and says no more
                assert answers(first)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        first.close()
        with FrontEnd(late) as second:
            assert answers(second)
        assert caplog.text.count("cannot accept") == 1


def test_a_defect_of_ours_costs_one_session_and_not_the_port(disk, tmp_path, monkeypatch, caplog):
    def defect(offset: int, data: bytes) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(disk, "write_config", defect)
    path = str(tmp_path / "s")
    one = Server(disk, path=path)
    with serving(one):
        gc.collect()  # what earlier tests left would go at any time
        before = open_fds()
        with Attacker(path) as guest:
            assert guest.request() == 0
            virtqueue = one.connection.plane.virtqueues[0]
            with pytest.raises(ConnectionError):
                guest.end.set_config(32, b"\0")
            eventually(lambda: one.connection is None)
        assert not virtqueue.live
        eventually(lambda: open_fds() == before)
        assert "RuntimeError: a defect" in caplog.text
        with Attacker(path) as guest:
            assert guest.request() == 0


@pytest.mark.parametrize("comes", ["acknowledgement", "another message", "another form", "end"])
def test_a_handler_hears_the_message_that_must_come_next(
    disk, tmp_path, monkeypatch, caplog, comes
):
    """As of postcopy, whose SET_MEM_TABLE is answered, and acknowledged by its like."""
    heard = []

    def handler(session, message):
        yield Reply.pack(message.request, U64(5))
        heard.append((yield Expect(R.SET_MEM_TABLE, U64)))

    monkeypatch.setitem(SERVED, R.GET_QUEUE_NUM, Served(handler))
    path = str(tmp_path / "s")
    with serving(one := Server(disk, path=path)), FrontEnd(path) as guest:
        assert guest.request(R.GET_QUEUE_NUM) == U64(5)
        if comes == "acknowledgement":
            guest.send_raw(encode(R.SET_MEM_TABLE, U64(7)))
            assert guest.get_features()
            assert heard == [U64(7)]
            return
        if comes != "end":
            table = R.SET_MEM_TABLE, bytes(40)
            guest.send_raw(encode(*(table if comes == "another form" else (R.SET_OWNER, b""))))
            assert guest.hung_up()
        guest.close()
        eventually(lambda: one.connection is None)
        assert heard == []
        said = {
            "another message": "SET_OWNER came, expected SET_MEM_TABLE",
            "another form": "SET_MEM_TABLE: payload of 40 bytes, expected 8",
            "end": "the front-end went, expected SET_MEM_TABLE",
        }
        assert said[comes] in caplog.text


def test_status_names_the_program_that_has_connected(disk, tmp_path):
    """By its own name for itself, less what a terminal would mind."""
    words = (
        "import socket, sys; open('/proc/self/comm', 'w').write('\x1b[31movs\x9b-x')\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()"
    )
    one = Server(disk, path=str(tmp_path / "s"))
    command = [sys.executable, "-c", words, one.path]
    with serving(one), subprocess.Popen(command, stdin=subprocess.PIPE) as peer:
        eventually(lambda: one.status()["connected"], "the connection")
        assert one.status()["front_end"] == "31movs-x"
        peer.communicate()


@pytest.mark.parametrize(
    ("times", "said"),
    [(1, "disk: works again"), (4, "disk: works again; the errors before came 3 more times")],
)
def test_what_works_again_says_how_many_errors_were_left_out_if_any_were(times, said, caplog):
    caplog.set_level("INFO", "vhostpy")
    failures = listen.Failures("disk")
    for _ in range(times):
        failures.add("%s: session ended: %s", "no memory")
    failures.over()
    assert caplog.messages == ["disk: session ended: no memory", said]
