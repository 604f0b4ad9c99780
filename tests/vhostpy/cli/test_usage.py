"""What is told to who calls the commands wrongly, or asks for help."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys

import pytest

from tests.vhostpy.cli.commands import Running, assert_told, run
from vhostpy.cli import VERBS, blk, load, options
from vhostpy.errors import ConfigError

GIB = 1 << 30

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
    "block size of no sectors": ("blk --socket s --ram 1G --block-size 700", "block size 700 is"),
    "size not in blocks": ("blk --socket s --ram 512 --block-size 4K", "round it, e.g. to 4096"),
    "direct RAM": ("blk --socket s --ram 1G --direct", "leave it out"),
    "raw RAM": ("blk --socket s --ram 1G --raw", "--raw is for --file"),
    "no requests": ("blk --socket s --ram 1G --iops 0", "0 is out of range"),
    "a rate of a switch": ("net --socket s --iops 5", "unknown flag --iops"),
    "long serial": (f"blk --socket s --ram 1G --serial {'1' * 21}", "at most 20 printable ASCII"),
    "no queues": ("net --socket s --queues 0", "a whole number from 1 to 128"),
    "too many queues": ("blk --socket s --ram 1G --queues 257", "a whole number from 1 to 256"),
    "an fd that is no number": ("net --fd abc", "'abc' is no number"),
    "queues that are no number": ("net --socket s --queues 1k", "'1k' is no number"),
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
    "no rate": ("load --type net s --rate 1Q", "a number a second, e.g. 2000"),
    "no time": ("load --type net s --seconds 0", "seconds or with a unit"),
    "odd queue": ("load --type net s --queue-size 100", "a power of two from 2 to 32768"),
    "two processors": ("load --type net s --cpu 0,0", "a processor is named twice"),
    "bad log level": ("net --socket s --log-level loud", "invalid choice: 'loud'"),
}


@pytest.mark.parametrize("name", BAD_USAGE)
def test_a_bad_command_line_is_told_what_to_do(place, name):
    words, text = BAD_USAGE[name]
    assert_told(run(*shlex.split(words)), 2, text)
    assert os.listdir(place) == []


FAILURES = {
    "no such file": ("blk --socket s --file none.img", "none.img: no such file"),
    "unreadable image": ("blk --socket s --file folder", "folder: "),
    "no such server": ("blk --socket s --uri nbd://127.0.0.1:1/", "refused", "start the server"),
    "no such scheme": ("blk --socket s --uri ftp://host/", "no kind of", "nbd://localhost"),
    "a path for a URI": ("blk --socket s --uri disk.img", "no URI", "a file: --file"),
    "empty image": ("blk --socket s --file empty.img", "0 bytes", "truncate -s"),
    "qcow2 image": ("blk --socket s --file qcow2", "a qcow2 image", "qemu-nbd -t -f qcow2"),
    "socket in use": ("net --socket used", "used is in use by a running process"),
    "file in the way": ("net --socket empty.img", "empty.img exists and is not a socket"),
    "no such directory": ("net --socket none/s", "cannot listen on none/s", "create none first"),
    "closed fd": ("net --fd 77", "--fd 77 is not an open socket"),
    "fd of a file": ("net --fd 0", "--fd 0 is not an open socket"),
    "control socket in use": ("net --socket s --control used", "another process serves"),
    "directory for control": ("net --socket s --control .", "a directory is in the", "name a file"),
    "control in no directory": ("net --socket s --control none/c", "cannot make the control"),
    "no process": ("fdb show", "no vhostpy process runs"),
    "no process of that name": ("stats vu9", "no process, port or disk is called 'vu9'"),
    "load on nothing": ("load no-such", "No such file", "start the back-end first"),
    "load on a dead socket": ("load dead", "Connection refused", "start the back-end again"),
    "dead control socket": ("status --control dead", "dead: cannot reach", "Connection refused"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_cannot_be_done_is_told_with_what_to_do(place, name):
    words, *texts = FAILURES[name]
    (place / "folder").mkdir()
    (place / "empty.img").touch()
    (place / "qcow2").write_bytes(b"QFI\xfb\0\0\0\3")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind("dead")
        dead.listen()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as used:
        used.bind("used")
        used.listen()
        assert_told(run(*shlex.split(words)), 1, *texts)
    # Whatever had been made before the failure is gone again.
    left = {path.name for path in place.iterdir() if path.name != "vhostpy"}
    assert left == {"folder", "empty.img", "qcow2", "used", "dead"}
    if (place / "vhostpy").exists():
        assert os.listdir(place / "vhostpy") == []


@pytest.mark.parametrize(
    ("uri", "text"),
    [("ftp://host/", "no kind of disk"), ("rbd:pool/image", "without librbd"),
     ("nbds://host/", "without libnbd")],
)  # fmt: skip
def test_the_scheme_is_looked_at_before_a_library_is_missed(monkeypatch, uri, text):
    for module in ("nbd", "rbd"):
        monkeypatch.setitem(sys.modules, f"vhostpy.backends.storage.{module}", None)
    with pytest.raises(ConfigError, match=text):
        blk._open_uri(uri, False, 512)


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


def test_help_and_version_are_found_where_they_are_looked_for(place):
    assert run("help", "net").stdout == run("net", "--help").stdout
    assert run("help").stdout == run("--help").stdout
    version = run("--version").stdout.split()[1]
    assert run("net", "--version").stdout == f"vhostpy net {version}\n"
    assert_told(run("help", "nett"), 2, "no verb 'nett'", "did you mean 'vhostpy net'?")


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


def test_tables_in_a_narrow_terminal_keep_words_whole(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with Running("net", "--socket", "vu0", "--socket", "vu1"):
        for words, texts in (
            (["status"], ["a front-end to connect", "connected"]),
            (["status", "vu0"], ["front-end", "rings started"]),
            (["stats"], ["from_guest_packets", "packets a poll", "polls with work"]),
        ):
            shown = run(*words).stdout
            assert max(map(len, shown.splitlines())) <= 60
            for text in texts:
                assert text in shown, (text, shown)


# Values --------------------------------------------------------------------------------


def test_suffixes_are_understood_wherever_they_mean_something():
    assert options.requests_per_s("5K") == 5000
    assert options.rate_per_s("1.5m") == 1_500_000
    assert options.seconds("500ms") == 0.5 == options.seconds("0.5")
    assert options.microseconds("1ms") == 1000 == options.microseconds("1000")
    assert load._sizes("64,9K") == (64, 9216)


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
