"""`vhostpy blk` killed with -9 under writes, and started again: no request is lost."""

import contextlib
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
from vhostpy.frontend import FrontEnd, _connect
from vhostpy.payloads import Inflight
from vhostpy.protocol import REPLIES_TO_FRONT_END, Decoder, FrontEndRequest, encode

SIZE = 8 << 20
BLOCK = 4096
QUEUE_SIZE = 64
FEATURES = 1 << Feature.VERSION_1 | 1 << Feature.INDIRECT_DESC | 1 << Feature.EVENT_IDX
PROTOCOL_FEATURES = sum(
    1 << bit
    for bit in (
        ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIG,
        ProtocolFeature.INFLIGHT_SHMFD,
    )
)  # fmt: skip
OUT, OK, UNTOUCHED = 1, 0, 0xEE


class BackEnd:
    """The process, and whoever starts it again."""

    def __init__(self, directory, *options):
        self.socket = str(directory / "vb0")
        self.command = [
            sys.executable, "-m", "vhostpy", "blk", "--socket", self.socket, "--json",
            "--control", str(directory / "control"), *options,
        ]  # fmt: skip
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PROJECT)}
        )
        assert select.select([self.process.stdout], [], [], 30)[0]
        assert self.process.stdout.readline()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


PROJECT = Path(__file__).parents[2]


class Writer(FrontEnd):
    """A front-end that survives its back-end, as QEMU does."""

    def begin(self):
        self.negotiate(FEATURES, PROTOCOL_FEATURES)
        self.inflight = self.get_inflight(QUEUES, QUEUE_SIZE)
        self.set_mem_table()
        self.set_inflight()
        self.waiting = {}  # (queue, id): (block, status address, data)
        for index in range(QUEUES):
            self.start_queue(index, QUEUE_SIZE)
        self.buffers = [self.allocate(2 * BLOCK) for _ in range(QUEUES * QUEUE_SIZE)]

    def get_inflight(self, num_queues, queue_size):
        self.send_raw(
            encode(FrontEndRequest.GET_INFLIGHT_FD, Inflight(0, 0, num_queues, queue_size))
        )
        message = self.receive()
        (fd,) = message.fds
        return message.payload, fd.move()

    def set_inflight(self):
        area, fd = self.inflight
        self.request(FrontEndRequest.SET_INFLIGHT_FD, area, [fd])

    def connect_again(self, path):
        self.sock.close()
        self._decoder.close()
        self.sock = _connect(path, 30)
        self.sock.settimeout(30)
        self._decoder = Decoder(REPLIES_TO_FRONT_END)
        self.protocol_features = 0
        self.negotiate(FEATURES, PROTOCOL_FEATURES)
        self.set_mem_table()
        self.set_inflight()
        for queue in self.queues.values():
            used_idx = int.from_bytes(self.memory.read(queue.used_gpa + 2, 2), "little")
            self.announce(queue, base=used_idx)

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


@pytest.mark.parametrize("options", [[], ["--direct"]], ids=["buffered", "direct"])
@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.long)])
def test_no_write_is_lost_whenever_the_kill_comes(tmp_path, options, kills):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    back_end = BackEnd(tmp_path, "--file", str(image), *options)
    random_ = random.Random(kills)
    disk = {}
    with contextlib.closing(Writer(back_end.socket)) as guest:
        guest.begin()
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
        guest.inflight[1].close()
    back_end.kill()
    contents = image.read_bytes()
    assert len(disk) > kills
    for block, data in disk.items():
        assert contents[block * BLOCK : (block + 1) * BLOCK] == data, block
