"""The control socket: the codec alone, then over real sockets beside hostile clients."""

import asyncio
import contextlib
import itertools
import os
import pwd
import socket
import stat
import tempfile
import threading
import time
from pathlib import Path

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vhostpy.errors import ConfigError
from vhostpy.site import control
from vhostpy.site.control import LENGTH, ControlError, Decoder, Request, answer, encode

DEADLINE_S = 20

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
messages = st.recursive(
    plain | st.binary(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=8),
    max_leaves=16,
)


def framed(body):
    return LENGTH.pack(len(body)) + body


def pieces(data, cuts):
    """`data` cut at each of `cuts`, taken modulo its length."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def refuse(arguments):
    raise ConfigError("no port 7", "one of: 1")


HANDLERS = {
    "echo": dict,
    "status": lambda arguments: {"pid": os.getpid()},
    "refuse": refuse,
    "break": lambda arguments: 1 / 0,
    "unsendable": lambda arguments: object(),
    "big": lambda arguments: ["x" * 100] * 100_000,
}


# Without a socket ----------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.text(), messages, max_size=4), max_size=4), st.data())
def test_messages_arrive_whole_and_in_order_however_the_bytes_are_cut(sent, data):
    stream = b"".join(map(encode, sent))
    cuts = data.draw(st.lists(st.integers(0, max(len(stream), 1)), max_size=20))
    decoder = Decoder(limit=1 << 20, items=1000)
    got = [message for piece in pieces(stream, cuts) for message in decoder.feed(piece)]
    # Compared as bytes: NaN equals nothing.
    assert list(map(encode, got)) == list(map(encode, sent))
    assert not decoder.half


def test_file_names_that_are_not_utf8_cross_unchanged():
    name = os.fsdecode(b"/tmp/\xff\xfe")
    assert list(Decoder().feed(encode({"port": name}))) == [{"port": name}]


def test_a_message_is_half_until_its_last_byte():
    data = encode({"do": "status"})
    decoder = Decoder()
    for byte in data[:-1]:
        assert list(decoder.feed(bytes([byte]))) == []
        assert decoder.half
    assert list(decoder.feed(data[-1:])) == [{"do": "status"}]
    assert not decoder.half


@given(st.lists(st.binary(max_size=300), max_size=10))
@example([LENGTH.pack(0xFFFFFFFF)])
@example([framed(b"")])
@example([framed(b"\xdf\xff\xff\xff\xff")])  # a map of 4 G entries
@example([framed(b"\xdd\xff\xff\xff\xff")])  # an array of as many
@example([framed(b"\x91" * 60_000)])  # nested 60,000 times
@example([framed(b"\xd6\xff\xff\xff\xff\xff")])  # a timestamp
@example([framed(b"\xc7\x05\x01hello")])  # an extension type
@example([framed(b"\x81\xc0\xc0")])  # a key that is not text
@example([framed(b"\x82\xa1a\x01\xa1a\x02")])  # a key twice
@example([framed(b"\xc1")])  # never used by msgpack
@example([framed(msgpack.packb({}) + b"\xc0")])  # a tail
def test_bytes_that_make_no_sense_end_in_a_control_error_and_hold_no_memory(chunks):
    decoder = Decoder(limit=4096 if max(map(len, chunks), default=0) < 4096 else 1 << 20)
    with contextlib.suppress(ControlError):
        for chunk in chunks:
            for message in decoder.feed(chunk):
                with contextlib.suppress(ControlError):
                    Decoder().feed(answer(message, HANDLERS))
            assert len(decoder._pending) <= decoder._limit + LENGTH.size


@pytest.mark.parametrize(
    "body",
    [b"\xdf\xff\xff\xff\xff", b"\xdd" + LENGTH.pack(50_000) + b"\xc0" * 50_000, b"\x91" * 60_000],
    ids=["map header", "long array", "deep"],
)
def test_a_message_that_would_unpack_into_more_than_it_weighs_is_refused(body):
    with pytest.raises(ControlError, match="not a message"):
        list(Decoder().feed(framed(body)))


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_come():
    with pytest.raises(ControlError, match="65537 bytes, at most 65536"):
        list(Decoder().feed(LENGTH.pack(control.REQUEST_MAX + 1)))


@given(messages)
@example({"do": "echo", "id": True})
@example({"do": "echo", "id": 2**64 - 1})
@example({"do": "echo", "id": -(2**63), "\udcff": "\udcff"})
@example({"do": "\udcff" * 200})
@example({"do": ["echo"]})
@example({"id": 1})
def test_every_message_gets_an_answer_or_a_control_error(message):
    try:
        data = answer(message, HANDLERS)
    except ControlError as error:
        assert error.args[0]
        return
    (got,) = Decoder(1 << 20, 1000).feed(data)
    assert got["id"] == message.get("id", 0)
    assert got["ok"] == (message["do"] in ("echo", "status", "big"))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ([], "a request is a map, not list"),
        ({"do": None}, "'do' names what to do, it is not missing"),
        ({"id": "1", "do": "x"}, "'id' is a whole number, not str"),
        ({b"do": "status", "do": "x"}, "names of arguments are text"),
    ],
)
def test_what_is_no_request_is_told_why(message, text):
    with pytest.raises(ControlError, match=text):
        Request.of(message)


@pytest.mark.parametrize(
    ("verb", "error", "hint"),
    [
        ("refuse", "no port 7", "one of: 1"),
        ("nosuch", "cannot do 'nosuch'", "one of: echo, status, refuse, break, unsendable, big"),
        ("break", "internal error: ZeroDivisionError('division by zero')", "see the log"),
    ],
)
def test_a_failed_request_is_answered_with_what_to_do(verb, error, hint):
    (got,) = Decoder().feed(answer({"id": 5, "do": verb}, HANDLERS))
    assert got == {"id": 5, "ok": False, "error": error, "hint": hint}


# Over a socket -------------------------------------------------------------------------


class Serving:
    """A ControlServer on a loop and thread of its own."""

    def __init__(self, path, handlers=HANDLERS):
        self.server = control.ControlServer(path, handlers)
        self.path = self.server.path
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    def __enter__(self):
        self._thread.start()
        self.do(self.server.start())
        return self

    def __exit__(self, *_):
        self.do(self.server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    def connect(self):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(DEADLINE_S)
        client.connect(os.fspath(self.path))
        return client

    def clients(self):
        return len(self.server._clients)


def eventually(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def is_closed(client):
    """Reads to the end; True if the other side ended the connection."""
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.fixture
def serving(tmp_path):
    fds = len(os.listdir("/proc/self/fd"))
    with Serving(tmp_path / "c.sock") as running:
        yield running
        # Whatever the test did: an innocent client is served.
        with control.Client(running.path) as client:
            assert client.ask("status") == {"pid": os.getpid()}
    assert not running.path.exists()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_client_gets_its_answers_in_order(serving):
    with control.Client(serving.path) as client:
        assert client.ask("echo", port="vu0") == {"port": "vu0"}
        with pytest.raises(ControlError) as caught:
            client.ask("refuse")
        assert (caught.value.args[0], caught.value.hint) == ("no port 7", "one of: 1")
        assert len(client.ask("big")) == 100_000


def test_the_socket_is_private_whatever_the_umask(tmp_path):
    mask = os.umask(0)
    try:
        with Serving(tmp_path / "c.sock") as running:
            assert stat.S_IMODE(running.path.lstat().st_mode) == 0o600
        assert os.umask(0) == 0
    finally:
        os.umask(mask)


@pytest.mark.parametrize(
    "data",
    [
        os.urandom(4096),
        b"GET / HTTP/1.1\r\n\r\n",
        LENGTH.pack(0xFFFFFFFF),
        framed(b"\xdf\xff\xff\xff\xff"),
        encode({"do": 1}),
        encode({"id": 1, "do": "echo"}) * 3 + b"\xff" * 8,
    ],
    ids=["noise", "http", "long", "map", "no verb", "tail"],
)
def test_a_client_that_talks_nonsense_is_told_and_disconnected(serving, data):
    with serving.connect() as hostile:
        hostile.sendall(data)
        decoder, answers = Decoder(1 << 20, 100), []
        with contextlib.suppress(ConnectionResetError):
            while data := hostile.recv(65536):
                answers += decoder.feed(data)
        assert not answers or answers[-1]["ok"] is False
    eventually(lambda: serving.clients() == 0)


def test_half_a_request_is_waited_for_only_so_long(serving, monkeypatch):
    monkeypatch.setattr(control, "HALF_REQUEST_S", 0.1)
    with serving.connect() as hostile:
        hostile.sendall(encode({"do": "status"})[:-1])
        assert is_closed(hostile)


def test_dripping_bytes_does_not_extend_the_wait(serving, monkeypatch):
    monkeypatch.setattr(control, "HALF_REQUEST_S", 0.2)
    with serving.connect() as hostile, pytest.raises(OSError):
        deadline = time.monotonic() + DEADLINE_S
        hostile.sendall(LENGTH.pack(60_000))
        while time.monotonic() < deadline:
            hostile.sendall(b"x")
            time.sleep(0.01)


def test_a_client_that_never_reads_holds_one_answer_and_is_dropped(serving, monkeypatch):
    monkeypatch.setattr(control, "SEND_S", 0.3)
    asked = []
    monkeypatch.setitem(HANDLERS, "big", lambda a: asked.append(1) or ["x" * 100] * 100_000)
    with serving.connect() as hostile:
        hostile.settimeout(0.05)
        with contextlib.suppress(OSError):
            for _ in range(10_000):
                hostile.sendall(encode({"do": "big"}))
        eventually(lambda: serving.clients() == 0)
        assert len(asked) == 1


def test_one_client_too_many_is_told_so(serving):
    with contextlib.ExitStack() as stack:
        for _ in range(control.CLIENTS_MAX):
            stack.enter_context(serving.connect())
        eventually(lambda: serving.clients() == control.CLIENTS_MAX)
        with serving.connect() as extra:
            (got,) = Decoder().feed(extra.recv(65536))
            assert got["error"] == "32 clients are connected"
            assert is_closed(extra)
    eventually(lambda: serving.clients() == 0)


def test_closing_does_not_wait_for_clients(tmp_path):
    with Serving(tmp_path / "c.sock") as running:
        idle, busy = running.connect(), running.connect()
        busy.sendall(encode({"do": "big"}))
        eventually(lambda: running.clients() == 2)
    assert is_closed(idle)
    assert is_closed(busy)
    idle.close()
    busy.close()


# Files and names -----------------------------------------------------------------------


def leave_dead_socket(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(os.fspath(path))
        dead.listen()


def test_a_dead_socket_is_replaced(tmp_path):
    leave_dead_socket(tmp_path / "c.sock")
    with Serving(tmp_path / "c.sock") as running, control.Client(running.path) as client:
        assert client.ask("status") == {"pid": os.getpid()}


def test_a_live_socket_is_refused_and_left_alone(tmp_path):
    with Serving(tmp_path / "c.sock") as running:
        with pytest.raises(ConfigError, match="another process serves"):
            control.bind(tmp_path / "c.sock")
        with control.Client(running.path) as client:
            assert client.ask("status")


def test_a_file_in_the_way_is_refused_and_left_alone(tmp_path):
    (tmp_path / "c.sock").write_text("precious")
    with pytest.raises(ConfigError, match="a file is in the way"):
        control.bind(tmp_path / "c.sock")
    assert (tmp_path / "c.sock").read_text() == "precious"


def test_a_socket_that_replaced_ours_is_not_removed(tmp_path):
    with Serving(tmp_path / "c.sock"):
        (tmp_path / "c.sock").unlink()
        leave_dead_socket(tmp_path / "c.sock")
    assert (tmp_path / "c.sock").exists()


@pytest.fixture
def runtime(monkeypatch):
    """A runtime directory of our own; those of the machine are not looked at."""
    with tempfile.TemporaryDirectory() as parent:  # short, as it is part of socket addresses
        directory = Path(parent) / "vhostpy"
        monkeypatch.setattr(control, "directories", lambda: [directory])
        yield directory


def test_the_first_directory_that_can_be_used_is_made_and_private(runtime):
    assert control.default_path("vu0") == runtime / "vu0.sock"
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700


def test_a_name_becomes_a_file_name(runtime):
    assert control.default_path("/tmp/a b/../vu0").name == "tmp-a-b-..-vu0.sock"
    assert control.default_path("..").name == "vhostpy.sock"
    assert len(os.fsencode(control.default_path("x" * 300).name)) <= 64


def test_a_directory_with_too_long_a_path_is_passed_over(runtime, monkeypatch):
    monkeypatch.setattr(control, "directories", lambda: [runtime.parent / ("d" * 90), runtime])
    assert control.default_path("vu0") == runtime / "vu0.sock"


def test_a_name_that_is_taken_gets_the_process_number(runtime):
    with Serving(control.default_path("vu0")):
        assert control.default_path("vu0").name == f"vu0-{os.getpid()}.sock"


def test_running_lists_the_living_and_removes_the_dead(runtime, tmp_path):
    with Serving(control.default_path("vu0")), Serving(tmp_path / "elsewhere") as other:
        leave_dead_socket(runtime / "dead.sock")
        (runtime / "broken.sock").symlink_to(tmp_path / "gone")
        (runtime / "notes.sock").write_text("not a socket")
        link = control.advertise("vb0", other.path)
        assert control.running() == {"vu0": runtime / "vu0.sock", "vb0": link}
        left = sorted(path.name for path in runtime.iterdir())
        assert left == ["notes.sock", "vb0.sock", "vu0.sock"]


def test_root_is_told_of_other_users_processes(runtime, tmp_path, monkeypatch):
    user = os.getuid()
    theirs = tmp_path / f"vhostpy-{user}"
    theirs.mkdir()
    (tmp_path / "vhostpy-12345").mkdir()  # somebody else's name, not somebody else's directory
    monkeypatch.delenv("VHOSTPY_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(control, "OTHER_USERS", ((f"{tmp_path}/vhostpy-*", -1),))
    with (
        Serving(control.default_path("vu0")),
        Serving(theirs / "vu0.sock"),
        Serving(theirs / "vu1.sock"),
        Serving(tmp_path / "vhostpy-12345/vu2.sock"),
    ):
        leave_dead_socket(theirs / "dead.sock")
        (theirs / "link.sock").symlink_to("/nowhere")
        monkeypatch.setattr(os, "geteuid", lambda: 12346)
        assert "vu1" not in control.running()
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(control, "_check_owner", lambda directory: None)
        name = pwd.getpwuid(user).pw_name
        assert control.running() == {
            "vu0": runtime / "vu0.sock",
            f"vu0@{name}": theirs / "vu0.sock",
            "vu1": theirs / "vu1.sock",
        }
        assert (theirs / "dead.sock").exists()


def test_a_directory_that_somebody_else_owns_is_not_trusted(runtime, monkeypatch):
    with Serving(control.default_path("vu0")):
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        if os.getuid() == 0:
            os.chown(runtime, 12346, -1)
        assert control.running() == {}
        with pytest.raises(ConfigError, match="no directory"):
            control.default_path("vu1")


def test_a_link_in_place_of_the_directory_is_not_followed(runtime, tmp_path):
    (tmp_path / "real").mkdir()
    runtime.symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="no directory"):
        control.default_path("vu0")


# Our client ----------------------------------------------------------------------------


@contextlib.contextmanager
def stub(path, reply):
    """A process that answers every connection with `reply`, then keeps still."""
    kept = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    kept.append(connection)
                    connection.recv(65536)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)
    for connection in kept:
        connection.close()


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b"", "does not answer"),
        (LENGTH.pack(100) + b"half", "does not answer"),
        (LENGTH.pack(0xFFFFFFFF), "a message of 4294967295 bytes"),
        (framed(b"\xc1"), "not a message"),
        (framed(b"\x90"), "answers with list, not a map"),
        (framed(b"\x80"), "None"),
    ],
    ids=["silent", "half", "long", "noise", "list", "empty"],
)
def test_the_client_gets_an_error_from_a_process_that_answers_badly(tmp_path, reply, text):
    path = tmp_path / "c"
    with (
        stub(path, reply),
        control.Client(path, timeout_s=0.2) as client,
        pytest.raises(ControlError, match=text),
    ):
        client.ask("status")


def test_the_client_says_what_to_do_where_nobody_listens(tmp_path):
    leave_dead_socket(tmp_path / "dead")
    for path, reason in (("dead", "Connection refused"), ("none", "No such file or directory")):
        with pytest.raises(ControlError, match=reason) as caught:
            control.Client(tmp_path / path)
        assert "vhostpy status" in caught.value.hint
