"""`vhostpy blk` killed with -9 under writes, and started again: no request is lost."""

import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.backends.blk.device import WRITEBACK_OFFSET
from vhostpy.errors import Refused
from vhostpy.frontend.frontend import FrontEnd

SIZE = 8 << 20
BLOCK = 4096
QUEUE_SIZE = 64
FEATURES = 1 << Feature.VERSION_1 | 1 << Feature.INDIRECT_DESC | 1 << Feature.EVENT_IDX
WCE = 1 << Feature.BLK_FLUSH | 1 << Feature.BLK_CONFIG_WCE
LAYOUT_FEATURES = {"split": FEATURES, "packed": FEATURES | 1 << Feature.RING_PACKED}
PROTOCOL_FEATURES = sum(
    1 << bit
    for bit in (
        ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIG,
        ProtocolFeature.INFLIGHT_SHMFD,
    )
)  # fmt: skip
OUT, OK, UNTOUCHED = 1, 0, 0xEE
NOTE_BYTES = 8  # at the end of the memory that the front-end keeps


class BackEnd:
    """The process, and whoever starts it again."""

    def __init__(self, directory, *options):
        self.socket = str(directory / "vb0")
        self.control = str(directory / "control")
        self.options = [
            "--socket", self.socket, "--json", "--control", self.control, *options,
        ]  # fmt: skip
        self.start()

    def start(self, faults=None):
        """`faults`: a seed for those that its image is to have."""
        words = ["vhostpy", "blk"]
        if faults is not None:
            words = ["tests.backends.faulty_blk", str(faults)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words, *self.options],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        assert select.select([self.process.stdout], [], [], 30)[0]
        assert self.process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def status(self):
        """What it says of its disk."""
        answer = subprocess.run(
            [sys.executable, "-m", "vhostpy", "status", "--json", "--control", self.control],
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PROJECT)}, check=True,
        )  # fmt: skip
        return json.loads(answer.stdout)["sockets"][0]["device"]

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


PROJECT = Path(__file__).parents[2]


