"""Processes that serve, and what is shown and changed of them while they run."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.vhostpy.cli.commands import (
    DEADLINE_S,
    Running,
    assert_told,
    get_features,
    run,
    status_of,
)
from vhostpy._spec import ProtocolFeature
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.protocol.codec import (
    REQUESTS_TO_FRONT_END,
    BackEndRequest,
    Decoder,
    FrontEndRequest,
    encode,
)
from vhostpy.protocol.payloads import MemoryRegion, MemoryTable


def test_status_says_where_each_handshake_stands(place):
    with Running("net", "--socket", "vu0", "--socket", "vu1"):
        first, second = status_of("vu0")["sockets"]
        assert (first["socket"], first["connected"]) == ("vu0", False)
        assert (second["socket"], second["connected"]) == ("vu1", False)
        assert first["waits_for"] == "a front-end to connect"
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


def test_status_says_what_of_each_sockets_share_is_used(place):
    with Running("net", "--socket", "vu0", "--socket", "vu1"), FrontEnd("vu0") as guest:
        guest.set_mem_table()
        guest.get_features()
        first, second = (socket["account"] for socket in status_of("vu0")["sockets"])
        assert (first["mappings"], first["mapped_bytes"]) == (1, 32 << 20)
        assert (second["mappings"], second["mapped_bytes"]) == (0, 0)
        assert first["mapped_bytes_share"] == second["mapped_bytes_share"] == 32 << 40
        assert first["fds_share"] > 24 and first["mappings_share"] > 509
        assert "0.0 of 32768 GiB" in run("status", "vu0").stdout


@pytest.mark.parametrize("flags", [(), ("--allow-file-memory",)])
def test_memory_in_a_file_on_a_disk_is_taken_where_it_is_allowed(place, flags):
    with (
        tempfile.TemporaryFile(dir="/var/tmp") as file,
        Running("blk", "--socket", "vb0", "--null", "1G", *flags) as running,
        FrontEnd("vb0") as guest,
    ):
        file.truncate(1 << 20)
        region = MemoryRegion(0, 1 << 20, 0, 0)
        table = encode(FrontEndRequest.SET_MEM_TABLE, MemoryTable((region,)))
        guest.send_raw(table, [file.fileno()])
        if flags:
            guest.get_features()
        else:
            assert guest.hung_up()
    assert ("start vhostpy with --allow-file-memory" in running.stderr) == (not flags)


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


def test_what_is_for_switches_or_disks_finds_them(place):
    with Running("blk", "--socket", "vb0", "--ram", "1M"):
        assert_told(run("fdb", "show"), 1, "vb0 is a disk, and 'fdb' is for switches")
        assert_told(run("fdb", "show", "vb0"), 1, "vb0 is a disk, and 'fdb' is for switches")
        with Running("net", "--socket", "vu0", "--socket", "vu1"):
            assert run("fdb", "show").returncode == 0
            assert "8M" in run("limit", "--bandwidth", "8M").stdout
            assert "1M, as before" in run("resize").stdout
            assert_told(run("limit", "vu1"), 1, "vu0 is a switch, and 'limit' is for disks")
            with Running("net", "--socket", "vu2"):
                assert_told(run("fdb", "show"), 1, "2 switches run", "name one: vu0, vu2")
                flushed = json.loads(run("fdb", "flush", "--port", "vu1", "--json").stdout)
                assert flushed == {"flushed": 0}
                stats = json.loads(run("stats", "vu1", "--json").stdout)
                assert [port["port"] for port in stats["ports"]] == ["vu0", "vu1"]
                assert status_of("vu1")["name"] == "vu0"
                assert_told(run("stats", "vu7"), 1, "is called 'vu7'", "vb0, vu0, vu2")


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
        assert status_of("vu0")["sockets"][0]["waits_for"] == "a front-end to listen"
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


def test_two_signals_at_once_end_it_as_cleanly_as_one(place):
    # timeout(1) sends its signal to the process, and then to the group in which that is.
    with Running("net", "--socket", "vu0") as running:
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            running.process.send_signal(number)
        running.process.wait(DEADLINE_S)
    assert os.listdir(place) == ["vhostpy"] and os.listdir("vhostpy") == []


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
        "import os, signal, sys; from vhostpy import cli; from vhostpy.site import site;"
        "site.App._advise = lambda self: self.stop();"
        "assert cli.main(sys.argv[1:]) == 0; print(*sys.modules)"
    )
    for words in ("net --socket vu0", "blk --socket vb0 --ram 1M"):
        loaded = subprocess.run(
            [sys.executable, "-c", code, *words.split()], capture_output=True, text=True
        )
        assert loaded.returncode == 0, loaded.stderr
        modules = set(loaded.stdout.split())
        assert "vhostpy.server.listen" in modules
        assert not {"rich", "pyroute2", "scapy", "importlib.metadata"} & modules


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
        assert_told(run("limit", "--port", "vb7"), 1, "no disk 'vb7'", "one of: vb0")


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
