"""The codec: one table of cases drives both ends, however the bytes are cut."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.talk import eventfds
from vhostpy.protocol.codec import (
    BACK_END_TABLE,
    FLAG_REPLY,
    FRONT_END_TABLE,
    REPLIES_TO_BACK_END,
    REPLIES_TO_FRONT_END,
    REQUESTS_TO_BACK_END,
    REQUESTS_TO_FRONT_END,
    VERSION,
    BackEndRequest,
    Decoder,
    Direction,
    FrontEndRequest,
    Header,
    encode,
)
from vhostpy.protocol.payloads import (
    U64,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    Opaque,
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

R, B = FrontEndRequest, BackEndRequest
REGION = MemoryRegion(0x1000, 0x2000, 0x7F0000001000, 0x3000)


@dataclass(frozen=True)
class Case:
    """A message as it looks on the wire: `body` is the payload's bytes, least byte first."""

    direction: Direction
    request: int
    payload: object
    body: str  # hexadecimal
    fds: int = 0

    def __str__(self) -> str:
        kind = "reply" if self.direction.is_reply else "request"
        return f"{self.direction.name(self.request)}-{kind}-{type(self.payload).__name__}"

    @property
    def wire(self) -> bytes:
        body = bytes.fromhex(self.body)
        flags = VERSION | FLAG_REPLY * self.direction.is_reply
        header = b"".join(n.to_bytes(4, "little") for n in (int(self.request), flags, len(body)))
        return header + body


def _requests(request, payload=None, body="", fds=0):
    payload = Empty() if payload is None else payload
    return Case(REQUESTS_TO_BACK_END, request, payload, body, fds)


def _replies(request, payload=None, body="", fds=0):
    payload = Empty() if payload is None else payload
    return Case(REPLIES_TO_FRONT_END, request, payload, body, fds)


def _back_end(request, payload=None, body="", fds=0):
    payload = Empty() if payload is None else payload
    return Case(REQUESTS_TO_FRONT_END, request, payload, body, fds)


U = U64(0x0807060504030201), "01 02 03 04 05 06 07 08"
ACK = U64(0), "00" * 8
STATE = VringState(3, 256), "03 00 00 00 00 01 00 00"
REGION_BYTES = (
    "00 10 00 00 00 00 00 00  00 20 00 00 00 00 00 00"
    "00 10 00 00 00 7f 00 00  00 30 00 00 00 00 00 00"
)
ADDRESS = (
    VringAddress(1, 1, 0x10, 0x20, 0x30, 0x40),
    "01 00 00 00 01 00 00 00"
    "10 00 00 00 00 00 00 00  20 00 00 00 00 00 00 00"
    "30 00 00 00 00 00 00 00  40 00 00 00 00 00 00 00",
)
TABLE = MemoryTable((REGION, REGION)), "02 00 00 00 00 00 00 00" + 2 * REGION_BYTES
SINGLE = SingleRegion(REGION), "00" * 8 + REGION_BYTES
IOTLB = (
    Iotlb(0x1000, 0x2000, 0x3000, 3, 2),
    "00 10 00 00 00 00 00 00  00 20 00 00 00 00 00 00  00 30 00 00 00 00 00 00"
    "03 02 00 00 00 00 00 00",
)
CONFIG = Config(4, 1, b"\xaa\xbb"), "04 00 00 00  02 00 00 00  01 00 00 00  aa bb"
INFLIGHT = (
    Inflight(0x1000, 0x10, 2, 128),
    "00 10 00 00 00 00 00 00  10 00 00 00 00 00 00 00  02 00 80 00  00 00 00 00",
)
LOG = Log(0x100, 0x20), "00 01 00 00 00 00 00 00  20 00 00 00 00 00 00 00"
UUID = SharedObject(bytes(range(16))), bytes(range(16)).hex()
SHMEM = (
    ShmemMap(7, 0x10, 0x20, 0x30, 1),
    "07 00 00 00 00 00 00 00  10 00 00 00 00 00 00 00  20 00 00 00 00 00 00 00"
    "30 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00",
)

