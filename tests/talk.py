"""A session and its front-end without a socket: for tests of what the session decides."""

import os
from typing import Any

from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.errors import VhostpyError
from vhostpy.protocol.codec import REPLIES_TO_FRONT_END, Decoder, Message, encode, encode_reply
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.payloads import (
    U64,
    MemoryRegion,
    MemoryTable,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostpy.session.effects import Effect, Reply, StopRing
from vhostpy.session.session import Session
from vhostpy.system.fds import OwnedFd

UVA = 0x7F00_0000_0000
REGION = MemoryRegion(0, 4 << 20, UVA, 0)  # room for 256 rings
FAR_REGION = MemoryRegion(1 << 32, 1 << 20, UVA + (1 << 32), 4 << 20)

FEATURES = 1 << Feature.VERSION_1 | 1 << Feature.EVENT_IDX | 1 << Feature.PROTOCOL_FEATURES
PROTOCOL_FEATURES = (
    1 << ProtocolFeature.MQ
    | 1 << ProtocolFeature.LOG_SHMFD
    | 1 << ProtocolFeature.REPLY_ACK
    | 1 << ProtocolFeature.CONFIG
    | 1 << ProtocolFeature.CONFIGURE_MEM_SLOTS
    | 1 << ProtocolFeature.STATUS
)
LOG_ALL = 1 << Feature.LOG_ALL
PLAIN = FEATURES & ~(1 << Feature.PROTOCOL_FEATURES)
PACKED = FEATURES | 1 << Feature.RING_PACKED
TOP = 1 << 64


class FakeDevice:
    """What a session asks of a device."""

    name = "vu0"
    kind = "net"
    queue_limit = 256
    queue_number = 128

    def features(self) -> int:
        bits = (Feature.VERSION_1, Feature.EVENT_IDX, Feature.NET_MTU, Feature.RING_PACKED)
        return sum(1 << bit for bit in bits)

    def protocol_features(self) -> int:
        return sum(
            1 << b for b in (ProtocolFeature.RARP, ProtocolFeature.MTU, ProtocolFeature.CONFIG)
        )

    def config(self) -> bytes:
        return bytes(range(1, 61))


def open_fds() -> set[str]:
    """Names of this process's open files, the one that lists them included."""
    return set(os.listdir("/proc/self/fd"))


def eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0))


def eventfds(count: int) -> list[OwnedFd]:
    return [eventfd() for _ in range(count)]


def ring_address(index: int, *, uva: int = UVA, log: int = 0, **changes: int) -> VringAddress:
    """Ring `index` of at most 256 descriptors, each in 16 KiB of its own."""
    at = uva + index * 0x4000
    fields = {
        "index": index,
        "flags": log,
        "desc_uva": at,
        "avail_uva": at + 0x1000,
        "used_uva": at + 0x2000,
        "used_log_gpa": 0,
    }
    return VringAddress(**fields | changes)


class Talk:
    """Sends messages through the codec to a session and plays the data plane.

    `fail` raises once, in the place of an effect of that type.
    """

    def __init__(self, device: Any = None) -> None:
        self.session = Session(device or FakeDevice())
        self.decoder = Decoder()
        self.answers: list[Message] = []
        self.bases: dict[int, int] = {}
        self.running: set[int] = set()
        self.fail: tuple[type[Effect], VhostpyError] | None = None

    def say(
        self,
        request: int,
        payload: Any = b"",
        fds: tuple[OwnedFd, ...] = (),
        *,
        need_reply: bool = False,
    ) -> list[Effect]:
        """The effects of one message, answers left out: those are in `answers`, typed."""
        (message,) = self.decoder.feed(encode(request, payload, need_reply=need_reply), fds)
        return self.take(message)

    def take(self, message: Message) -> list[Effect]:
        """The same for a message that was decoded before."""
        self.answers = []
        effects: list[Effect] = []
        error = None
        try:
            try:
                for effect in self.session.handle(message):
                    self._do(effect, effects)
            except VhostpyError as caught:
                error = caught
            for effect in self.session.done(message, error):
                self._do(effect, effects)
        finally:
            del error  # or frame and traceback keep each other, and fds, alive
        return effects

    def ask(self, request: int, payload: Any = b"", fds: tuple[OwnedFd, ...] = ()) -> Any:
        """The payload of the one answer to a message that has need_reply set."""
        self.say(request, payload, fds, need_reply=True)
        (answer,) = self.answers
        assert answer.request == request
        return answer.payload

    def _do(self, effect: Effect, effects: list[Effect]) -> None:
        if isinstance(effect, Reply):
            wire = encode_reply(effect.request, effect.payload)
            self.answers += Decoder(REPLIES_TO_FRONT_END).feed(wire, effect.fds)
            return
        if self.fail is not None and isinstance(effect, self.fail[0]):
            (_, error), self.fail = self.fail, None
            try:
                raise error
            finally:
                del error
        effects.append(effect)
        name = type(effect).__name__
        if name == "StartRing":
            assert effect.index not in self.running
            self.running.add(effect.index)
        if isinstance(effect, StopRing):
            self.running.remove(effect.index)
            base = self.bases.get(
                effect.index, self.session.base_of(self.session.rings[effect.index])
            )
            for follow_up in self.session.ring_stopped(effect.index, base):
                self._do(follow_up, effects)
        replaced = getattr(effect, "replaced", None)
        if replaced is not None:
            replaced.close()
        for fd in (*getattr(effect, "fds", ()), getattr(effect, "fd", None)):
            if fd is not None:
                fd.close()

    # Shorter ways to say things ----------------------------------------------------------

    def negotiate(self, features: int = FEATURES, protocol: int = PROTOCOL_FEATURES) -> None:
        if protocol:
            self.say(R.SET_PROTOCOL_FEATURES, U64(protocol))
        self.say(R.SET_OWNER)
        self.say(R.SET_FEATURES, U64(features))

    def table(self, *regions: MemoryRegion) -> list[Effect]:
        return self.say(R.SET_MEM_TABLE, MemoryTable(regions), tuple(eventfd() for _ in regions))

    def add(self, region: MemoryRegion) -> list[Effect]:
        return self.say(R.ADD_MEM_REG, SingleRegion(region), (eventfd(),))

    def remove(self, region: MemoryRegion) -> list[Effect]:
        return self.say(R.REM_MEM_REG, SingleRegion(region))

    def num(self, index: int = 0, num: int = 256) -> list[Effect]:
        return self.say(R.SET_VRING_NUM, VringState(index, num))

    def address(self, index: int = 0, **changes: int) -> list[Effect]:
        return self.say(R.SET_VRING_ADDR, ring_address(index, **changes))

    def kick(self, index: int = 0, *, poll: bool = False) -> list[Effect]:
        fds = () if poll else (eventfd(),)
        return self.say(R.SET_VRING_KICK, VringFile(index, not poll), fds)

    def start(self, index: int = 0, num: int = 256) -> list[Effect]:
        return [*self.num(index, num), *self.address(index), *self.kick(index)]

    def stop(self, index: int = 0) -> list[Effect]:
        return self.say(R.GET_VRING_BASE, VringState(index, 0))


def ready(device: Any = None) -> Talk:
    """A session with features and memory; no ring yet."""
    talk = Talk(device)
    talk.negotiate()
    talk.table(REGION, FAR_REGION)
    return talk
