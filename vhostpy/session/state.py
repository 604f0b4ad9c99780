"""What a front-end has said so far, and what its rings still wait for. No message, no I/O.

Changed by the handlers of its messages (`handlers/`), as their steps succeed.
"""

from collections import Counter
from collections.abc import Iterable

from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.device.device import Device
from vhostpy.errors import ProtocolError
from vhostpy.protocol.payloads import MemoryRegion
from vhostpy.ring.parts import first_base
from vhostpy.session.peername import share_hint
from vhostpy.session.regions import Spans
from vhostpy.session.ring import Ring, RingEvent, RingState
from vhostpy.session.steps import EnableRing, Steps

CORE_FEATURES = 1 << Feature.PROTOCOL_FEATURES | 1 << Feature.LOG_ALL
CORE_PROTOCOL_FEATURES = (
    1 << ProtocolFeature.MQ
    | 1 << ProtocolFeature.LOG_SHMFD
    | 1 << ProtocolFeature.REPLY_ACK
    | 1 << ProtocolFeature.BACKEND_REQ
    | 1 << ProtocolFeature.CONFIGURE_MEM_SLOTS
    | 1 << ProtocolFeature.STATUS
    | 1 << ProtocolFeature.RESET_DEVICE
)


class SessionState:
    """What one front-end and one device have agreed on."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.offered = device.features() | CORE_FEATURES
        self.protocol_offered = device.protocol_features() | CORE_PROTOCOL_FEATURES
        self.features: int | None = None  # None: not negotiated yet
        self.protocol_features = 0
        self.rings = [Ring(index) for index in range(device.queue_limit)]
        # Guest memory, as the front-end describes it; both replaced as a whole.
        self.regions: list[MemoryRegion] = []
        self.spans = Spans(())  # of the regions
        self.logging = False  # a dirty log is known
        self.device_status = 0
        self.refused: Counter[str] = Counter()
        # Why it is over. Not the exception: that keeps frames alive, and fds in them.
        self.ended = ""
        self.front_end = ""  # the program's name, where it is known
        self.messages = 0  # handled

    # Negotiated ------------------------------------------------------------------------

    def feature(self, bit: int) -> int:
        """1 where this feature is negotiated, else 0."""
        return (self.features or 0) >> bit & 1

    def protocol(self, bit: int) -> int:
        """1 where this protocol feature is negotiated, else 0."""
        return self.protocol_features >> bit & 1

    @property
    def packed(self) -> bool | None:
        """Whether rings are packed; None: not known yet."""
        return None if self.features is None else bool(self.feature(Feature.RING_PACKED))

    # Rings -----------------------------------------------------------------------------

    def base_of(self, ring: Ring) -> int:
        """Where `ring` starts, if it does now."""
        return first_base(self.features or 0) if ring.base is None else ring.base

    def enable(self, rings: Iterable[Ring], enabled: bool) -> Steps:
        """Enables `rings`, or disables them."""
        for ring in rings:
            if ring.started and ring.enabled != enabled:
                yield EnableRing(ring.index, enabled)
            ring.enabled = enabled

    def settle(self, ring: Ring) -> Steps:
        """Starts `ring` if nothing is missing. Raises where its addresses are not memory."""
        if ring.state is not RingState.WAITING or self._missing_before_memory(ring):
            return
        if self.regions:
            self.demand_mapped(ring)
            yield from self._start(ring)

    def settle_all(self) -> Steps:
        """Starts the rings that had only waited for this; others may wait for more regions."""
        for ring in self.rings:
            if (
                ring.state is RingState.WAITING
                and not self._missing_before_memory(ring)
                and self.is_mapped(ring)
            ):
                yield from self._start(ring)

    def _start(self, ring: Ring) -> Steps:
        ring.check(self.packed)
        yield from ring.advance(RingEvent.COMPLETE)

    def _missing_before_memory(self, ring: Ring) -> str:
        """What `ring` waits for, in words; "" when it is only memory."""
        if self.features is None:
            return "the features (SET_FEATURES)"
        if ring.state is RingState.STOPPED:
            return "a kick fd (SET_VRING_KICK)"
        if not ring.num:
            return "its size (SET_VRING_NUM)"
        if ring.desc_uva is None:
            return "its addresses (SET_VRING_ADDR)"
        log_comes = self.feature(Feature.LOG_ALL) and self.protocol(ProtocolFeature.LOG_SHMFD)
        if log_comes and not self.logging:
            # QEMU sends it behind the kicks; what we wrote before would not be migrated.
            return "the dirty log (SET_LOG_BASE)"
        return ""

    def missing(self, ring: Ring) -> str:
        """What `ring` waits for, in words; "" for nothing."""
        missing = self._missing_before_memory(ring)
        if missing:
            return missing
        if not self.regions:
            return f"guest memory (SET_MEM_TABLE); {share_hint(self.front_end)}"
        unmapped = self.unmapped(ring)
        return f"memory for its {unmapped}" if unmapped else ""

    def is_mapped(self, ring: Ring, spans: Spans | None = None) -> bool:
        """Whether each part of `ring` lies in a region, of those in `spans` if they are given.

        It has been told its addresses.
        """
        known = self.spans if spans is None else spans
        return all(map(known.__contains__, ring.spans(bool(self.packed))))

    def unmapped(self, ring: Ring) -> str:
        """The first part of `ring` that lies in no region, in words; "" for none."""
        for part in ring.parts(bool(self.packed)):
            if (part.uva, part.uva + part.size) not in self.spans:
                return f"{part.name} at UVA {part.uva:#x} ({part.size} bytes)"
        return ""

    def demand_mapped(self, ring: Ring) -> None:
        """Raises ProtocolError where a part of `ring` lies in no region."""
        unmapped = self.unmapped(ring)
        if unmapped:
            raise ProtocolError(
                f"ring {ring.index}: its {unmapped} is in none of the {len(self.regions)} regions",
                "the front-end must share the memory that its rings lie in; "
                + share_hint(self.front_end),
            )