CASES = [
    _requests(R.GET_FEATURES),
    _replies(R.GET_FEATURES, *U),
    _requests(R.SET_FEATURES, *U),
    _replies(R.SET_FEATURES, *ACK),
    _requests(R.SET_OWNER),
    _requests(R.RESET_OWNER),
    _requests(R.SET_MEM_TABLE, *TABLE, fds=2),
    _requests(R.SET_MEM_TABLE, MemoryTable(()), "00" * 8),
    _replies(R.SET_MEM_TABLE, *TABLE),
    _replies(R.SET_MEM_TABLE, *ACK),
    _requests(R.SET_LOG_BASE, *LOG, fds=1),
    _requests(R.SET_LOG_BASE, *U),
    _replies(R.SET_LOG_BASE),
    _replies(R.SET_LOG_BASE, *ACK),
    _requests(R.SET_LOG_FD, fds=1),
    _requests(R.SET_VRING_NUM, *STATE),
    _requests(R.SET_VRING_ADDR, *ADDRESS),
    _requests(R.SET_VRING_BASE, *STATE),
    _requests(R.GET_VRING_BASE, *STATE),
    _replies(R.GET_VRING_BASE, *STATE),
    _requests(R.SET_VRING_KICK, VringFile(2, True), "02 00 00 00 00 00 00 00", fds=1),
    _requests(R.SET_VRING_KICK, VringFile(2, False), "02 01 00 00 00 00 00 00"),
    _requests(R.SET_VRING_CALL, VringFile(0, True), "00 00 00 00 00 00 00 00", fds=1),
    _requests(R.SET_VRING_CALL, VringFile(0x200, False), "00 03 00 00 00 00 00 00"),
    _requests(R.SET_VRING_ERR, VringFile(255, True), "ff 00 00 00 00 00 00 00", fds=1),
    _requests(R.SET_VRING_ERR, VringFile(255, False), "ff 01 00 00 00 00 00 00"),
    _requests(R.GET_PROTOCOL_FEATURES),
    _replies(R.GET_PROTOCOL_FEATURES, *U),
    _requests(R.SET_PROTOCOL_FEATURES, *U),
    _requests(R.GET_QUEUE_NUM),
    _replies(R.GET_QUEUE_NUM, *U),
    _requests(R.SET_VRING_ENABLE, *STATE),
    _requests(R.SEND_RARP, *U),
    _requests(R.NET_SET_MTU, *U),
    _requests(R.SET_BACKEND_REQ_FD, fds=1),
    _requests(R.IOTLB_MSG, *IOTLB),
    _replies(R.IOTLB_MSG, *ACK),
    _requests(R.SET_VRING_ENDIAN, *STATE),
    _requests(R.GET_CONFIG, *CONFIG),
    _replies(R.GET_CONFIG, *CONFIG),
    _replies(R.GET_CONFIG),
    _requests(R.SET_CONFIG, *CONFIG),
    _requests(R.CREATE_CRYPTO_SESSION, Opaque(b"abc"), "61 62 63"),
    _replies(R.CREATE_CRYPTO_SESSION, Opaque(b"abc"), "61 62 63"),
    _requests(R.CLOSE_CRYPTO_SESSION, *U),
    _requests(R.POSTCOPY_ADVISE),
    _replies(R.POSTCOPY_ADVISE, fds=1),
    _requests(R.POSTCOPY_LISTEN),
    _requests(R.POSTCOPY_END),
    _replies(R.POSTCOPY_END, *ACK),
    _requests(R.GET_INFLIGHT_FD, *INFLIGHT),
    _replies(R.GET_INFLIGHT_FD, *INFLIGHT, fds=1),
    _requests(R.SET_INFLIGHT_FD, *INFLIGHT, fds=1),
    _requests(R.GPU_SET_SOCKET, fds=1),
    _requests(R.RESET_DEVICE),
    _requests(R.VRING_KICK, *STATE),
    _requests(R.GET_MAX_MEM_SLOTS),
    _replies(R.GET_MAX_MEM_SLOTS, *U),
    _requests(R.ADD_MEM_REG, *SINGLE, fds=1),
    _replies(R.ADD_MEM_REG, *SINGLE),
    _requests(R.REM_MEM_REG, *SINGLE),
    _requests(R.REM_MEM_REG, *SINGLE, fds=1),
    _requests(R.SET_STATUS, *U),
    _requests(R.GET_STATUS),
    _replies(R.GET_STATUS, *U),
    _requests(R.GET_SHARED_OBJECT, *UUID),
    _replies(R.GET_SHARED_OBJECT, fds=1),
    _requests(R.SET_DEVICE_STATE_FD, DeviceState(1, 0), "01 00 00 00 00 00 00 00", fds=1),
    _replies(R.SET_DEVICE_STATE_FD, *U, fds=1),
    _requests(R.CHECK_DEVICE_STATE),
    _replies(R.CHECK_DEVICE_STATE, *ACK),
    _requests(R.GET_SHMEM_CONFIG),
    _replies(
        R.GET_SHMEM_CONFIG, ShmemConfig((0x1000,)), "01 00 00 00 00 00 00 00  00 10" + "00" * 6
    ),
    _requests(R.GET_VRING_BASE_SKIP_DRAIN, *STATE),
    _replies(R.GET_VRING_BASE_SKIP_DRAIN, *STATE),
    _requests(46, Unknown(b"xyz"), "78 79 7a", fds=2),
    _back_end(B.IOTLB_MSG, *IOTLB),
    _back_end(B.CONFIG_CHANGE_MSG),
    _back_end(
        B.VRING_HOST_NOTIFIER_MSG,
        VringArea(1, 2, 3),
        "01" + "00" * 7 + "02" + "00" * 7 + "03" + "00" * 7,
        fds=1,
    ),
    _back_end(B.VRING_CALL, *STATE),
    _back_end(B.VRING_ERR, *STATE),
    _back_end(B.SHARED_OBJECT_ADD, *UUID),
    _back_end(B.SHARED_OBJECT_REMOVE, *UUID),
    _back_end(B.SHARED_OBJECT_LOOKUP, *UUID),
    Case(REPLIES_TO_BACK_END, B.SHARED_OBJECT_LOOKUP, *ACK, fds=1),
    _back_end(B.SHMEM_MAP, *SHMEM, fds=1),
    _back_end(B.SHMEM_UNMAP, *SHMEM),
]


