"""What is the same for packets and requests: sockets, figures, nothing left open."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.talk import open_fds
from tests.vhostpy.load.short import request, send
from vhostpy._spec import ProtocolFeature
from vhostpy.errors import ConfigError
from vhostpy.load import blk, net, report
from vhostpy.load.net_loop import binned, mac
from vhostpy.load.target import kind_of


def test_the_type_is_found_out(disk, switch):
    sockets, _ = switch
    assert kind_of(disk) == "blk"
    assert kind_of(sockets[0]) == "net"


def settled_fds():
    """How many are open once the servers have noticed that their front-ends are gone."""
    counts = [len(open_fds())]
    while len(counts) < 30 or len(set(counts[-20:])) > 1:
        time.sleep(0.02)
        counts.append(len(open_fds()))
    return counts[-1]


def test_nothing_is_left_open(disk, switch):
    sockets, _ = switch
    send(sockets[:2], seconds=0.05)
    request(disk, seconds=0.05)
    before = settled_fds()
    send(sockets[:2], seconds=0.05)
    request(disk, seconds=0.05)
    assert settled_fds() == before


def test_sockets_that_lead_nowhere_are_told(tmp_path):
    with pytest.raises(ConfigError, match="No such file") as caught:
        kind_of(str(tmp_path / "none"))
    assert "start the back-end" in caught.value.hint


@given(st.integers(0, 2**64 - 1))
def test_the_histogram_is_within_three_percent(value):
    assert abs(binned(value) - value) <= value / 32


def test_spreads_are_read_off_the_histogram():
    spread = report.spread([(100, 50), (200, 49), (1000, 1)], 10.0)
    assert spread == {
        "count": 100, "min": 10.0, "p50": 10.0, "p90": 20.0, "p99": 20.0, "p99_9": 100.0,
        "p99_99": 100.0, "max": 100.0, "mean": pytest.approx(15.8),
    }  # fmt: skip
    assert report.spread([], 10.0)["p50"] is None


def test_addresses_of_all_ports_and_flows_differ():
    seen = {mac(port, flow) for port in (0, 1, 255, 256) for flow in (0, 1, 255, 256, 65535)}
    assert len(seen) == 20
    assert all(address[0] == 0x02 and len(address) == 6 for address in seen)


def test_unused_protocol_bits_are_not_asked_for():
    # CONFIGURE_MEM_SLOTS or LOG_SHMFD would change how memory is shared.
    asked = net.PROTOCOL_FEATURES | blk.PROTOCOL_FEATURES
    assert asked == sum(1 << bit for bit in (
        ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIG,
    ))  # fmt: skip
