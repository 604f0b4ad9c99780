"""The wire: every message of vhost-user, and the codec for both ends.

One table says of each request what it carries (`payloads.py` has the layouts), how many
file descriptors come with it and what answers it. The codec checks form (size, flags,
count of fds); whether a message makes sense is for the session to say. No sockets here:
bytes and fds in, messages out.

Source: QEMU, docs/interop/vhost-user.rst; sections are named at the types.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from struct import Struct
from typing import Any, ClassVar

from vhostpy.errors import ProtocolError
from vhostpy.protocol.payloads import (
    U64,
    Config,
    DeviceState,
    Empty,
    Fixed,
    Inflight,
    Iotlb,
    Log,
    MemoryTable,
    Opaque,
    Payload,
    SharedObject,
    ShmemConfig,
    ShmemMap,
    SingleRegion,
    Unknown,
    VringAddress,
    VringArea,
    VringFile,
    VringState,
)
from vhostpy.system.fds import FDS_MAX, OwnedFd, close_all

VERSION = 1
FLAG_REPLY = 4
FLAG_NEED_REPLY = 8
VERSION_MASK = 3
FLAGS_KNOWN = VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY


class FrontEndRequest(IntEnum):
    """What a front-end asks ("Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackEndRequest(IntEnum):
    """What a back-end asks on its own channel ("Back-end message types")."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


# The table -----------------------------------------------------------------------------


class FdRule(Enum):
    """How many file descriptors come with a message."""

    NONE = "none"
    ONE = "one"
    OPTIONAL = "at most one"
    UNLESS_FLAGGED = "one, unless bit 8 of the u64 says that there is none"
    ONE_PER_REGION = "one for each memory region"
    ANY = "any"

    def bounds(self, payload: Any) -> tuple[int, int]:
        """The least and the most for this payload."""
        match self:
            case FdRule.ONE:
                return 1, 1
            case FdRule.OPTIONAL:
                return 0, 1
            case FdRule.UNLESS_FLAGGED:
                return int(payload.has_fd), int(payload.has_fd)
            case FdRule.ONE_PER_REGION:
                return len(payload.regions), len(payload.regions)
            case FdRule.ANY:
                return 0, FDS_MAX
        return 0, 0


@dataclass(frozen=True, slots=True)
class MessageType:
    """What a request carries, and what answers it."""

    payloads: tuple[type[Payload], ...] = (Empty,)  # told apart by size
    fds: FdRule = FdRule.NONE
    # What answers it, whether or not a reply is asked for. Empty: only REPLY_ACK's u64.
    replies: tuple[type[Payload], ...] = ()
    # What answers it in some states only.
    replies_at_times: tuple[type[Payload], ...] = ()
    reply_fds: FdRule = FdRule.NONE
    # The answer that says no, where the document has one.
    refusal: Payload | None = None
    # What a back-end has to offer for it, where that is not here; in words.
    needs: str = ""


_R, _B = FrontEndRequest, BackEndRequest

FRONT_END_TABLE: dict[int, MessageType] = {
    _R.GET_FEATURES: MessageType(replies=(U64,)),
    _R.SET_FEATURES: MessageType((U64,)),
    _R.SET_OWNER: MessageType(),
    _R.RESET_OWNER: MessageType(),
    # Answered with regions in postcopy.
    _R.SET_MEM_TABLE: MessageType(
        (MemoryTable,), FdRule.ONE_PER_REGION, replies_at_times=(MemoryTable,)
    ),
    # Without LOG_SHMFD an address of the front-end's, which is of no use to us; with it
    # answered always.
    _R.SET_LOG_BASE: MessageType((Log, U64), FdRule.OPTIONAL, replies_at_times=(Empty,)),
    _R.SET_LOG_FD: MessageType(fds=FdRule.ONE),
    _R.SET_VRING_NUM: MessageType((VringState,)),
    _R.SET_VRING_ADDR: MessageType((VringAddress,)),
    _R.SET_VRING_BASE: MessageType((VringState,)),
    _R.GET_VRING_BASE: MessageType((VringState,), replies=(VringState,)),
    _R.SET_VRING_KICK: MessageType((VringFile,), FdRule.UNLESS_FLAGGED),
    _R.SET_VRING_CALL: MessageType((VringFile,), FdRule.UNLESS_FLAGGED),
    _R.SET_VRING_ERR: MessageType((VringFile,), FdRule.UNLESS_FLAGGED),
    _R.GET_PROTOCOL_FEATURES: MessageType(replies=(U64,)),
    _R.SET_PROTOCOL_FEATURES: MessageType((U64,)),
    _R.GET_QUEUE_NUM: MessageType(replies=(U64,)),
    _R.SET_VRING_ENABLE: MessageType((VringState,)),
    _R.SEND_RARP: MessageType((U64,)),
    _R.NET_SET_MTU: MessageType((U64,)),
    _R.SET_BACKEND_REQ_FD: MessageType(fds=FdRule.ONE),
    _R.IOTLB_MSG: MessageType(
        (Iotlb,), replies=(U64,), refusal=U64(1), needs="feature ACCESS_PLATFORM"
    ),
    _R.SET_VRING_ENDIAN: MessageType((VringState,), needs="protocol feature CROSS_ENDIAN"),
    _R.GET_CONFIG: MessageType((Config,), replies=(Config, Empty), refusal=Empty()),
    _R.SET_CONFIG: MessageType((Config,)),
    _R.CREATE_CRYPTO_SESSION: MessageType(
        (Opaque,), replies=(Opaque,), needs="protocol feature CRYPTO_SESSION"
    ),
    _R.CLOSE_CRYPTO_SESSION: MessageType((U64,), needs="protocol feature CRYPTO_SESSION"),
    # A reply without the fd says no.
    _R.POSTCOPY_ADVISE: MessageType(
        replies=(Empty,),
        reply_fds=FdRule.OPTIONAL,
        refusal=Empty(),
        needs="protocol feature PAGEFAULT",
    ),
    _R.POSTCOPY_LISTEN: MessageType(needs="protocol feature PAGEFAULT"),
    _R.POSTCOPY_END: MessageType(
        replies=(U64,), refusal=U64(1), needs="protocol feature PAGEFAULT"
    ),
    # QEMU takes a size of 0 for 'none'.
    _R.GET_INFLIGHT_FD: MessageType(
        (Inflight,),
        replies=(Inflight,),
        reply_fds=FdRule.OPTIONAL,
        refusal=Inflight(0, 0, 0, 0),
    ),
    _R.SET_INFLIGHT_FD: MessageType((Inflight,), FdRule.ONE),
    _R.GPU_SET_SOCKET: MessageType(fds=FdRule.ONE, needs="a graphics device"),
    _R.RESET_DEVICE: MessageType(),
    _R.VRING_KICK: MessageType((VringState,), needs="protocol feature INBAND_NOTIFICATIONS"),
    _R.GET_MAX_MEM_SLOTS: MessageType(replies=(U64,)),
    _R.ADD_MEM_REG: MessageType((SingleRegion,), FdRule.ONE, replies_at_times=(SingleRegion,)),
    # None SHOULD come; some front-ends send one, which MUST be closed.
    _R.REM_MEM_REG: MessageType((SingleRegion,), FdRule.OPTIONAL),
    _R.SET_STATUS: MessageType((U64,)),
    _R.GET_STATUS: MessageType(replies=(U64,)),
    _R.GET_SHARED_OBJECT: MessageType(
        (SharedObject,),
        replies=(Empty,),
        reply_fds=FdRule.OPTIONAL,
        refusal=Empty(),
        needs="protocol feature SHARED_OBJECT",
    ),
    # Bits 0-7 not zero: an error; bit 8: no fd.
    _R.SET_DEVICE_STATE_FD: MessageType(
        (DeviceState,),
        FdRule.ONE,
        replies=(U64,),
        reply_fds=FdRule.OPTIONAL,
        refusal=U64(0x101),
        needs="protocol feature DEVICE_STATE",
    ),
    _R.CHECK_DEVICE_STATE: MessageType(
        replies=(U64,), refusal=U64(1), needs="protocol feature DEVICE_STATE"
    ),
    _R.GET_SHMEM_CONFIG: MessageType(
        replies=(ShmemConfig,), refusal=ShmemConfig(()), needs="protocol feature SHMEM"
    ),
    _R.GET_VRING_BASE_SKIP_DRAIN: MessageType(
        (VringState,), replies=(VringState,), needs="protocol feature GET_VRING_BASE_SKIP_DRAIN"
    ),
}

BACK_END_TABLE: dict[int, MessageType] = {
    _B.IOTLB_MSG: MessageType((Iotlb,)),
    _B.CONFIG_CHANGE_MSG: MessageType(),
    _B.VRING_HOST_NOTIFIER_MSG: MessageType((VringArea,), FdRule.OPTIONAL),
    _B.VRING_CALL: MessageType((VringState,)),
    _B.VRING_ERR: MessageType((VringState,)),
    _B.SHARED_OBJECT_ADD: MessageType((SharedObject,)),
    _B.SHARED_OBJECT_REMOVE: MessageType((SharedObject,)),
    _B.SHARED_OBJECT_LOOKUP: MessageType(
        (SharedObject,), replies=(U64,), reply_fds=FdRule.OPTIONAL, refusal=U64(1)
    ),
    _B.SHMEM_MAP: MessageType((ShmemMap,), FdRule.ONE),
    _B.SHMEM_UNMAP: MessageType((ShmemMap,)),
}

UNKNOWN = MessageType((Unknown,), FdRule.ANY)


@dataclass(frozen=True, slots=True)
class Direction:
    """Which messages a decoder takes."""

    requests: type[IntEnum]
    table: Mapping[int, MessageType]
    is_reply: bool

    def form(self, request: int) -> tuple[tuple[type[Payload], ...], FdRule]:
        """The payloads and fds that may come with `request` this way."""
        known = self.table.get(request, UNKNOWN)
        if not self.is_reply or known is UNKNOWN:
            return known.payloads, known.fds
        return (known.replies or (U64,)) + known.replies_at_times, known.reply_fds

    def name(self, request: int) -> str:
        """The document's name, or the number."""
        try:
            return self.requests(request).name
        except ValueError:
            return f"request {request}"


REQUESTS_TO_BACK_END = Direction(FrontEndRequest, FRONT_END_TABLE, is_reply=False)
REPLIES_TO_FRONT_END = Direction(FrontEndRequest, FRONT_END_TABLE, is_reply=True)
REQUESTS_TO_FRONT_END = Direction(BackEndRequest, BACK_END_TABLE, is_reply=False)
REPLIES_TO_BACK_END = Direction(BackEndRequest, BACK_END_TABLE, is_reply=True)


# Messages ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header(Fixed):
    """Comes before every payload ("Header")."""

    LAYOUT: ClassVar = Struct("=III")
    request: int
    flags: int
    size: int  # bytes of payload


@dataclass(frozen=True, slots=True)
class Message:
    """One message with what came along. Its fds are closed with it unless moved away."""

    request: int  # a member of the direction's enum where the number is known
    payload: Any  # one of the payload types
    fds: tuple[OwnedFd, ...] = ()
    need_reply: bool = False
    is_reply: bool = False

    @property
    def name(self) -> str:
        return getattr(self.request, "name", f"request {int(self.request)}")

    def close(self) -> None:
        """Closes the fds that nobody has moved away."""
        close_all(self.fds)


def encode(
    request: int, payload: Payload | bytes = b"", *, need_reply: bool = False, reply: bool = False
) -> bytes:
    """A whole message; its fds travel beside it."""
    body = payload if isinstance(payload, bytes) else payload.pack()
    flags = VERSION | FLAG_NEED_REPLY * need_reply | FLAG_REPLY * reply
    return Header(int(request), flags, len(body)).pack() + body


def encode_reply(request: int, payload: Payload | bytes = b"") -> bytes:
    """An answer to `request`."""
    return encode(request, payload, reply=True)


class Decoder:
    """Bytes and fds in, messages out; keeps at most one unfinished message."""

    def __init__(self, direction: Direction = REQUESTS_TO_BACK_END) -> None:
        self.direction = direction
        self._buffer = bytearray()
        self._header: Header | None = None
        self._fds: list[OwnedFd] = []
        self._expected: tuple[int, type[Payload]] | None = None

    def expect(self, request: int, payload: type[Payload]) -> None:
        """The next message must be `request`, with such a payload and no fds."""
        self._expected = request, payload

    @property
    def wanted(self) -> int:
        """Bytes that the message under way still lacks before something can be decided.

        A caller that reads no more than that knows that fds belong to this message.
        """
        expected = Header.LAYOUT.size if self._header is None else self._header.size
        return expected - len(self._buffer)

    @property
    def idle(self) -> bool:
        """Between two messages."""
        return self._header is None and not self._buffer and not self._fds

    def feed(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> list[Message]:
        """The messages that are complete now, in order.

        `fds` came with `data`. The kernel hands out bytes without fds together with the next
        ones that have some, and stops there: so they belong to the last message that begins
        in `data`. A caller that reads `wanted` bytes at a time feeds one message's at most.
        Raises ProtocolError where the form is wrong: all fds in hand are closed then, and
        the stream has no meaning any more.
        """
        pending = list(fds)
        begun_before = self._header is not None
        messages: list[Message] = []
        try:
            self._buffer += data
            while True:
                if self._header is None and len(self._buffer) >= Header.LAYOUT.size:
                    self._header = self._take_header()
                if pending and (self._header is None or self.wanted >= 0):
                    if begun_before:
                        raise ProtocolError(
                            f"{self._name()}: {len(pending)} fds came after its header"
                        )
                    self._fds += pending
                    pending = []
                if self._header is None or self.wanted > 0:
                    return messages
                messages.append(self._take_message(self._header))
                begun_before = False
        except BaseException:
            self.close()
            close_all(pending)
            for message in messages:
                message.close()
            raise

    def close(self) -> None:
        """Closes the fds of an unfinished message and forgets it."""
        close_all(self._fds)
        self._fds.clear()
        self._buffer.clear()
        self._header = None

    # Private ---------------------------------------------------------------------------

    def _name(self) -> str:
        return self.direction.name(self._header.request) if self._header else "message"

    def _form(self, request: int) -> tuple[tuple[type[Payload], ...], FdRule]:
        if self._expected is None:
            return self.direction.form(request)
        return (self._expected[1],), FdRule.NONE

    def _take_header(self) -> Header:
        size = Header.LAYOUT.size
        header = Header.unpack(bytes(self._buffer[:size]))
        del self._buffer[:size]
        name = self.direction.name(header.request)
        if header.flags & VERSION_MASK != VERSION or header.flags & ~FLAGS_KNOWN:
            raise ProtocolError(
                f"{name}: flags {header.flags:#x}: version {header.flags & VERSION_MASK}, "
                f"expected version {VERSION} and no bits beyond {FLAGS_KNOWN:#x}",
                "see whether the other end speaks vhost-user",
            )
        if bool(header.flags & FLAG_REPLY) != self.direction.is_reply:
            expected = "a reply" if self.direction.is_reply else "a request"
            raise ProtocolError(f"{name}: flags {header.flags:#x}, expected {expected}")
        if self._expected is not None and header.request != self._expected[0]:
            raise ProtocolError(f"{name} came, expected {self.direction.name(self._expected[0])}")
        payloads, _ = self._form(header.request)
        sizes = [payload.sizes() for payload in payloads]
        if not any(least <= header.size <= most for least, most in sizes):
            bounds = " or ".join(str(a) if a == b else f"{a} to {b}" for a, b in sizes)
            raise ProtocolError(f"{name}: payload of {header.size} bytes, expected {bounds}")
        return header

    def _take_message(self, header: Header) -> Message:
        name = self._name()
        body = bytes(self._buffer[: header.size])
        payloads, rule = self._form(header.request)
        kind = next(p for p in payloads if p.sizes()[0] <= header.size <= p.sizes()[1])
        try:
            payload = kind.unpack(body)
        except ProtocolError as error:
            raise ProtocolError(f"{name}: {error}", error.hint) from None
        least, most = rule.bounds(payload)
        if not least <= len(self._fds) <= most:
            expected = f"{least}" if least == most else f"{least} to {most}"
            raise ProtocolError(f"{name}: {len(self._fds)} fds, expected {expected}")
        known = header.request in self.direction.table
        request = self.direction.requests(header.request) if known else header.request
        message = Message(
            request,
            payload,
            tuple(self._fds),
            need_reply=bool(header.flags & FLAG_NEED_REPLY),
            is_reply=self.direction.is_reply,
        )
        del self._buffer[: header.size]
        self._fds.clear()
        self._header = self._expected = None
        return message
