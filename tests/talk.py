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
from vhostpy.session.session import Session
from vhostpy.session.steps import (
    Expect,
    MakeInflight,
    Reply,
    SetBackendChannel,
    StartRing,
    Step,
    StopRing,
)
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

    `fail` raises once, in the place of a step of that type. `comes` is what an `Expect` gets.
    """

    def __init__(self, device: Any = None) -> None:
        self.session = Session(device or FakeDevice())
        self.decoder = Decoder()
        self.answers: list[Message] = []
        self.bases: dict[int, int] = {}
        self.running: set[int] = set()
        self.fail: tuple[type[Step[Any]], VhostpyError] | None = None
        self.comes: list[Any] = []
        self.channel: OwnedFd | None = None

    def close(self) -> None:
        """The session's end."""
        self.session.close()
        if self.channel is not None:
            self.channel.close()

    def hear(
        self,
        request: int,
        payload: Any = b"",
        fds: tuple[OwnedFd, ...] = (),
        *,
        need_reply: bool = False,
    ) -> Message:
        """A message as it comes out of the codec."""
        (message,) = self.decoder.feed(encode(request, payload, need_reply=need_reply), fds)
        return message

    def say(
        self,
        request: int,
        payload: Any = b"",
        fds: tuple[OwnedFd, ...] = (),
        *,
        need_reply: bool = False,
    ) -> list[Step[Any]]:
        """The steps of one message, answers left out: those are in `answers`, typed."""
        return self.take(self.hear(request, payload, fds, need_reply=need_reply))

    def take(self, message: Message) -> list[Step[Any]]:
        """The same for a message that was decoded before."""
        self.answers = []
        done: list[Step[Any]] = []
        steps = self.session.handle(message)
        try:
            step = next(steps)
            while True:
                if not isinstance(step, Reply):
                    done.append(step)
                if self.fail is not None and isinstance(step, self.fail[0]):
                    (_, error), self.fail = self.fail, None
                    done.pop()
                    try:
                        step = steps.throw(error)
                    finally:
                        del error  # or frame and traceback keep each other, and fds, alive
                else:
                    step = steps.send(self.carry_out(step))
        except StopIteration:
            return done
        finally:
            steps.close()

    def ask(self, request: int, payload: Any = b"", fds: tuple[OwnedFd, ...] = ()) -> Any:
        """The payload of the one answer to a message that has need_reply set."""
        self.say(request, payload, fds, need_reply=True)
        (answer,) = self.answers
        assert answer.request == request
        return answer.payload

    def carry_out(self, step: Step[Any]) -> Any:
        """Plays whoever does it; returns the result."""
        match step:
            case Reply(request, payload, fds):
                copies = [OwnedFd(os.dup(fd.fileno())) for fd in fds]
                self.answers += Decoder(REPLIES_TO_FRONT_END).feed(
                    encode_reply(request, payload), copies
                )
                for answer in self.answers:
                    answer.close()
            case Expect():
                return self.comes.pop(0)
            case StartRing(index):
                assert index not in self.running
                self.running.add(index)
            case StopRing(index):
                self.running.remove(index)
                ring = self.session.rings[index]
                return self.bases.get(index, self.session.base_of(ring))
            case MakeInflight():
                return eventfd()
            case SetBackendChannel(fd):
                if self.channel is not None:
                    self.channel.close()
                self.channel = fd.move()
        return None

    # Shorter ways to say things ----------------------------------------------------------

    def negotiate(self, features: int = FEATURES, protocol: int = PROTOCOL_FEATURES) -> None:
        if protocol:
            self.say(R.SET_PROTOCOL_FEATURES, U64(protocol))
        self.say(R.SET_OWNER)
        self.say(R.SET_FEATURES, U64(features))

    def table(self, *regions: MemoryRegion) -> list[Step[Any]]:
        return self.say(R.SET_MEM_TABLE, MemoryTable(regions), tuple(eventfd() for _ in regions))

    def add(self, region: MemoryRegion) -> list[Step[Any]]:
        return self.say(R.ADD_MEM_REG, SingleRegion(region), (eventfd(),))

    def remove(self, region: MemoryRegion) -> list[Step[Any]]:
        return self.say(R.REM_MEM_REG, SingleRegion(region))

    def num(self, index: int = 0, num: int = 256) -> list[Step[Any]]:
        return self.say(R.SET_VRING_NUM, VringState(index, num))

    def address(self, index: int = 0, **changes: int) -> list[Step[Any]]:
        return self.say(R.SET_VRING_ADDR, ring_address(index, **changes))

    def kick(self, index: int = 0, *, poll: bool = False) -> list[Step[Any]]:
        fds = () if poll else (eventfd(),)
        return self.say(R.SET_VRING_KICK, VringFile(index, not poll), fds)

    def start(self, index: int = 0, num: int = 256) -> list[Step[Any]]:
        return [*self.num(index, num), *self.address(index), *self.kick(index)]

    def stop(self, index: int = 0) -> list[Step[Any]]:
        return self.say(R.GET_VRING_BASE, VringState(index, 0))


def ready(device: Any = None) -> Talk:
    """A session with features and memory; no ring yet."""
    talk = Talk(device)
    talk.negotiate()
    talk.table(REGION, FAR_REGION)
    return talk
