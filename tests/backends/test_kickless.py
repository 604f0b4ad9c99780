"""Front-ends that give no kick fd: they are served, and their worker sleeps in between."""

import struct
from contextlib import ExitStack

import pytest

from tests.backends.netguest import MODERN, frame
from tests.hostile.innocent import EVERYTHING, Station
from tests.hostile.victim import eventually
from tests.serving import serving
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.net.device import NetDevice
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.runtime.pool import Workers
from vhostpy.server.listen import Server
from vhostpy.vswitch.switch import Switch


@pytest.fixture(params=["adaptive", "interrupt"])
def workers(request):
    workers = Workers(poll=request.param)
    workers.start()
    yield workers
    workers.stop()


def sleeps(workers):
    """It does, three times."""
    before = workers.loads()[0]["sleeps"]
    eventually(lambda: workers.loads()[0]["sleeps"] >= before + 3, "the worker's sleep")


def test_a_disk(workers, tmp_path):
    disk = Disk("vb0", RamStorage(1 << 20), workers)
    with serving(server := Server(disk, path=str(tmp_path / "vb0"))), FrontEnd(server.path) as end:
        end.negotiate(MODERN, EVERYTHING)
        end.set_mem_table()
        queue = end.start_queue(0, 16, poll=True)
        header, data, status = (end.allocate(4096) for _ in range(3))
        for sector in range(20):
            sleeps(workers)
            end.memory.write(header, struct.pack("<IIQ", 1, 0, sector))
            end.memory.write(status, b"\xee")
            queue.ring.add([(header, 16), (data, 512)], [(status, 1)])
            queue.ring.kick()
            queue.wait_used()
            assert end.memory.read(status, 1) == b"\0"


def test_ports(workers, tmp_path):
    switch = Switch(workers)
    servers = [Server(NetDevice(f"p{i}", switch), path=str(tmp_path / f"p{i}")) for i in range(2)]
    with serving(*servers), ExitStack() as stack:
        sender, receiver = [Station(each.path, i, poll=True) for i, each in enumerate(servers, 2)]
        for station in (sender, receiver):
            stack.enter_context(station.guest)
        for tag in range(20):
            sleeps(workers)
            sent = frame(receiver.mac, sender.mac, 60, tag)
            sender.send([sent])
            assert eventually(receiver.receive) == [sent]
            sender, receiver = receiver, sender
