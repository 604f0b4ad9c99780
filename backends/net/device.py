"""virtio-net as a device: what it offers, and its rings' way into the switch.

The control virtqueue, the config space and the guest's MTU are the front-end's (QEMU
answers them itself); we see queues only, and SET_VRING_ENABLE for each of them.
"""

from typing import Any

from vhostpy._ring import Virtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.backends.net.port import NetPort
from vhostpy.errors import ConfigError, ProtocolError, Refused
from vhostpy.ring.positions import Owner
from vhostpy.vswitch.switch import Switch

PAIRS_MAX = 128  # 256 virtqueues, all that a vhost-user message can name

# Not RING_RESET: to us it is a ring that stops and starts again, but QEMU (7.2 and later)
# shows the bit to the guest and then says nothing of a reset, so that we would go on in
# memory that the guest has freed.
# No checksum or segmentation offload: a frame leaves as it came. Those that QEMU answers
# by itself (see above) are offered because it asks the back-end before it shows them.
FEATURES = (
    Feature.VERSION_1,
    Feature.ANY_LAYOUT,
    Feature.NET_MRG_RXBUF,
    Feature.NET_MTU,
    Feature.NET_STATUS,
    Feature.NET_GUEST_ANNOUNCE,
    Feature.NET_CTRL_VQ,
    Feature.NET_CTRL_RX,
    Feature.NET_CTRL_VLAN,
    Feature.NET_MQ,
    Feature.INDIRECT_DESC,
    Feature.EVENT_IDX,
    Feature.RING_PACKED,
    # Frames leave in the order in which they came, and buffers are filled in order. Without
    # it DPDK's virtio-user is a third slower.
    Feature.IN_ORDER,
    Feature.LOG_ALL,
    Feature.PROTOCOL_FEATURES,
)
PROTOCOL_FEATURES = (ProtocolFeature.MQ, ProtocolFeature.RARP, ProtocolFeature.MTU)


class NetDevice:
    """One virtio-net device: a port of a switch behind one socket."""

    kind = "net"
    lossy = True

    def __init__(
        self, name: str, switch: Switch, *, pairs: int = 4, mtu_limit: int | None = None
    ) -> None:
        if not 1 <= pairs <= PAIRS_MAX:
            raise ConfigError(f"{name}: {pairs} queue pairs", f"choose 1 to {PAIRS_MAX}")
        self.name = name
        self.switch = switch
        self.workers = switch.workers
        self.queue_limit = 2 * pairs
        self.queue_number = pairs
        self.mtu_limit = mtu_limit
        self.mtu: int | None = None
        self.negotiated_features = 0
        self.connected = False
        self.positions: Owner | None = None
        self.port = NetPort(name, pairs)
        switch.attach(self.port)
        self._started: set[int] = set()

    def features(self) -> int:
        """Feature bits that this device offers, ring features included."""
        return sum(1 << feature for feature in FEATURES)

    def protocol_features(self) -> int:
        """Protocol feature bits beyond what the core itself serves."""
        return sum(1 << feature for feature in PROTOCOL_FEATURES)

    def config(self) -> bytes:
        """Nothing: the front-end keeps it."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Refused: the front-end keeps it."""
        raise ProtocolError(
            f"{self.name}: SET_CONFIG of {len(data)} bytes at {offset}: "
            "a net device's config space is the front-end's"
        )

    def note(self) -> int:
        return 1  # a driver can set nothing

    def recall(self, note: int) -> None:
        pass

    def opened(self) -> None:
        """A front-end has connected."""
        self.connected = True

    def closed(self) -> None:
        """The front-end has gone: its addresses may turn up elsewhere. The port stays."""
        for index in range(self.queue_limit):
            self.port.enable(index, False)
        self.switch.fdb.flush(self.port.index)
        self.connected = False
        self.negotiated_features = 0
        self.mtu = None

    def close(self) -> None:
        """Leaves the switch for good."""
        for index in sorted(self._started):
            self.ring_stopped(index)
        self.switch.detach(self.port)

    def negotiated(self, features: int) -> None:
        """The front-end's SET_FEATURES; may come again while rings run."""
        self.negotiated_features = features
        self.port.negotiated(features)

    def ring_started(self, index: int, virtqueue: Virtqueue, kick_fd: int) -> None:
        """Wires a virtqueue that is not live yet; the guest's transmit queues are polled."""
        self.port.wire(index, virtqueue)
        if index & 1:
            try:
                self.switch.open_queue(self.port, index // 2, kick_fd)
            except BaseException:
                self.port.unwire(index)
                raise
        self._started.add(index)

    def ring_enabled(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE."""
        self.port.enable(index, enabled)

    def ring_kick(self, index: int, kick_fd: int) -> None:
        """A started ring's kick fd was replaced; kicks of receive queues tell us nothing."""
        if index & 1:
            self.switch.set_kick(self.port, index // 2, kick_fd)

    async def ring_drain(self, index: int, deadline_s: float) -> bool:
        """Nothing to wait for: a turn keeps nothing of a ring."""
        return True

    def ring_stopped(self, index: int) -> None:
        """The ring is the core's again."""
        if index not in self._started:
            return
        self._started.remove(index)
        if index & 1:
            self.switch.close_queue(self.port, index // 2)
        virtqueue = self.port.unwire(index)
        # A worker may just have found the pointer, and looks whether the ring is live.
        self.workers.wait()
        del virtqueue

    def set_mtu(self, mtu: int) -> None:
        """NET_SET_MTU: what the guest was told by `host_mtu=`."""
        if self.mtu_limit is not None and mtu > self.mtu_limit:
            raise Refused(
                f"{self.name}: MTU {mtu} is above the ceiling of {self.mtu_limit}",
                f"start QEMU with host_mtu={self.mtu_limit} or less, or vhostpy with "
                f"--mtu {mtu} or more",
            )
        self.mtu = mtu

    def send_rarp(self, mac: bytes) -> None:
        """SEND_RARP: announces a guest that cannot do so itself."""
        if len(mac) != 6 or mac[0] & 1:
            raise ProtocolError(
                f"{self.name}: SEND_RARP for {mac.hex(':')}: not the address of one station"
            )
        self.switch.announce(self.port, mac)

    def on_bell(self) -> None:
        """Drops are counted, not logged: a guest could fill the log with them."""

    def status(self) -> dict[str, Any]:
        """Counters and state, for `status`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "port_index": self.port.index,
            "pairs": self.queue_number,
            "rings_started": len(self._started),
            "mergeable": bool(self.port.mergeable),
            "header_size_bytes": self.port.header_size,
            "mtu": self.mtu,
            "mtu_limit": self.mtu_limit,
            "queues": self.port.counters(),
        }
