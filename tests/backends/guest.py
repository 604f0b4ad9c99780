"""A guest with disks, in one process: memory, rings, a driver that knows virtio-blk."""

import itertools
import os
import struct
import time

from vhostpy._ring import DriverVirtqueue, Virtqueue
from vhostpy._spec import Feature
from vhostpy.memory.guest import GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, SECURE_ERASE = 0, 1, 4, 8, 11, 13, 14
OK, IOERR, UNSUPP = 0, 1, 2
UNTOUCHED = 0xEE

GPA = 0x1_0000_0000
UVA = 0x7F00_0000_0000
RING_AREA = 1 << 20
FEATURES = 1 << Feature.VERSION_1 | 1 << Feature.INDIRECT_DESC | 1 << Feature.EVENT_IDX
DEADLINE_S = 10


def eventually(condition, what="it"):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came about"
        time.sleep(0.0005)


class Guest:
    """Memory of `size` bytes in two adjacent regions, so that buffers can span both."""

    def __init__(self, size=8 << 20, *, queue_size=64, features=FEATURES, queues=1):
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, size)
        self.size = size
        self.features = features
        self.queue_size = queue_size
        self.memory = self.map()
        self.border = GPA + size // 2
        self.next = 0
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(queues)]
        self.calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(queues)]
        self.places = []
        self.drivers = []
        for index in range(queues):
            lengths = DriverVirtqueue.ring_bytes(queue_size)
            place = [self.allocate(length, 4096) for length in lengths]
            self.places.append(place)
            self.drivers.append(
                DriverVirtqueue(
                    self.memory, queue_size, features,
                    desc_gpa=place[0], avail_gpa=place[1], used_gpa=place[2],
                    kick_fd=self.kicks[index],
                )
            )  # fmt: skip
        self.buffers = self.next  # above the rings
        self.done = [{} for _ in range(queues)]

    def map(self):
        half = self.size // 2
        return GuestMemory(
            [
                RegionInfo(GPA, half, UVA, Mapping(self.fd, 0, half)),
                RegionInfo(GPA + half, half, UVA + (1 << 40), Mapping(self.fd, half, half)),
            ]
        )

    def close(self):
        for fd in [*self.kicks, *self.calls, self.fd]:
            os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def allocate(self, length, alignment=1):
        """Guest memory that is not used otherwise; wraps round when it is used up."""
        self.next = -(-self.next // alignment) * alignment
        if self.next + length > self.size:
            self.next = self.buffers
        gpa = GPA + self.next
        self.next += length
        return gpa

    def virtqueue(self, index=0, **options):
        """The back-end's end of a ring."""
        desc, avail, used = (gpa - GPA + UVA for gpa in self.places[index])
        return Virtqueue(
            self.memory, self.queue_size, self.features,
            desc_uva=desc, avail_uva=avail, used_uva=used, call_fd=self.calls[index], **options,
        )  # fmt: skip

    def put(self, data):
        """`data` somewhere in memory."""
        gpa = self.allocate(len(data))
        self.memory.write(gpa, data)
        return gpa

    # The driver ------------------------------------------------------------------------

    def send(self, readable, writable, index=0, *, kick=True):
        """A chain of any pieces; its id."""
        id_ = self.drivers[index].add(readable, writable)
        if kick:
            self.drivers[index].kick()
        return id_

    def request(self, kind, sector=0, *, data=b"", space=0, cuts=(), index=0, kick=True):
        """A request whose pieces are cut at `cuts` (offsets of both its parts)."""
        out = struct.pack("<IIQ", kind, 0, sector) + data
        gpa = self.put(out)
        back = self.put(bytes([UNTOUCHED]) * (space + 1))
        id_ = self.send(_cut(gpa, len(out), cuts), _cut(back, space + 1, cuts), index, kick=kick)
        return Sent(self, id_, back, space, index)

    def collect(self, index=0):
        for id_, length in self.drivers[index].used():
            self.done[index][id_] = length


class Sent:
    """A request on its way."""

    def __init__(self, guest, id_, back, space, index):
        self.guest, self.id, self.back, self.space, self.index = guest, id_, back, space, index
        self.length = None

    def is_done(self):
        self.guest.collect(self.index)
        if self.length is None:
            self.length = self.guest.done[self.index].pop(self.id, None)
        return self.length is not None

    def wait(self):
        eventually(self.is_done, "an answer")
        return self.status

    @property
    def status(self):
        return self.guest.memory.read(self.back + self.space, 1)[0]

    @property
    def data(self):
        return self.guest.memory.read(self.back, self.space) if self.space else b""


def _cut(gpa, length, cuts):
    edges = sorted({0, length, *(cut for cut in cuts if 0 < cut < length)})
    return [(gpa + a, b - a) for a, b in itertools.pairwise(edges)]