pytestmark = pytest.mark.usefixtures("no_fd_leaks")


def check(case: Case, messages, fds) -> None:
    (message,) = messages
    assert (message.request, message.payload) == (case.request, case.payload)
    assert type(message.payload) is type(case.payload)
    assert message.is_reply == case.direction.is_reply
    assert list(message.fds) == fds
    assert not any(fd.closed for fd in fds)
    message.close()
    assert all(fd.closed for fd in fds)


def test_the_table_of_cases_has_every_message_of_the_document():
    covered = {(c.direction.requests, int(c.request)) for c in CASES if not c.direction.is_reply}
    assert covered >= {(R, n) for n in range(1, 46)} | {(B, n) for n in range(1, 11)}
    assert set(FRONT_END_TABLE) == set(R)
    assert set(BACK_END_TABLE) == set(B)
    answered = {int(c.request) for c in CASES if c.direction is REPLIES_TO_FRONT_END}
    assert answered >= {int(r) for r in R if FRONT_END_TABLE[r].replies}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_message_is_encoded_as_the_document_lays_it_out(case):
    assert encode(case.request, case.payload, reply=case.direction.is_reply) == case.wire


@pytest.mark.parametrize("case", CASES, ids=str)
def test_message_is_decoded_at_its_last_byte_however_it_is_cut(case):
    decoder, fds = Decoder(case.direction), eventfds(case.fds)
    check(case, decoder.feed(case.wire, fds), fds)
    assert decoder.idle
    fds, messages = eventfds(case.fds), []
    for i, byte in enumerate(case.wire):
        assert not messages
        messages = decoder.feed(bytes([byte]), fds if i == 0 else ())
    check(case, messages, fds)
    assert decoder.idle
    # With a tail. Bytes with fds come in a read of their own: the tail is what the next brings.
    fds = eventfds(case.fds)
    assert decoder.feed(case.wire[:7], fds) == []
    assert not decoder.idle
    assert decoder.wanted == Header.LAYOUT.size - 7
    check(case, decoder.feed(case.wire[7:]), fds)
    # Behind others in one read: they come in order, and fds go to the last.
    first, fds = Case(case.direction, *_plain(case.direction)), eventfds(case.fds)
    messages = decoder.feed(first.wire + first.wire + case.wire, fds)
    assert [m.request for m in messages] == [first.request, first.request, case.request]
    assert [len(m.fds) for m in messages] == [0, 0, case.fds]
    check(case, messages[2:], fds)


