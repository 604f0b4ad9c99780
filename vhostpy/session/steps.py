"""What a message's handler wants done, a step at a time; each is typed by its result.

    base = yield StopRing(index)

The connection answers and listens, the data plane does the rest; the handler is sent the
result, or an error is thrown into it. An fd in a step stays its owner's (the message's, as a
rule, which closes it in the end); connection or data plane move it away where they keep it.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from vhostpy.protocol.payloads import MemoryRegion, Payload, VringAddress
from vhostpy.system.fds import OwnedFd

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """Base of all; T is the result."""


# What a handler is, once it is called: it changes the session when a step has succeeded.
Steps = Generator[Step[Any], Any, None]


# The front-end -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply(Step[None]):
    """Answer `request` with this payload."""

    request: int
    payload: bytes
    fds: tuple[OwnedFd, ...] = ()

    @classmethod
    def pack(cls, request: int, payload: Payload, *fds: OwnedFd) -> Self:
        """From a payload that is still an object."""
        return cls(request, payload.pack(), fds)


@dataclass(frozen=True, slots=True)
class Expect(Step[Any]):
    """The front-end's next message must be this one, with such a payload, which is the result."""

    request: int
    payload: type[Payload]


@dataclass(frozen=True, slots=True)
class SetBackendChannel(Step[None]):
    """Our own requests go there; replaces the last one."""

    fd: OwnedFd


@dataclass(frozen=True, slots=True)
class SetFeatures(Step[None]):
    """The whole set; comes again while rings run (LOG_ALL), and disables none."""

    features: int


# Memory --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SetMemory(Step[None]):
    """These regions and no other; one fd each. Rings that run are translated anew."""

    regions: tuple[MemoryRegion, ...]
    fds: tuple[OwnedFd, ...]


@dataclass(frozen=True, slots=True)
class AddRegion(Step[None]):
    """One region more."""

    region: MemoryRegion
    fd: OwnedFd


@dataclass(frozen=True, slots=True)
class RemoveRegion(Step[None]):
    """One region less; its offset does not matter. Rings in it were stopped before."""

    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class SetLog(Step[None]):
    """The dirty log lies here from now on; used while LOG_ALL is negotiated."""

    fd: OwnedFd
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class MakeInflight(Step[OwnedFd]):
    """Zeroed memory for requests under way: nothing of it stays here, the fd is the handler's."""

    size: int


@dataclass(frozen=True, slots=True)
class SetInflight(Step[None]):
    """Rings that start from now on remember their requests there, and first do the requests
    that they find there."""

    fd: OwnedFd
    offset: int
    size: int
    num_queues: int
    queue_size: int


# Rings: what they start with is in the session's `rings[index]`. ------------------------


@dataclass(frozen=True, slots=True)
class StartRing(Step[None]):
    """All that the ring needs is there."""

    index: int


@dataclass(frozen=True, slots=True)
class StopRing(Step[int]):
    """Drain and stop it; the result is the base at which it would go on.

    `resumes`: it will, as soon as its memory is back, and the front-end does not hear of it.
    """

    index: int
    resumes: bool = False


@dataclass(frozen=True, slots=True)
class EnableRing(Step[None]):
    """Enable or disable a running ring."""

    index: int
    enabled: bool


@dataclass(frozen=True, slots=True)
class SetRingAddresses(Step[None]):
    """A running ring lies elsewhere, or its used ring is logged otherwise."""

    index: int
    address: VringAddress


@dataclass(frozen=True, slots=True)
class SetRingBase(Step[None]):
    """A running ring goes on at another index."""

    index: int
    base: int


@dataclass(frozen=True, slots=True)
class SetRingKick(Step[None]):
    """A running ring has another kick fd (or none: poll)."""

    index: int
    fd: OwnedFd | None


@dataclass(frozen=True, slots=True)
class SetRingCall(Step[None]):
    """A running ring has another call fd (or none); lose no call."""

    index: int
    fd: OwnedFd | None


@dataclass(frozen=True, slots=True)
class SetRingErr(Step[None]):
    """A running ring has another error fd (or none)."""

    index: int
    fd: OwnedFd | None


# Device --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SetMtu(Step[None]):
    """The guest's MTU; the device may refuse it."""

    mtu: int


@dataclass(frozen=True, slots=True)
class SendRarp(Step[None]):
    """Announce this MAC address in the guest's place."""

    mac: bytes


@dataclass(frozen=True, slots=True)
class WriteConfig(Step[None]):
    """Bytes for the config space."""

    offset: int
    data: bytes
