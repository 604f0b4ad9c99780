"""Rings whose front-end tells a base that the ring contradicts."""

import logging

import pytest

from tests.rings import AVAIL, Rings
from tests.serving import serving
from tests.talk import open_fds
from vhostpy._resume import reconcile
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.backends.disk import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.frontend import FrontEnd
from vhostpy.server import Server

SIZE = 64


def started_at(rings, base):
    """The device, held, in another life that begins at `base`."""
    device = rings.start(base)
    device.set_live(False)
    return device


@pytest.mark.parametrize("used", [10, 300, 58656, 65530])
@pytest.mark.parametrize("base", ["first", "behind", "beyond"])
def test_split_ring_that_may_lose_goes_on_where_its_driver_waits(used, base):
    """DPDK's virtio-user in server mode says base 0, whatever the ring has seen."""
    with Rings("split", size=SIZE, used=used) as rings:
        offers = [rings.add([bytes([i])], []) for i in range(5)]
        rings.driver.kick()
        said = {"first": 0, "behind": used - 1, "beyond": (used + 6) % 65536}[base]
        device = started_at(rings, said)
        verdict = reconcile(device, lossy=True)
        assert f"base {said} contradicts the ring, whose used index is {used}" in verdict.text
        device.set_live(True)
        taken = device.take()
        assert [device.read(chain) for chain in taken] == [offer.data for offer in offers]
        device.give([(chain, 0) for chain in taken])
        assert len(rings.driver.used()) == 5


@pytest.mark.parametrize("lossy", [False, True], ids=["disk", "net"])
@pytest.mark.parametrize("ahead", range(6))
def test_split_base_within_what_is_offered_is_believed(lossy, ahead):
    """What lies before it is another back-end's, which still works on it."""
    with Rings("split", size=SIZE, used=65533) as rings:
        offers = [rings.add([bytes([i])], []) for i in range(5)]
        rings.driver.kick()
        device = started_at(rings, (65533 + ahead) % 65536)
        assert reconcile(device, lossy=lossy).text == ""
        device.set_live(True)
        assert [device.read(chain) for chain in device.take()] == [o.data for o in offers[ahead:]]


def test_split_base_is_all_there_is_where_the_ring_makes_no_sense():
    with Rings("split", size=SIZE, used=300) as rings:
        rings.guest.put_u16(AVAIL + 2, 300 + SIZE + 1)
        device = started_at(rings, 7)
        assert reconcile(device, lossy=True).text == ""
        assert device.base == 7


def test_disk_whose_base_is_contradicted_is_broken_by_name(workers, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vhostpy")
    before = open_fds()
    server = Server(Disk("disk", RamStorage(1 << 20), workers, queues=2), path=f"{tmp_path}/s")
    protocol = 1 << ProtocolFeature.CONFIG | 1 << ProtocolFeature.REPLY_ACK
    with serving(server), FrontEnd(server.path) as guest:
        guest.negotiate(1 << Feature.VERSION_1, protocol)
        guest.set_mem_table()
        queue = guest.start_queue(0, SIZE, base=300)
        guest.stop_queue(0)
        guest.announce(queue, base=0)
        status = server.status()
        assert status["handshake"] == "broken: rings 0"
        assert "ring 0: base 0 contradicts the ring, whose used index is 300" in status["waits_for"]
        assert status["rings"][0]["state"] == "broken"
        assert queue.wait_err()
        assert (
            sum(
                "contradicts" in r.getMessage() and "INFLIGHT" in r.getMessage()
                for r in caplog.records
            )
            == 1
        )
        guest.stop_queue(0)
        guest.announce(queue, base=300)
        assert server.status()["handshake"] == "ready: rings 0 run"
    assert open_fds() == before
