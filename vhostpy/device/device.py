"""What a device type must say to the core. The core knows no device type.

One device serves one socket. Methods run on the control thread (asyncio). A virtqueue
handed to `ring_started` is not live yet; the data plane makes it live after the call,
and has taken it back from the workers (not live, all workers quiescent since) before it
calls `ring_stopped`, `ring_enabled` or `negotiated`.
"""

from typing import Any, Protocol

from vhostpy._ring import Virtqueue
from vhostpy.ring.positions import Owner
from vhostpy.runtime.pool import Workers


class Device(Protocol):
    """A virtio device behind one vhost-user socket."""

    name: str  # what messages and `status` call it, e.g. the socket's file name
    kind: str  # "net" or "blk"
    workers: Workers  # who polls its queues
    queue_limit: int  # virtqueues, not pairs
    lossy: bool  # what was under way may be lost, or come twice, when a ring starts again
    positions: Owner | None  # where those of its packed rings are kept, if they are
    queue_number: int  # what GET_QUEUE_NUM says: pairs for net, virtqueues for blk

    def features(self) -> int:
        """Feature bits that this device offers, ring features included."""

    def protocol_features(self) -> int:
        """Protocol feature bits beyond what the core itself serves."""

    def config(self) -> bytes:
        """The device's config space; b"" where the front-end keeps it."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Raises ProtocolError where that is read-only or out of range."""

    def note(self) -> int:
        """What the driver has set in the config space, as a number from 1 to 255.

        The front-end keeps it, with the memory of requests under way, beyond a kill.
        """

    def recall(self, note: int) -> None:
        """Sets it again. The note was in shared memory: raises ProtocolError for others."""

    def opened(self) -> None:
        """A front-end has connected."""

    def closed(self) -> None:
        """The front-end has gone; all rings were stopped before."""

    def negotiated(self, features: int) -> None:
        """The front-end's SET_FEATURES; may come again while rings run (LOG_ALL)."""

    def ring_started(self, index: int, virtqueue: Virtqueue, kick_fd: int) -> None:
        """`kick_fd` is -1 where the front-end wants us to poll; it stays the core's."""

    def ring_enabled(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE; a started ring is disabled until told otherwise."""

    def ring_kick(self, index: int, kick_fd: int) -> None:
        """A started ring's kick fd was replaced."""

    async def ring_drain(self, index: int, deadline_s: float) -> bool:
        """Take nothing more and wait for requests under way; False: some hang past the deadline."""

    def ring_stopped(self, index: int) -> None:
        """The ring is the core's again."""

    def set_mtu(self, mtu: int) -> None:
        """NET_SET_MTU; raises Refused above the ceiling."""

    def send_rarp(self, mac: bytes) -> None:
        """SEND_RARP: announce `mac` on the other ports, the guest cannot."""

    def on_bell(self) -> None:
        """The bell was sounded: say what the operator should know."""

    def status(self) -> dict[str, Any]:
        """Counters and state, for `status`: plain types, stable snake_case keys with units."""
