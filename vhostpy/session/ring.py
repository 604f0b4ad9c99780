"""A ring as the front-end describes it, and the table of its states.

Everything that moves a ring from one state to another is in RING; the handlers decide which
event a message is. Knows no virtqueue: the data plane has that.
"""

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vhostpy._spec import Limit
from vhostpy.errors import ProtocolError
from vhostpy.protocol.payloads import VringAddress
from vhostpy.session.steps import SetRingKick, StartRing, Step, StopRing
from vhostpy.system.fds import OwnedFd

ADDRESS_END = 1 << 64
VRING_F_LOG = 1  # "A vring address description"


class RingState(Enum):
    """vhost-user, "Ring states"; enabled or disabled is independent of these."""

    STOPPED = "stopped"
    WAITING = "waiting"  # a kick fd came; something else is missing
    STARTED = "started"


class RingEvent(Enum):
    """What can happen to a ring."""

    KICK = "SET_VRING_KICK came"
    COMPLETE = "all that it needs is there"
    UNMAPPED = "the memory it lies in goes away"
    STOP = "GET_VRING_BASE or RESET_DEVICE came"


# The document starts a ring at its first kick, every back-end when the kick fd arrives:
# a kick may have been written before, and says only 'look'.
RING: dict[
    tuple[RingState, RingEvent],
    tuple[RingState, type[StartRing] | type[StopRing] | type[SetRingKick] | None],
] = {
    (RingState.STOPPED, RingEvent.KICK): (RingState.WAITING, None),
    (RingState.WAITING, RingEvent.KICK): (RingState.WAITING, None),
    (RingState.WAITING, RingEvent.COMPLETE): (RingState.STARTED, StartRing),
    (RingState.STARTED, RingEvent.KICK): (RingState.STARTED, SetRingKick),
    # A front-end may take a region out and put it back while the guest runs.
    (RingState.STARTED, RingEvent.UNMAPPED): (RingState.WAITING, StopRing),
    (RingState.STARTED, RingEvent.STOP): (RingState.STOPPED, StopRing),
    (RingState.WAITING, RingEvent.STOP): (RingState.STOPPED, None),
    (RingState.STOPPED, RingEvent.STOP): (RingState.STOPPED, None),
}


@dataclass(frozen=True, slots=True)
class RingPart:
    """One of a ring's three areas."""

    name: str
    uva: int
    size: int
    alignment: int


