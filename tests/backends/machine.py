"""A guest's disk with all that serves it, for tests; and the storages they go through."""

import asyncio
from contextlib import contextmanager

import pytest

from tests.backends.guest import FEATURES, Guest
from tests.gate import GateStorage
from vhostpy._spec import Feature
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.backends.storage.uring import UringStorage
from vhostpy.runtime.pool import Workers

SIZE = 1 << 20
SECTORS = SIZE // 512


def image(path, size=SIZE):
    with open(path, "wb") as file:
        file.truncate(size)
    return str(path)


class Machine:
    """A guest, its disk, and the part of the data plane that starts and stops rings."""

    def __init__(self, storage, *, poll="adaptive", workers=1, guest=None, **options):
        self.guest = guest or Guest()
        self.storage = storage
        self.workers = Workers(workers, poll=poll)
        self.disk = Disk("vb0", storage, self.workers, **options)
        self.rings = {}

    def __enter__(self):
        self.workers.start()
        self.disk.opened()
        self.negotiate()
        for index in range(len(self.guest.drivers)):
            self.start(index)
        return self

    def __exit__(self, *_):
        for index in list(self.rings):
            self.stop(index, deadline_s=10)
        self.disk.closed()
        self.workers.stop()
        self.storage.close()
        self.guest.close()

    def negotiate(self, without=()):
        features = self.disk.features() & ~sum(1 << bit for bit in without)
        with self.held():
            self.disk.negotiated(features)

    @contextmanager
    def held(self):
        for virtqueue in self.rings.values():
            virtqueue.set_live(False)
        self.workers.wait()
        yield
        for virtqueue in self.rings.values():
            virtqueue.set_live(True)
        self.workers.nudge()

    def start(self, index=0, kick=True, **options):
        virtqueue = self.guest.virtqueue(index, **options)
        self.disk.ring_started(index, virtqueue, self.guest.kicks[index] if kick else -1)
        self.rings[index] = virtqueue
        self.disk.ring_enabled(index, True)
        virtqueue.set_live(True)
        self.workers.nudge()

    def stop(self, index=0, deadline_s=5.0):
        drained = asyncio.run(self.disk.ring_drain(index, deadline_s))
        virtqueue = self.rings.pop(index)
        virtqueue.set_live(False)
        self.workers.wait()
        self.disk.ring_stopped(index)
        return drained, virtqueue.base

    def counters(self, index=0):
        return self.disk.status()["queues"][index]


def opened_gate(tmp_path):
    storage = GateStorage(SIZE)
    storage.open()
    return storage


def small_gate(tmp_path):
    storage = GateStorage(SIZE, capacity=3)
    storage.open()
    return storage


STORAGES = {
    "ram": lambda tmp_path: RamStorage(SIZE),
    "file": lambda tmp_path: FileStorage(image(tmp_path / "disk.img")),
    "uring": lambda tmp_path: UringStorage(image(tmp_path / "disk.img")),
    "uring, O_DIRECT": lambda tmp_path: UringStorage(image(tmp_path / "disk.img"), direct=True),
    "gate": opened_gate,
    "gate that takes 3": small_gate,
}

each_layout = pytest.mark.parametrize(
    "features", [FEATURES, FEATURES | 1 << Feature.RING_PACKED], ids=["split", "packed"]
)