def _plain(direction: Direction):
    request = R.SET_FEATURES if direction.requests is R else B.VRING_CALL
    return (request, *(STATE if request == B.VRING_CALL and not direction.is_reply else U))


def test_wanted_never_passes_the_end_of_a_message():
    decoder = Decoder()
    wire = encode(R.SET_VRING_NUM, VringState(0, 256)) + encode(R.GET_FEATURES)
    sizes, messages = [], []
    while wire:
        sizes.append(decoder.wanted)
        messages += decoder.feed(wire[: sizes[-1]])
        wire = wire[sizes[-1] :]
    assert sizes == [12, 8, 12]
    assert [m.request for m in messages] == [R.SET_VRING_NUM, R.GET_FEATURES]


# decode(encode(x)) == x ------------------------------------------------------------------

u8, u16, u32, u64 = (st.integers(0, 2**n - 1) for n in (8, 16, 32, 64))
regions = st.builds(MemoryRegion, u64, u64, u64, u64)
PAYLOADS = {
    Empty: st.builds(Empty),
    U64: st.builds(U64, u64),
    VringState: st.builds(VringState, u32, u32),
    VringAddress: st.builds(VringAddress, u32, u32, u64, u64, u64, u64),
    VringFile: st.builds(VringFile, u64.map(lambda n: n & ~VringFile.NO_FD), st.booleans()),
    MemoryTable: st.builds(MemoryTable, st.lists(regions, max_size=8).map(tuple)),
    SingleRegion: st.builds(SingleRegion, regions),
    Log: st.builds(Log, u64, u64),
    Iotlb: st.builds(Iotlb, u64, u64, u64, u8, u8),
    Config: st.builds(Config, u32, u32, st.binary(max_size=256)),
    VringArea: st.builds(VringArea, u64, u64, u64),
    Inflight: st.builds(Inflight, u64, u64, u16, u16),
    SharedObject: st.builds(SharedObject, st.binary(min_size=16, max_size=16)),
    DeviceState: st.builds(DeviceState, u32, u32),
    ShmemMap: st.builds(ShmemMap, u8, u64, u64, u64, u64),
    ShmemConfig: st.builds(ShmemConfig, st.lists(u64, max_size=256).map(tuple)),
    Opaque: st.builds(Opaque, st.binary(max_size=4096)),
}


@st.composite
def wires(draw):
    direction = draw(
        st.sampled_from(
            [REQUESTS_TO_BACK_END, REPLIES_TO_FRONT_END, REQUESTS_TO_FRONT_END, REPLIES_TO_BACK_END]
        )
    )
    request = draw(st.sampled_from(list(direction.requests)))
    payloads, rule = direction.form(request)
    payload = draw(st.one_of([PAYLOADS[kind] for kind in payloads]))
    need_reply = draw(st.booleans()) and not direction.is_reply
    return direction, request, payload, rule.bounds(payload)[0], need_reply


@given(wires(), st.data())
def test_what_is_encoded_decodes_to_the_same_however_it_is_cut(message, data):
    direction, request, payload, fd_count, need_reply = message
    # Told apart by size: a table of no regions is as long as an ack.
    payloads, _ = direction.form(request)
    size = len(payload.pack())
    kind = next(p for p in payloads if p.sizes()[0] <= size <= p.sizes()[1])
    wire = encode(request, payload, need_reply=need_reply, reply=direction.is_reply)
    cut = data.draw(st.integers(0, len(wire)))
    decoder, fds = Decoder(direction), eventfds(fd_count)
    messages = decoder.feed(wire[:cut], fds) + decoder.feed(wire[cut:])
    (got,) = messages
    assert got.request == request
    assert got.need_reply == need_reply
    assert list(got.fds) == fds
    assert got.payload == (payload if kind is type(payload) else kind.unpack(payload.pack()))
    got.close()