class Writer(FrontEnd):
    """A guest that knows what it has written and what is under way."""

    def begin(self, layout, features=0):
        self.negotiate(LAYOUT_FEATURES[layout] | features, PROTOCOL_FEATURES)
        self.get_inflight(QUEUES, QUEUE_SIZE)
        self.set_mem_table()
        self.set_inflight()
        self.waiting = {}  # (queue, id): (block, status address, data)
        for index in range(QUEUES):
            self.start_queue(index, QUEUE_SIZE)
        self.buffers = [self.allocate(2 * BLOCK) for _ in range(QUEUES * QUEUE_SIZE)]

    def write(self, index, block, data):
        """One block; False where the ring is full or the block is being written."""
        if any(block == busy for busy, _, _ in self.waiting.values()):
            return False
        if not self.buffers:
            return False
        buffer = self.buffers.pop()
        self.memory.write(buffer, struct.pack("<IIQ", OUT, 0, block * BLOCK // 512))
        status = buffer + 16
        self.memory.write(status, bytes([UNTOUCHED]))
        self.memory.write(buffer + BLOCK, data)
        ring = self.queues[index].ring
        try:
            id_ = ring.add([(buffer, 16), (buffer + BLOCK, BLOCK)], [(status, 1)])
        except BufferError:
            self.buffers.append(buffer)
            return False
        self.waiting[index, id_] = (block, buffer, data)
        ring.kick()
        return True

    def collect(self, disk):
        """Answers; each has to be OK and of a request that waits."""
        for index, queue in self.queues.items():
            for id_, _ in queue.ring.used():
                block, buffer, data = self.waiting.pop((index, id_))
                assert self.memory.read(buffer + 16, 1) == bytes([OK])
                disk[block] = data
                self.buffers.append(buffer)


QUEUES = 2


@pytest.mark.parametrize(
    ("layout", "options", "kills"),
    [
        ("split", [], 8),
        ("packed", ["--direct"], 8),
        *(
            pytest.param(layout, options, 100, marks=pytest.mark.long)
            for layout in LAYOUT_FEATURES
            for options in ([], ["--direct"])
        ),
    ],
    ids=lambda value: ("direct" if value else "buffered") if isinstance(value, list) else None,
)
def test_no_write_is_lost_whenever_the_kill_comes(tmp_path, layout, options, kills):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    random_ = random.Random(kills)
    disk = {}
    with (
        BackEnd(tmp_path, "--file", str(image), *options) as back_end,
        Writer(back_end.socket, timeout_s=30) as guest,
    ):
        guest.begin(layout)
        for number in range(kills):
            end = time.monotonic() + random_.uniform(0.0, 0.15)
            while time.monotonic() < end:
                block = random_.randrange(SIZE // BLOCK)
                guest.write(random_.randrange(QUEUES), block, random_.randbytes(BLOCK))
                if random_.random() < 0.2:
                    guest.collect(disk)
            back_end.kill()
            back_end.start()
            guest.connect_again(back_end.socket)
            if number % 3 == 0:  # else what was lost twice shows
                deadline = time.monotonic() + 30
                while guest.waiting:
                    assert time.monotonic() < deadline, f"lost: {guest.waiting.keys()}"
                    guest.collect(disk)
        deadline = time.monotonic() + 30
        while guest.waiting:
            assert time.monotonic() < deadline, f"lost: {guest.waiting.keys()}"
            guest.collect(disk)
    contents = image.read_bytes()
    assert len(disk) > kills
    for block, data in disk.items():
        assert contents[block * BLOCK : (block + 1) * BLOCK] == data, block


@pytest.mark.parametrize("layout", LAYOUT_FEATURES)
def test_what_a_kill_has_torn_is_whole_again(tmp_path, layout):
    """A disk that does some writes in part and is late with all, killed again and again."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    random_ = random.Random(layout)
    disk, torn = {}, 0
    with (
        BackEnd(tmp_path, "--file", str(image)) as back_end,
        Writer(back_end.socket, timeout_s=30) as guest,
    ):
        guest.begin(layout)
        for faults in [*range(6), None]:
            back_end.kill()
            back_end.start(faults)
            guest.connect_again(back_end.socket)
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                block = random_.randrange(SIZE // BLOCK)
                guest.write(random_.randrange(QUEUES), block, random_.randbytes(BLOCK))
                guest.collect(disk)
            contents = image.read_bytes()
            for block, _, data in guest.waiting.values():
                there = contents[block * BLOCK : (block + 1) * BLOCK]
                torn += there[:512] == data[:512] and there != data
        deadline = time.monotonic() + 30
        while guest.waiting:
            assert time.monotonic() < deadline, f"lost: {guest.waiting.keys()}"
            guest.collect(disk)
    contents = image.read_bytes()
    for block, data in disk.items():
        assert contents[block * BLOCK : (block + 1) * BLOCK] == data, block
    assert torn > 10, "or nothing was shown"


def test_a_guests_choice_of_write_through_outlives_kills(tmp_path):
    """No front-end makes it again: what was written would be answered before it is safe."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    with (
        BackEnd(tmp_path, "--file", str(image)) as back_end,
        Writer(back_end.socket, timeout_s=30) as guest,
    ):
        guest.begin("split", WCE)
        for write_back in (b"\0", b"\1", b"\0"):
            guest.set_config(WRITEBACK_OFFSET, write_back)
            for _ in range(2):
                back_end.kill()
                back_end.start()
                guest.connect_again(back_end.socket)
                assert guest.get_config(WRITEBACK_OFFSET, 1) == write_back
                assert back_end.status()["write_cache"] == (write_back == b"\1")
        note_at = guest.inflight[0].mmap_size - NOTE_BYTES
        os.pwrite(guest.inflight[1].fileno(), b"\x63", note_at)
        with pytest.raises(Refused):
            guest.connect_again(back_end.socket)
        assert guest.hung_up()
        os.pwrite(guest.inflight[1].fileno(), b"\x01", note_at)
        guest.connect_again(back_end.socket)
        assert guest.get_config(WRITEBACK_OFFSET, 1) == b"\1"
