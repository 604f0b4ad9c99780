"""What the generators load: a switch and a disk."""

import gc

import pytest

from tests.serving import serving
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.net.device import NetDevice
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.server.listen import Server
from vhostpy.vswitch.switch import Switch

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def leaves_no_garbage():
    """Servers and their loops are cycles; what they hold must not fall to other tests."""
    yield
    gc.collect()


@pytest.fixture
def switch(workers, tmp_path):
    """Sockets of three ports of a switch, and the switch."""
    switch = Switch(workers)
    servers = [
        Server(NetDevice(f"p{i}", switch, pairs=2), path=str(tmp_path / f"p{i}")) for i in range(3)
    ]
    with serving(*servers):
        yield tuple(server.path for server in servers), switch


@pytest.fixture
def disk(workers, tmp_path):
    with serving(
        server := Server(
            Disk("vb0", RamStorage(4 * MIB), workers, queues=4), path=str(tmp_path / "vb0")
        )
    ):
        yield server.path
