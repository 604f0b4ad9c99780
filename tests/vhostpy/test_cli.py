"""The commands as an operator meets them: real processes, their output and exit status."""

import contextlib
import json
import os
import re
import resource
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from vhostpy._spec import ProtocolFeature
from vhostpy.cli import VERBS, options
from vhostpy.frontend import FrontEnd
from vhostpy.protocol import REQUESTS_TO_FRONT_END, BackEndRequest, Decoder, FrontEndRequest

DEADLINE_S = 20
GIB = 1 << 30


@pytest.fixture
def place(monkeypatch):
    """A short directory of our own, current and for control sockets, as the machine's are not."""
    with tempfile.TemporaryDirectory(prefix="vp") as directory:
        monkeypatch.setenv("VHOSTPY_RUNTIME_DIR", f"{directory}/vhostpy")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        monkeypatch.chdir(directory)
        yield Path(directory)


def command(*words):
    return [sys.executable, "-m", "vhostpy", *map(str, words)]


def run(*words, pass_fds=()):
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=DEADLINE_S, pass_fds=pass_fds
    )


class Running:
    """A process that serves; ended by SIGTERM, which it has to obey at once and cleanly."""

    def __init__(self, *words, pass_fds=()):
        self.process = subprocess.Popen(
            command(*words, "--json"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=pass_fds,
        )  # fmt: skip
        self.stderr = ""

    def __enter__(self):
        try:
            ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
            line = self.process.stdout.readline() if ready else ""
            assert line, self._end()
            self.listening = json.loads(line)
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *_):
        self._end()
        assert self.process.returncode == 0, self.stderr
        assert "Traceback" not in self.stderr

    def _end(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            output, self.stderr = self.process.communicate(timeout=DEADLINE_S)
        finally:
            self.process.kill()
        assert output == ""
        return self.stderr


# Bad invocations -----------------------------------------------------------------------

LONG = "/tmp/" + "x" * 103

BAD_USAGE = {
    "no verb": ("", "usage: vhostpy"),
    "unknown verb": ("nett", "did you mean 'vhostpy net'?"),
    "no socket": ("net", "e.g. vhostpy net --socket /tmp/vu0"),
    "no contents": ("blk --socket s", "--file/--blk-file --uri --ram --null is required"),
    "misspelt flag": ("net --sockt s", "did you mean --socket?"),
    "shortened flag": ("net --sock s", "did you mean --socket?"),
    "flag of the other verb": ("net --socket s --ram 1G", "unknown flag --ram"),
    "flag without a value": ("net --socket", "expected one argument"),
    "stray word": ("net --socket s other", "unrecognized arguments: other"),
    "socket path too long": (f"net --socket {LONG}", "108 bytes, and a Unix socket takes at most"),
    "control path too long": (f"net --socket s --control {LONG}", "choose a shorter directory"),
    "empty socket path": ("net --socket=", "the path is empty"),
    "same socket twice": ("net --socket s --socket ./s", "each port needs a socket of its own"),
    "two sockets for a disk": ("blk --socket a --socket b --ram 1G", "--socket is given twice"),
    "socket and fd": ("net --socket s --fd 3", "not allowed with argument"),
    "same fd twice": ("net --fd 3 --fd 3", "--fd 3 is given twice"),
    "client of an fd": ("net --fd 3 --client", "--client needs --socket"),
    "mode for a client": ("net --socket s --client --mode 0660", "a socket file that we make"),
    "unknown group": ("net --socket s --group no-such", "there is no group 'no-such'"),
    "bad mode": ("net --socket s --mode rw", "three octal digits, e.g. 0660"),
    "bad size": ("blk --socket s --ram 1Q", "'1Q' is not a size"),
    "no size": ("blk --socket s --ram 0", "size 0 is out of range"),
    "huge size": ("blk --socket s --null 9999999P", "is out of range"),
    "half a sector": ("blk --socket s --ram 1000", "round it, e.g. to 1024"),
    "two contents": ("blk --socket s --ram 1G --null 1G", "not allowed with argument"),
    "odd block size": ("blk --socket s --ram 1G --block-size 3K", "one of 512, 1K, 2K, 4K"),
    "size not in blocks": ("blk --socket s --ram 512 --block-size 4K", "round it, e.g. to 4096"),
    "direct RAM": ("blk --socket s --ram 1G --direct", "--direct is for --file"),
    "no requests": ("blk --socket s --ram 1G --iops 0", "'0' is out of range"),
    "a rate of a switch": ("net --socket s --iops 5", "unknown flag --iops"),
    "long serial": (f"blk --socket s --ram 1G --serial {'1' * 21}", "at most 20 printable ASCII"),
    "no queues": ("net --socket s --queues 0", "a whole number from 1 to 128"),
    "too many queues": ("blk --socket s --ram 1G --queues 257", "a whole number from 1 to 256"),
    "bad processors": ("net --socket s --cpus 0,x", "is not a list of processors"),
    "backward processors": ("net --socket s --cpus 1-0", "write 0-1"),
    "processor that is not ours": ("net --socket s --cpus 9999", "choose from"),
    "more workers than processors": ("net --socket s --cpus 0 --workers 2", "name a processor"),
    "bad poll": ("net --socket s --poll lazy", "invalid choice: 'lazy'"),
    "bad mtu": ("net --socket s --mtu 67", "a whole number from 68 to 65535"),
    "too many addresses": ("net --socket s --fdb-limit 65537", "a whole number from 1 to 65536"),
    "bad wait": ("net --socket s --full-wait soon", "'soon' is not a time"),
    "unknown action": ("fdb drop", "invalid choice: 'drop'"),
    "load without a socket": ("load", "e.g. vhostpy load /tmp/vu0 /tmp/vu1"),
    "load on one socket twice": ("load --type net s s", "each serves one front-end"),
    "load on two disks": ("load --type blk s t", "start a load for each"),
    "packets for a disk": ("load --type blk s --size 64", "--size is for packets"),
    "a depth for packets": ("load --type net s --depth 4", "--depth is for disks"),
    "latency untouched": ("load --type net s --unkind 0 --latency", "--unkind 1 or more"),
    "more senders than sockets": ("load --type net s --senders 2", "2 senders of 1 sockets"),
    "tiny frames": ("load --type net s --size 64,59", "60 to 65557 bytes"),
    "a mix that is none": ("load --type net s --size simix", "or imix"),
    "no rate": ("load --type net s --rate 0", "packets a second, e.g. 500K"),
    "no time": ("load --type net s --seconds 0", "seconds, e.g. 2 or 0.5"),
    "odd queue": ("load --type net s --queue-size 100", "a power of two from 2 to 32768"),
    "two processors": ("load --type net s --cpu 0,0", "a processor is named twice"),
    "bad log level": ("net --socket s --log-level loud", "invalid choice: 'loud'"),
}


@pytest.mark.parametrize("name", BAD_USAGE)
def test_a_bad_command_line_is_told_what_to_do(place, name):
    words, text = BAD_USAGE[name]
    assert_told(run(*shlex.split(words)), 2, text)
    assert os.listdir(place) == []


def assert_told(result, status, *texts):
    """One error of one line, one next step, no traceback, nothing on standard output."""
    assert (result.returncode, result.stdout) == (status, ""), result.stderr
    for text in texts:
        assert text in result.stderr
    if "usage: vhostpy" not in texts[0]:
        assert re.fullmatch(r"vhostpy[^\n]*: error: [^\n]+\n  next: [^\n]+\n", result.stderr)


FAILURES = {
    "no such file": ("blk --socket s --file none.img", "none.img: no such file"),
    "unreadable image": ("blk --socket s --file folder", "folder: "),
    "no such server": ("blk --socket s --uri nbd://127.0.0.1:1/", "refused", "start the server"),
    "no such scheme": ("blk --socket s --uri ftp://host/", "no kind of", "nbd://localhost"),
    "empty image": ("blk --socket s --file empty.img", "0 bytes", "truncate -s"),
    "socket in use": ("net --socket used", "used is in use by a running process"),
    "file in the way": ("net --socket empty.img", "empty.img exists and is not a socket"),
    "no such directory": ("net --socket none/s", "cannot listen on none/s", "create none first"),
    "closed fd": ("net --fd 77", "--fd 77 is not an open socket"),
    "fd of a file": ("net --fd 0", "--fd 0 is not an open socket"),
    "control socket in use": ("net --socket s --control used", "another process serves"),
    "control in no directory": ("net --socket s --control none/c", "cannot make the control"),
    "no process": ("fdb show", "no vhostpy process runs"),
    "no process of that name": ("stats vu9", "no vhostpy process is called 'vu9'"),
    "load on nothing": ("load no-such", "No such file", "start the back-end first"),
    "load on a dead socket": ("load dead", "Connection refused", "start the back-end again"),
    "dead control socket": ("status --control dead", "dead: cannot reach", "Connection refused"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_cannot_be_done_is_told_with_what_to_do(place, name):
    words, *texts = FAILURES[name]
    (place / "folder").mkdir()
    (place / "empty.img").touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind("dead")
        dead.listen()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as used:
        used.bind("used")
        used.listen()
        assert_told(run(*shlex.split(words)), 1, *texts)
    # Whatever had been made before the failure is gone again.
    left = {path.name for path in place.iterdir() if path.name != "vhostpy"}
    assert left == {"folder", "empty.img", "used", "dead"}
    if (place / "vhostpy").exists():
        assert os.listdir(place / "vhostpy") == []


# Help and conventions ------------------------------------------------------------------


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_ends_in_an_example_whose_flags_exist(place, verb):
    result = run(*([verb] if verb else []), "--help")
    assert (result.returncode, result.stderr) == (0, "")
    example = result.stdout.split("\nexample: ")[-1]
    assert example != result.stdout
    lines = [shlex.split(line) for line in example.splitlines() if line.startswith("  vhostpy ")]
    assert lines, "no command in the example"
    for _, *words in lines:
        # Parsed to the end, as what comes after is found first: but not carried out.
        wrong = run(*words, "--no-such-flag")
        assert "unknown flag --no-such-flag" in wrong.stderr


@pytest.mark.parametrize("verb", ["net", "blk"])
def test_the_example_in_the_help_runs(place, verb):
    line = re.search(rf"^  vhostpy ({verb} .*)$", run(verb, "--help").stdout, re.MULTILINE)
    words = shlex.split(line[1].replace("/tmp/", f"{place}/"))
    with Running(*words) as running:
        assert running.listening["sockets"] == [w for w in words if w.startswith(str(place))]


@pytest.mark.parametrize(
    ("verb", "capabilities"),
    [
        ("net", {"type": "net", "features": []}),
        ("blk", {"type": "block", "features": ["read-only", "blk-file"]}),
    ],
)
def test_capabilities_are_printed_whatever_else_is_given(place, verb, capabilities):
    for more in ([], ["--socket", LONG], ["--no-such-flag"]):
        result = run(verb, *more, "--print-capabilities")
        assert (result.returncode, result.stderr) == (0, "")
        assert json.loads(result.stdout) == capabilities


@pytest.mark.parametrize("program", ["net", "blk"])
def test_the_program_of_one_type_names_itself(place, program):
    code = f"import sys; from vhostpy.cli import main_{program} as m; sys.exit(m(['--bad']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"vhostpy-{program}: error: unknown flag --bad\n")


# Values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("4K", 4096), ("4k", 4096), ("1GiB", GIB), ("1G", GIB), ("2T", 2048 * GIB)],
)
def test_sizes_are_binary(text, size):
    assert options.size_bytes(text) == size
    assert options.size_bytes(options.format_size(size)) == size


def test_processors_are_listed_in_the_order_given(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert options.cpu_list("6,0-2") == [6, 0, 1, 2]
    assert options.format_cpus([6, 0, 1, 2]) == "0-2,6"


def test_devices_get_short_names_that_differ():
    assert options.device_names(["/a/vu0.sock", "/a/vu1"], [5]) == ["vu0", "vu1", "fd5"]
    assert options.device_names(["/a/n.sock", "/b/n"], []) == ["/a/n.sock", "/b/n"]


# What runs -----------------------------------------------------------------------------


def get_features():
    """The first message of a front-end (vhost-user, "VHOST_USER_GET_FEATURES")."""
    return struct.pack("<III", 1, 1, 0)


def status_of(name):
    return json.loads(run("status", name, "--json").stdout)


def test_status_says_where_each_handshake_stands(place):
    with Running("net", "--socket", "vu0", "--socket", "vu1"):
        first, second = status_of("vu0")["sockets"]
        assert (first["socket"], first["connected"]) == ("vu0", False)
        assert (second["socket"], second["connected"]) == ("vu1", False)
        assert first["waits_for"] == "for a front-end to connect"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as front_end:
            front_end.connect("vu0")
            front_end.sendall(get_features())
            assert len(front_end.recv(20)) == 20
            connected, other = status_of("vu0")["sockets"]
            assert connected["connected"] and not other["connected"]
            assert connected["handshake"] != first["handshake"]
            assert "SET_FEATURES" in connected["waits_for"]
            shown = run("status", "vu0").stdout
            for text in (connected["handshake"], other["handshake"], "SET_FEATURES"):
                assert text in shown


def test_status_without_a_name_lists_all_that_run(place):
    assert json.loads(run("status", "--json").stdout) == {"processes": []}
    assert "no vhostpy process runs" in run("status").stdout
    with (
        Running("net", "--socket", "vu0") as net,
        Running("blk", "--socket", "vb0", "--null", "1G", "--control", "own.sock") as blk,
    ):
        listed = json.loads(run("status", "--json").stdout)["processes"]
        assert [(p["name"], p["kind"], p["pid"], p["sockets"]) for p in listed] == [
            ("vb0", "blk", blk.listening["pid"], 1),
            ("vu0", "net", net.listening["pid"], 1),
        ]
        table = run("status").stdout
        assert "vb0" in table and "vu0" in table
        by_path = json.loads(run("status", "--control", "own.sock", "--json").stdout)
        assert by_path["pid"] == blk.listening["pid"]
        # Two run, so which one has to be said.
        assert_told(run("stats"), 1, "2 processes run", "name one: vb0, vu0")
    # Before anybody looks: a look removes what dead processes left.
    assert (os.listdir(place), os.listdir("vhostpy")) == (["vhostpy"], [])
    assert json.loads(run("status", "--json").stdout) == {"processes": []}


def test_a_killed_process_is_not_listed_and_its_sockets_are_taken_over(place):
    words = ("net", "--socket", "vu0")
    with contextlib.suppress(AssertionError), Running(*words) as killed:
        killed.process.kill()
        killed.process.wait()
    assert (place / "vu0").exists() and (place / "vhostpy/vu0.sock").exists()
    assert json.loads(run("status", "--json").stdout) == {"processes": []}
    assert not (place / "vhostpy/vu0.sock").exists()
    with Running(*words) as running:
        assert status_of("vu0")["pid"] == running.listening["pid"]


def test_a_second_process_on_the_same_socket_is_refused_and_harms_nobody(place):
    with Running("net", "--socket", "vu0") as running:
        assert_told(run("net", "--socket", "vu0"), 1, "vu0 is in use by a running process")
        assert status_of("vu0")["pid"] == running.listening["pid"]


def test_counters_are_shown_per_port(place):
    with Running("net", "--socket", "vu0", "--socket", "vu1", "--workers", "2"):
        stats = json.loads(run("stats", "--json").stdout)
        assert [port["port"] for port in stats["ports"]] == ["vu0", "vu1"]
        assert [(w["index"], w["items"], w["busy_ticks"]) for w in stats["workers"]] == [
            (0, 0, 0), (1, 0, 0)
        ]  # fmt: skip
        (port,) = json.loads(run("stats", "--json", "--port", "vu1").stdout)["ports"]
        assert port["port"] == "vu1"
        shown = run("stats").stdout
        assert "vu0" in shown and "vu1" in shown
        assert "packets a poll" in shown and "cycles each" in shown
        assert_told(run("stats", "--port", "vu7"), 1, "no port 'vu7'", "one of: vu0, vu1")


def test_the_forwarding_table_is_shown_and_flushed(place):
    with Running("net", "--socket", "vu0", "--socket", "vu1"):
        assert json.loads(run("fdb", "show", "--json").stdout) == {"entries": []}
        assert "the table is empty" in run("fdb", "show").stdout
        assert json.loads(run("fdb", "flush", "--json", "--port", "vu0").stdout) == {"flushed": 0}
        assert_told(run("fdb", "flush", "--port", "vu7"), 1, "no port 'vu7'")


def test_a_disk_has_no_forwarding_table(place):
    with Running("blk", "--socket", "vb0", "--ram", "1M"):
        verbs = "one of: status, stats, workers, limit, resize"
        assert_told(run("fdb", "show"), 1, "cannot do 'fdb'", verbs)


def test_the_second_port_is_explained_once_where_there_is_one(place):
    with Running("net", "--socket", "vu0") as alone:
        pass
    assert alone.stderr.count("vhostpy net --socket vu0 --socket vu1") == 1
    with Running("net", "--socket", "vu0", "--socket", "vu1") as pair:
        pass
    assert "nobody to talk to" not in pair.stderr


def test_an_inherited_listening_socket_is_served(place):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("vu0")
        listener.listen()
        fd = listener.fileno()
        with Running("net", "--fd", fd, pass_fds=[fd]) as running:
            assert running.listening["sockets"] == [f"fd {fd}"]
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as front_end:
                front_end.connect("vu0")
                front_end.sendall(get_features())
                assert len(front_end.recv(20)) == 20


def test_a_client_finds_its_front_end_whenever_it_comes(place):
    with Running("net", "--socket", "vu0", "--client"):
        assert status_of("vu0")["sockets"][0]["waits_for"] == "for a front-end to listen"
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind("vu0")
                listener.listen()
                listener.settimeout(DEADLINE_S)
                front_end, _ = listener.accept()
                with front_end:
                    front_end.sendall(get_features())
                    assert len(front_end.recv(20)) == 20
            os.unlink("vu0")


def test_mode_and_group_are_the_sockets_own(place):
    with Running("net", "--socket", "vu0", "--mode", "0660", "--control", "c.sock"):
        assert os.stat("vu0").st_mode & 0o777 == 0o660
        assert os.stat("c.sock").st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_cleanly_with_a_front_end_connected(place, number):
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as front_end,
        Running("net", "--socket", "vu0") as running,
    ):
        front_end.connect("vu0")
        front_end.sendall(get_features()[:5])
        running.process.send_signal(number)
        running.process.wait(DEADLINE_S)
    assert sorted(os.listdir(place)) == ["vhostpy"]
    assert os.listdir("vhostpy") == []


def test_the_fd_limit_is_raised(place):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        running = Running("net", "--socket", "vu0")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with running:
        limits = Path(f"/proc/{running.process.pid}/limits").read_text()
        assert re.search(rf"Max open files +{hard} +{hard} ", limits)


def test_the_tables_libraries_are_not_loaded_to_serve(place):
    # The whole way to listening, and down again at once.
    code = (
        "import os, signal, sys; from vhostpy import app, cli;"
        "app.App._advise = lambda self: self.stop();"
        "assert cli.main(sys.argv[1:]) == 0; print(*sys.modules)"
    )
    for words in ("net --socket vu0", "blk --socket vb0 --ram 1M"):
        loaded = subprocess.run(
            [sys.executable, "-c", code, *words.split()], capture_output=True, text=True
        )
        assert loaded.returncode == 0, loaded.stderr
        modules = set(loaded.stdout.split())
        assert "vhostpy.server" in modules
        assert not {"rich", "pyroute2", "scapy", "importlib.metadata"} & modules


# Load --------------------------------------------------------------------------------------


def test_packets_are_sent_between_two_ports(place):
    words = "load vu0 vu1 --seconds 0.3 --warmup 0.1 --size imix --macs 5 --verify"
    with Running("net", "--socket", "vu0", "--socket", "vu1"):
        result = run(*words.split(), "--json")
        table = run(*words.split())
    assert (result.returncode, table.returncode) == (0, 0), result.stderr + table.stderr
    figures = json.loads(result.stdout)
    assert figures["received_packets"] > 100 and figures["verified"]
    assert figures["sent_packets"] == figures["received_packets"] + figures["lost_packets"]
    assert [port["socket"] for port in figures["ports"]] == ["vu0", "vu1"]
    assert "every byte that arrived, in order" in table.stdout and "Mpps" in table.stdout
    assert table.stderr == ""  # no terminal, no progress


def test_a_disk_is_read_and_written(place):
    words = "load vb0 --seconds 0.3 --warmup 0.1 --pattern mix --verify"
    with Running("blk", "--socket", "vb0", "--ram", "8M"):
        result = run(*words.split(), "--json")
        table = run(*words.split())
    assert (result.returncode, table.returncode) == (0, 0), result.stderr + table.stderr
    figures = json.loads(result.stdout)
    assert figures["reads"] > 10 and figures["writes"] > 10 and figures["verified"]
    assert "every block that was written" in table.stdout and "kIOPS" in table.stdout


def test_a_limited_disk_does_what_it_may_and_says_how_long_it_took(place):
    words = ["load", "vb0", "--seconds", "1", "--warmup", "0.3", "--json", "--depth", "16"]
    flags = ["--iops", "2000", "--bandwidth", "100M"]
    with Running("blk", "--socket", "vb0", "--ram", "8M", *flags):
        figures = json.loads(run(*words).stdout)
        assert abs(figures["kiops"] / 2 - 1) < 0.05
        limits = json.loads(run("limit", "vb0", "--iops", "none", "--bandwidth", "8M",
                                "--json").stdout)  # fmt: skip
        assert limits == {"port": "vb0", "requests_per_s": None, "bytes_per_s": 8 << 20,
                          "burst_s": 0.1}  # fmt: skip
        figures = json.loads(run(*words).stdout)
        assert abs(figures["kiops"] / 2.048 - 1) < 0.05
        assert "8M" in run("limit").stdout
        (port,) = json.loads(run("stats", "--json").stdout)["ports"]
        read = port["latency"]["read"]
        assert read["count"] == sum(count for _, count in read["histogram_us"]) > 3000
        # What waits for its turn waits with the guest: it is not the disk that is slow.
        assert 0 < read["p50_us"] <= read["p99_9_us"] <= read["max_us"]
        assert "99.9 % us" in run("stats").stdout
        assert_told(run("limit", "--port", "vb7"), 1, "no port 'vb7'", "one of: vb0")


def test_a_disk_grows_with_its_image_and_never_shrinks(place):
    image = place / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Running("blk", "--socket", "vb0", "--file", image), FrontEnd("vb0") as guest:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            guest.set_protocol_features(1 << ProtocolFeature.CONFIG | 1 << ProtocolFeature.MQ
                                        | 1 << ProtocolFeature.BACKEND_REQ)  # fmt: skip
            guest.request(FrontEndRequest.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
            ours.settimeout(DEADLINE_S)
            assert "1M, as before" in run("resize").stdout
            os.truncate(image, (2 << 20) + 100)
            assert "1M -> 2M; the guest has been told" in run("resize").stdout
            (message,) = Decoder(REQUESTS_TO_FRONT_END).feed(ours.recv(100))
            assert message.request == BackEndRequest.CONFIG_CHANGE_MSG and not message.need_reply
            assert guest.get_config(0, 8) == (4096).to_bytes(8, "little")
            os.truncate(image, 1 << 20)
            assert_told(run("resize"), 1, "the guest knows of 2097152", "disks only grow")
            os.truncate(image, 3 << 20)
            ours.close()
            result = json.loads(run("resize", "--json").stdout)
            assert (result["size_bytes"], result["guest_told"]) == (3 << 20, False)
        assert guest.get_config(0, 8) == (6144).to_bytes(8, "little")


def test_a_load_whose_requests_fail_says_so(place):
    image = place / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Running("blk", "--socket", "vb0", "--file", image):
        with image.open("r+b") as file:
            file.truncate(4096)
        result = run(*["load", "vb0", "--seconds", "0.2", "--warmup", "0.1", "--json"])
    assert result.returncode == 1
    assert json.loads(result.stdout)["failed_requests"] > 0


@pytest.mark.parametrize(
    ("level", "touched"),
    [
        (0, ("none", "fifo", "clean")), (1, ("header", "fifo", "clean")),
        (2, ("header", "lifo", "dirty")), (3, ("frame", "lifo", "dirty")),
    ],
)  # fmt: skip
def test_levels_of_unkindness(place, level, touched):
    words = f"load vu0 vu1 --seconds 0.1 --warmup 0.1 --unkind {level} --json"
    with Running("net", "--socket", "vu0", "--socket", "vu1"):
        figures = json.loads(run(*words.split()).stdout)
    assert (figures["touch"], figures["ids"], figures["rx_headers"]) == touched


def test_a_hung_process_does_not_hide_the_others(place):
    with Running("net", "--socket", "vu0"), Running("net", "--socket", "vu1") as hung:
        hung.process.send_signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            first, second = json.loads(run("status", "--json").stdout)["processes"]
            assert first["name"] == "vu0" and first["sockets"] == 1
            assert second["name"] == "vu1" and "does not answer" in second["error"]
            assert time.monotonic() - started < DEADLINE_S
        finally:
            hung.process.send_signal(signal.SIGCONT)
