"""`vhostpy load`: what it sends, finds and shows."""

import json
import socket
import subprocess

import pytest

from tests.vhostpy.cli.commands import DEADLINE_S, Running, assert_told, command, run
from vhostpy.frontend.frontend import FrontEnd


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


def test_a_load_whose_requests_fail_says_so(place):
    image = place / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Running("blk", "--socket", "vb0", "--file", image):
        with image.open("r+b") as file:
            file.truncate(4096)
        result = run(*["load", "vb0", "--seconds", "0.2", "--warmup", "0.1", "--json"])
    assert result.returncode == 1
    assert json.loads(result.stdout)["failed_requests"] > 0


def test_a_busy_socket_is_said_to_be_busy(place):
    with Running("blk", "--socket", "vb0", "--ram", "8M"), FrontEnd("vb0") as other:
        assert other.get_features()
        told = "vb0: another front-end is connected"
        assert_told(run("load", "vb0"), 1, told, "end the other one")
        assert_told(run("load", "vb0", "--type", "blk"), 1, told, "end the other one")
        assert other.get_features()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("other")
        listener.listen()
        listener.settimeout(DEADLINE_S)
        with subprocess.Popen(command("load", "other"), stderr=subprocess.PIPE, text=True) as load:
            connection, _ = listener.accept()
            connection.close()
            assert "next: see what the back-end says itself" in load.stderr.read()


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
