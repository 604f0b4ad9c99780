"""Our storages on real block devices that discard, write zeroes and erase.

Here are none that erase, but the kernel of a guest has one where we serve its disk.
"""

import errno
from pathlib import Path

import pytest

from tests.faulty import FaultyStorage
from tests.peers.uml import run_in_uml
from tests.serving import serving
from vhostpy.backends.blk.clear import MAX_CLEAR_SEGMENTS
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.null import NullStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.backends.storage.storage import Op
from vhostpy.runtime.pool import Workers
from vhostpy.server.listen import Server

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120)]

SIZE = 384 << 20  # more than one request clears
COMMAND = ".venv/bin/python -m pytest -q --color=no -p no:cacheprovider tests/peers/on_device.py"


def test_block_devices_are_cleared_and_erased(directory: Path) -> None:
    failing = FaultyStorage(RamStorage(1 << 20))
    for op in (Op.DISCARD, Op.WRITE_ZEROES, Op.SECURE_ERASE):
        failing.fail(op, errno.EIO)
    workers = Workers(1)
    disks = [
        Disk(name, storage, workers)
        for name, storage in (
            ("vda", RamStorage(SIZE)),
            ("vdb", failing),
            ("vdc", NullStorage(SIZE)),
            ("vdd", RamStorage(1 << 20, block_size=4096)),
        )
    ]
    servers = [Server(disk, path=str(directory / disk.name)) for disk in disks]
    workers.start()
    try:
        with serving(*servers):
            done = run_in_uml(COMMAND, directory, [directory / disk.name for disk in disks], 60)
    finally:
        workers.stop()
    assert done.returncode == 0, done.stdout
    good, bad, unable, _ = (disk.status()["queues"][0] for disk in disks)
    # By each of two storages: three ranges, the largest one, as many as there may be. Then the
    # one that the kernel had to cut in two.
    assert good["secure_erases"] == 2 * (3 + 1 + MAX_CLEAR_SEGMENTS) + 2
    assert good["discards"] > 0 and good["write_zeroes"] > 0 and good["bad_requests"] == 0
    assert bad["io_errors"] > 0
    assert unable["secure_erases"] == unable["unsupported"] == 0
