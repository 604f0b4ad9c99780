"""The codec: one table of cases drives both ends, fed whole, byte by byte and with a tail."""

import gc
import os
import socket
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.talk import eventfd, open_fds
from vhostpy.errors import ProtocolError
from vhostpy.fds import FDS_MAX, OwnedFd, receive, send
from vhostpy.payloads import (
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
from vhostpy.protocol import (
    BACK_END_TABLE,
    FLAG_NEED_REPLY,
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


@pytest.fixture(autouse=True, scope="module")
def no_garbage():
    """Files that earlier modules left in garbage would go at any time."""
    gc.collect()


@pytest.fixture(autouse=True)
def no_fd_leaks(no_garbage):
    """Fails where a test leaves another set of open files than it found."""
    before = open_fds()
    yield
    assert open_fds() == before


def pipes(count: int) -> list[OwnedFd]:
    return [eventfd() for _ in range(count)]


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
def test_message_fed_whole_is_decoded(case):
    decoder, fds = Decoder(case.direction), pipes(case.fds)
    check(case, decoder.feed(case.wire, fds), fds)
    assert decoder.idle


@pytest.mark.parametrize("case", CASES, ids=str)
def test_message_fed_byte_by_byte_is_decoded_at_its_last_byte(case):
    decoder, fds = Decoder(case.direction), pipes(case.fds)
    messages = []
    for i, byte in enumerate(case.wire):
        assert not messages
        messages = decoder.feed(bytes([byte]), fds if i == 0 else ())
    check(case, messages, fds)
    assert decoder.idle


@pytest.mark.parametrize("case", CASES, ids=str)
def test_message_with_a_tail_is_decoded_and_the_tail_is_kept(case):
    decoder, fds = Decoder(case.direction), pipes(case.fds)
    # Bytes with fds come in a read of their own: the tail is what the next one brings.
    check(case, decoder.feed(case.wire, fds), fds)
    fds = pipes(case.fds)
    assert decoder.feed(case.wire[:7], fds) == []
    assert not decoder.idle
    assert decoder.wanted == Header.LAYOUT.size - 7
    check(case, decoder.feed(case.wire[7:]), fds)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_messages_in_one_read_come_in_order_and_fds_go_to_the_last(case):
    first = Case(case.direction, *_plain(case.direction))
    decoder, fds = Decoder(case.direction), pipes(case.fds)
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


# Faults --------------------------------------------------------------------------------

ONE = encode(R.SET_LOG_FD)
NUM = encode(R.SET_VRING_NUM, VringState(0, 256))


def header(request, size, flags=VERSION) -> bytes:
    return Header(request, flags, size).pack()


FAULTS = {
    "version 0": (header(R.GET_FEATURES, 0, flags=0), 0, "version 0"),
    "version 2": (header(R.GET_FEATURES, 0, flags=2), 0, "version 2"),
    "a reserved flag": (header(R.GET_FEATURES, 0, flags=VERSION | 16), 0, "flags 0x11"),
    "a reply": (header(R.GET_FEATURES, 0, flags=VERSION | FLAG_REPLY), 0, "expected a request"),
    "4 GiB of payload": (header(R.SET_FEATURES, 0xFFFFFFFF), 0, "4294967295 bytes, expected 8"),
    "a payload where none is": (header(R.GET_FEATURES, 8), 0, "8 bytes, expected 0"),
    "a payload cut short": (header(R.SET_VRING_ADDR, 39), 0, "39 bytes, expected 40"),
    "an unknown request too large": (header(99, 4097), 0, "4097 bytes, expected 0 to 4096"),
    "an empty table cut short": (header(R.SET_MEM_TABLE, 4), 0, "4 bytes, expected 8 to 264"),
    "9 regions": (header(R.SET_MEM_TABLE, 8 + 9 * 32), 8, "296 bytes"),
    "a count beyond the bytes": (
        header(R.SET_MEM_TABLE, 40) + MemoryTable((REGION,) * 2).pack()[:40],
        2,
        "2 memory regions in 40 bytes, expected 72",
    ),
    "a count of 2**32 - 1": (
        header(R.SET_MEM_TABLE, 40) + b"\xff" * 40,
        1,
        "4294967295 memory regions, at most 8",
    ),
    "a config size that lies": (
        header(R.SET_CONFIG, 16) + bytes.fromhex("00000000 ff000000 00000000 aabbccdd"),
        0,
        "size says 255 bytes, 4 came",
    ),
    "an inflight of 22 bytes": (header(R.SET_INFLIGHT_FD, 22) + bytes(22), 1, "expected 20 or 24"),
    "an fd where none is": (NUM, 1, "SET_VRING_NUM: 1 fds, expected 0"),
    "8 fds where none is": (encode(R.GET_FEATURES), 8, "GET_FEATURES: 8 fds, expected 0"),
    "no fd where one is": (ONE, 0, "SET_LOG_FD: 0 fds, expected 1"),
    "two fds for one": (ONE, 2, "SET_LOG_FD: 2 fds, expected 1"),
    "an fd in spite of bit 8": (
        encode(R.SET_VRING_KICK, VringFile(0, False)),
        1,
        "SET_VRING_KICK: 1 fds, expected 0",
    ),
    "no fd in spite of bit 8": (
        encode(R.SET_VRING_CALL, VringFile(0, True)),
        0,
        "0 fds, expected 1",
    ),
    "fewer fds than regions": (
        encode(R.SET_MEM_TABLE, MemoryTable((REGION, REGION))),
        1,
        "1 fds, expected 2",
    ),
    "more fds than regions": (encode(R.SET_MEM_TABLE, MemoryTable((REGION,))), 3, "expected 1"),
    "two fds with REM_MEM_REG": (encode(R.REM_MEM_REG, SingleRegion(REGION)), 2, "0 to 1"),
}


@pytest.mark.parametrize(("wire", "fd_count", "text"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
def test_wrong_form_is_an_error_that_says_so_and_closes_every_fd(wire, fd_count, text, bytewise):
    decoder, fds = Decoder(), pipes(fd_count)
    with pytest.raises(ProtocolError) as caught:
        if bytewise:
            for i in range(len(wire)):
                decoder.feed(wire[i : i + 1], () if i else fds)
        else:
            decoder.feed(wire, fds)
    assert text in str(caught.value)
    assert all(fd.closed for fd in fds)


def test_size_is_refused_from_the_header_before_a_byte_of_payload_is_kept():
    decoder = Decoder()
    with pytest.raises(ProtocolError, match="payload of 1048576 bytes"):
        decoder.feed(header(R.SET_MEM_TABLE, 1 << 20))


def test_an_error_also_closes_the_fds_of_messages_decoded_with_it():
    decoder, fds = Decoder(), pipes(1)
    assert decoder.feed(ONE[:5], fds) == []
    with pytest.raises(ProtocolError, match="version 0"):
        decoder.feed(ONE[5:] + bytes(12))
    assert fds[0].closed


def test_fds_that_come_with_the_payload_are_refused():
    decoder, fds = Decoder(), pipes(1)
    wire = encode(R.SET_VRING_KICK, VringFile(0, True))
    assert decoder.feed(wire[:12]) == []
    with pytest.raises(ProtocolError, match="SET_VRING_KICK: 1 fds came after its header"):
        decoder.feed(wire[12:], fds)
    assert fds[0].closed


def test_half_a_message_is_closed_with_its_fds():
    decoder, fds = Decoder(), pipes(8)
    assert decoder.feed(header(R.SET_MEM_TABLE, 264), fds) == []
    assert not decoder.idle
    decoder.close()
    assert all(fd.closed for fd in fds)
    assert decoder.idle


def test_rejected_direction_of_replies():
    with pytest.raises(ProtocolError, match="expected a reply"):
        Decoder(REPLIES_TO_FRONT_END).feed(encode(R.GET_FEATURES))


def test_need_reply_is_told():
    (message,) = Decoder().feed(encode(R.SET_FEATURES, U64(1), need_reply=True))
    assert message.need_reply
    assert encode(R.SET_FEATURES, U64(1), need_reply=True)[4] == VERSION | FLAG_NEED_REPLY


# Headers that look right, so that the fuzz gets past them.
headers = st.builds(
    header, st.integers(0, 50), st.sampled_from([0, 8, 16, 40, 4096, 4097]), st.sampled_from([1, 9])
)


@given(st.lists(st.one_of(headers, st.binary(max_size=60))).map(b"".join))
def test_any_bytes_give_what_they_encode_or_a_protocol_error(data):
    decoder = Decoder()
    messages = []
    try:
        for i in range(0, len(data), 5):
            messages += decoder.feed(data[i : i + 5])
    except ProtocolError:
        pass
    else:
        assert 0 < decoder.wanted <= 4096
    sent = b"".join(
        header(m.request, len(m.payload.pack()), 1 + 8 * m.need_reply) for m in messages
    )
    assert len(sent) <= len(data)
    for message in messages:
        assert type(message.payload).unpack(message.payload.pack()) == message.payload


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
    decoder, fds = Decoder(direction), pipes(fd_count)
    messages = decoder.feed(wire[:cut], fds) + decoder.feed(wire[cut:])
    (got,) = messages
    assert got.request == request
    assert got.need_reply == need_reply
    assert list(got.fds) == fds
    assert got.payload == (payload if kind is type(payload) else kind.unpack(payload.pack()))
    got.close()


# File descriptors ------------------------------------------------------------------------


@pytest.fixture
def pair():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with a, b:
        yield a, b


def test_fds_cross_a_socket_and_are_closed_on_exec(pair):
    here, there = pair
    with pipes(1)[0] as fd:
        assert send(here, b"abc", [fd]) == 3
        data, (got,) = receive(there, 100)
        assert data == b"abc"
        assert got.fileno() != fd.fileno()
        assert not os.get_inheritable(got.fileno())
        os.eventfd_write(got.fileno(), 7)
        assert os.eventfd_read(fd.fileno()) == 7
        got.close()


def test_more_fds_than_any_message_has_are_an_error_and_all_closed(pair):
    here, there = pair
    before = open_fds()
    fds = pipes(FDS_MAX + 1)
    send(here, b"x", fds)
    for fd in fds:
        fd.close()
    with pytest.raises(ProtocolError, match="more than 8 file descriptors"):
        receive(there, 100)
    assert open_fds() == before


def test_fds_belong_to_the_last_message_of_what_the_kernel_hands_out(pair):
    here, there = pair
    fds = pipes(1)
    send(here, NUM)
    send(here, encode(R.SET_VRING_KICK, VringFile(0, True)), fds)
    send(here, encode(R.GET_FEATURES))
    decoder = Decoder()
    messages = decoder.feed(*receive(there, 65536))
    assert [(m.request, len(m.fds)) for m in messages] == [
        (R.SET_VRING_NUM, 0),
        (R.SET_VRING_KICK, 1),
    ]
    messages += decoder.feed(*receive(there, 65536))
    assert messages[2].request == R.GET_FEATURES
    for message in messages:
        message.close()
    fds[0].close()


def test_owned_fd_has_one_owner():
    fd = pipes(1)[0]
    number = fd.fileno()
    moved = fd.move()
    assert fd.closed
    with pytest.raises(ValueError, match="taken or closed"):
        fd.fileno()
    fd.close()
    assert moved.fileno() == number
    with moved:
        os.eventfd_write(number, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.eventfd_write(number, 1)


def test_forgotten_owned_fd_is_closed():
    before = open_fds()
    pipes(3)
    assert open_fds() == before
