"""What a session wants done: its answers to messages, for the data plane and the server.

Carried out in order, one after the other. An fd in an effect belongs to whoever carries
it out; one that is never carried out is closed with the effect.
"""

from dataclasses import dataclass, field
from typing import Self

from vhostpy.protocol.payloads import MemoryRegion, Payload
from vhostpy.system.fds import OwnedFd


@dataclass(frozen=True, slots=True)
class Effect:
    """Base of all."""


@dataclass(frozen=True, slots=True)
class Reply(Effect):
    """Answer `request` with this payload; the fds stay their owner's."""

    request: int
    payload: bytes
    fds: tuple[OwnedFd, ...] = ()

    @classmethod
    def pack(cls, request: int, payload: Payload, *fds: OwnedFd) -> Self:
        """From a payload that is still an object."""
        return cls(request, payload.pack(), fds)


@dataclass(frozen=True, slots=True)
class SetFeatures(Effect):
    """The whole set; comes again while rings run (LOG_ALL), and disables none."""

    features: int


# Memory --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SetMemory(Effect):
    """These regions and no other; one fd each. Rings that run are translated anew."""

    regions: tuple[MemoryRegion, ...]
    fds: tuple[OwnedFd, ...]


@dataclass(frozen=True, slots=True)
class AddRegion(Effect):
    """One region more."""

    region: MemoryRegion
    fd: OwnedFd


@dataclass(frozen=True, slots=True)
class RemoveRegion(Effect):
    """One region less; its offset does not matter. Rings in it were stopped before."""

    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class SetLog(Effect):
    """The dirty log lies here from now on; used while LOG_ALL is negotiated."""

    fd: OwnedFd | None
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class MakeInflight(Effect):
    """Make memory for requests under way, then tell it by `session.inflight_made`."""

    size: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class SetInflight(Effect):
    """Rings that start from now on remember their requests there, and first do those that
    they find."""

    fd: OwnedFd
    offset: int
    size: int
    num_queues: int
    queue_size: int


# Rings: the session's `rings[index]` has the values. ------------------------------------


@dataclass(frozen=True, slots=True)
class StartRing(Effect):
    """All that the ring needs is there."""

    index: int


@dataclass(frozen=True, slots=True)
class StopRing(Effect):
    """Stop it, then tell its base by `session.ring_stopped(index, base)`."""

    index: int


@dataclass(frozen=True, slots=True)
class EnableRing(Effect):
    """A ring was enabled or disabled; it may be stopped."""

    index: int
    enabled: bool


@dataclass(frozen=True, slots=True)
class SetRingAddresses(Effect):
    """A running ring lies elsewhere, or its used ring is logged otherwise."""

    index: int


@dataclass(frozen=True, slots=True)
class SetRingBase(Effect):
    """A running ring goes on at another index."""

    index: int


@dataclass(frozen=True, slots=True)
class SetRingKick(Effect):
    """A running ring has another kick fd (or none: poll); close `replaced` after."""

    index: int
    replaced: OwnedFd | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class SetRingCall(Effect):
    """A running ring has another call fd (or none); lose no call; close `replaced` after."""

    index: int
    replaced: OwnedFd | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class SetRingErr(Effect):
    """A running ring has another error fd (or none); close `replaced` after."""

    index: int
    replaced: OwnedFd | None = field(default=None, compare=False)


# Device --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SetBackendChannel(Effect):
    """Where our own requests go; replaces the last one."""

    fd: OwnedFd


@dataclass(frozen=True, slots=True)
class SetMtu(Effect):
    """The guest's MTU; the device may refuse it."""

    mtu: int


@dataclass(frozen=True, slots=True)
class SendRarp(Effect):
    """Announce this MAC address in the guest's place."""

    mac: bytes


@dataclass(frozen=True, slots=True)
class WriteConfig(Effect):
    """Bytes for the config space; `migration` may write what the guest may not."""

    offset: int
    data: bytes
    migration: bool


@dataclass(frozen=True, slots=True)
class SetStatus(Effect):
    """The virtio device status, as the driver wrote it."""

    status: int


@dataclass(frozen=True, slots=True)
class ResetDevice(Effect):
    """Back to the initial state; all rings were stopped before, memory stays."""