@dataclass(slots=True)
class Ring:
    """What the front-end has said about one ring, and where it stands."""

    index: int
    state: RingState = RingState.STOPPED
    enabled: bool = False
    num: int = 0
    desc_uva: int | None = None
    avail_uva: int | None = None
    used_uva: int | None = None
    log_used: bool = False  # VHOST_VRING_F_LOG
    used_log_gpa: int = 0
    base: int | None = None  # None: never said, the ring starts where a new one does
    kick: OwnedFd | None = None
    call: OwnedFd | None = None
    err: OwnedFd | None = None
    broken: str = ""  # while it runs: why nothing is taken from it, and what helps
    ran: bool = False  # at the addresses that it has
    # It ran there and was stopped: they hold for the memory that was shared then.
    spent: bool = False

    @property
    def started(self) -> bool:
        return self.state is RingState.STARTED

    @property
    def poll(self) -> bool:
        """Looked at without being kicked: the front-end gave no kick fd."""
        return self.state is not RingState.STOPPED and self.kick is None

    @property
    def touched(self) -> bool:
        """The front-end means to use it. (QEMU sends call fds for rings it never uses.)"""
        return bool(self.num) or self.desc_uva is not None or self.state is not RingState.STOPPED

    def advance(
        self, event: RingEvent, *arguments: OwnedFd | bool | None
    ) -> Generator[Step[Any], Any, Any]:
        """Carries out what goes with `event`, if anything does, then moves on.

        Returns the step's result; the arguments are the step's, behind the index.
        """
        state, step = RING[self.state, event]
        result = None if step is None else (yield step(self.index, *arguments))  # type: ignore[arg-type]
        self.state = state
        if step is StartRing:
            self.ran, self.spent = True, False
        elif event is RingEvent.STOP:
            self.spent = self.ran
        return result

    def set_addresses(self, address: VringAddress | None) -> None:
        """Where it lies from now on; None: nobody knows."""
        if address is None:
            self.desc_uva = self.avail_uva = self.used_uva = None
        else:
            self.desc_uva, self.avail_uva = address.desc_uva, address.avail_uva
            self.used_uva = address.used_uva
        self.log_used = address is not None and bool(address.flags & VRING_F_LOG)
        self.used_log_gpa = address.used_log_gpa if address is not None and self.log_used else 0
        self.ran, self.spent = self.started, False

    def forget_addresses(self) -> None:
        """It waits for SET_VRING_ADDR."""
        self.set_addresses(None)

    def parts(self, packed: bool) -> list[RingPart]:
        """Where its areas lie; empty before SET_VRING_ADDR.

        virtio 1.3, "Split Virtqueues", "Packed Virtqueues": sizes and alignments. The two
        bytes of EVENT_IDX are left out, a ring without it may end where its region does.
        """
        if self.desc_uva is None or self.avail_uva is None or self.used_uva is None:
            return []
        descriptors = RingPart("descriptor area", self.desc_uva, 16 * self.num, 16)
        if packed:
            return [
                descriptors,
                RingPart("driver area", self.avail_uva, 4, 4),
                RingPart("device area", self.used_uva, 4, 4),
            ]
        return [
            descriptors,
            RingPart("avail ring", self.avail_uva, 4 + 2 * self.num, 2),
            RingPart("used ring", self.used_uva, 4 + 8 * self.num, 4),
        ]

    def spans(self, packed: bool) -> tuple[tuple[int, int], ...]:
        """From where to where its areas lie. As parts(); but cheap, for all rings at once."""
        if self.desc_uva is None or self.avail_uva is None or self.used_uva is None:
            return ()
        num, desc, avail, used = self.num, self.desc_uva, self.avail_uva, self.used_uva
        if packed:
            return (desc, desc + 16 * num), (avail, avail + 4), (used, used + 4)
        return (
            (desc, desc + 16 * num),
            (avail, avail + 4 + 2 * num),
            (used, used + 4 + 8 * num),
        )

    def check(self, packed: bool | None) -> None:
        """Raises ProtocolError where no ring can look like that; None: not known yet."""
        where = f"ring {self.index}"
        if self.num and packed is False and self.num & (self.num - 1):
            raise ProtocolError(f"{where}: {self.num} descriptors, a split ring has a power of two")
        for part in self.parts(bool(packed)):
            if part.uva % part.alignment:
                raise ProtocolError(
                    f"{where}: {part.name} at UVA {part.uva:#x}, must be aligned to "
                    f"{part.alignment} bytes"
                )
            if part.uva + part.size > ADDRESS_END:
                raise ProtocolError(
                    f"{where}: {part.name} of {part.size} bytes at UVA {part.uva:#x} passes 2**64"
                )
        if self.log_used and self.used_log_gpa + 8 * Limit.QUEUE_SIZE_MAX + 6 > ADDRESS_END:
            raise ProtocolError(
                f"{where}: used ring is logged at GPA {self.used_log_gpa:#x}, passes 2**64"
            )

    def reset(self) -> None:
        """Back to the initial state, as after RESET_DEVICE; call and err fds stay."""
        self.enabled = False
        self.num = 0
        self.forget_addresses()
        self.base = None

    def replace(self, name: str, fd: OwnedFd | None) -> None:
        """Its `kick`, `call` or `err` fd is another one, or none; closes the last one."""
        replaced = getattr(self, name)
        setattr(self, name, fd)
        if replaced is not None:
            replaced.close()

    def close_kick(self) -> None:
        """A stopped ring starts again only with a new kick fd."""
        self.replace("kick", None)

    def close(self) -> None:
        """Closes its fds."""
        for name in ("kick", "call", "err"):
            self.replace(name, None)
