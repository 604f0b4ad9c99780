"""A device that copies nothing: what a generator can reach, measured against it.

Its chains go straight back: for each frame sent a buffer returns to the receiver on the
same queue pair of the other port, as long as the frame and with whatever it held. Shows
the generator's limit, and nothing of any real device.
"""
from libc.stdint cimport uint32_t

from vhostpy._ring cimport BURST, Chain, Virtqueue
from vhostpy.runtime.pool cimport Pollable, Turn

from vhostpy._ring import Virtqueue as _Virtqueue
from vhostpy._spec import Feature, ProtocolFeature

FEATURES = (
    Feature.VERSION_1, Feature.NET_MRG_RXBUF, Feature.NET_MQ, Feature.EVENT_IDX,
    Feature.INDIRECT_DESC, Feature.PROTOCOL_FEATURES, Feature.RING_PACKED, Feature.IN_ORDER,
)


cdef class Recycler(Pollable):
    """Takes what one queue sends, and gives as much back on another."""
    cdef Virtqueue tx
    cdef Virtqueue rx

    def __init__(self, Virtqueue tx not None, Virtqueue rx not None):
        self.tx, self.rx = tx, rx

    cdef int poll(self, Turn *turn) noexcept nogil:
        cdef Chain sent[BURST]
        cdef Chain buffers[BURST]
        cdef uint32_t written[BURST]
        cdef int count, room, i
        if not self.tx.is_live() or not self.rx.is_live():
            return 0
        turn.scratch.used = 0
        count = self.tx.pop(sent, BURST, turn.scratch)
        if count <= 0:
            self.tx.publish()
            return 0
        room = max(self.rx.pop(buffers, count, turn.scratch), 0)
        for i in range(room):
            written[i] = min(sent[i].readable_bytes, buffers[i].writable_bytes)
        if room:
            self.rx.push(buffers, written, room)
            self.rx.publish()
        self.tx.push(sent, NULL, count)
        if self.tx.unpublished() * 4 >= self.tx.size():
            self.tx.publish()
        return count

    cdef bint arm(self) noexcept nogil:
        return self.tx.is_live() and self.tx.arm()

    cdef void disarm(self) noexcept nogil:
        if self.tx.is_live():
            self.tx.disarm()


class NullNet:
    """A `Device` of this kind; `NullNet.couple` makes two that answer each other."""

    kind, lossy, positions = "net", True, None

    def __init__(self, name, workers, pairs=1):
        self.name, self.workers = name, workers
        self.queue_limit, self.queue_number = 2 * pairs, pairs
        self.other = self
        self.rings: dict[int, _Virtqueue] = {}
        self.kicks: dict[int, int] = {}
        self.recyclers: dict[int, Recycler] = {}

    @classmethod
    def couple(cls, workers, pairs=1):
        """Two devices: what one is sent, the other returns."""
        ends = cls("null0", workers, pairs), cls("null1", workers, pairs)
        ends[0].other, ends[1].other = ends[1], ends[0]
        return ends

    def features(self):
        return sum(1 << feature for feature in FEATURES)

    def protocol_features(self):
        return 1 << ProtocolFeature.MQ

    def config(self):
        return b""

    def ring_started(self, index, virtqueue, kick_fd):
        self.rings[index], self.kicks[index] = virtqueue, kick_fd
        for device in (self, self.other):
            device._join(index // 2)

    def _join(self, pair):
        tx, rx = 2 * pair + 1, 2 * pair
        if pair in self.recyclers or tx not in self.rings or rx not in self.other.rings:
            return
        recycler = Recycler(self.rings[tx], self.other.rings[rx])
        self.recyclers[pair] = recycler
        fd = self.kicks[tx]
        self.workers.add(recycler, [] if fd < 0 else [fd])

    def ring_stopped(self, index):
        for device in (self, self.other):
            if recycler := device.recyclers.pop(index // 2, None):
                self.workers.remove(recycler)
        self.rings.pop(index, None)

    async def ring_drain(self, index, deadline_s):
        return True

    def ring_enabled(self, index, enabled):
        pass

    def ring_kick(self, index, kick_fd):
        pass

    def write_config(self, offset, data):
        pass

    def opened(self):
        pass

    def closed(self):
        pass

    def negotiated(self, features):
        pass

    def set_mtu(self, mtu):
        pass

    def send_rarp(self, mac):
        pass

    def on_bell(self):
        pass

    def status(self):
        return {"name": self.name, "kind": self.kind}
