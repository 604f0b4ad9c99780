"""Messages of the wrong form: an error that says so, and no file left open."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.talk import eventfds
from vhostpy.errors import ProtocolError
from vhostpy.protocol.codec import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    REPLIES_TO_FRONT_END,
    VERSION,
    Decoder,
    FrontEndRequest,
    Header,
    encode,
)
from vhostpy.protocol.payloads import (
    U64,
    MemoryRegion,
    MemoryTable,
    SingleRegion,
    VringFile,
    VringState,
)

R = FrontEndRequest
REGION = MemoryRegion(0x1000, 0x2000, 0x7F0000001000, 0x3000)
pytestmark = pytest.mark.usefixtures("no_fd_leaks")

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
    "a table with room for half a region": (
        header(R.SET_MEM_TABLE, 56) + MemoryTable((REGION,)).pack() + bytes(16),
        1,
        "1 memory regions in 56 bytes, expected 40, or room for more regions",
    ),
    "a table with room for 9 regions": (
        header(R.SET_MEM_TABLE, 8 + 9 * 32) + MemoryTable((REGION,)).pack() + bytes(256),
        1,
        "payload of 296 bytes",
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
    decoder, fds = Decoder(), eventfds(fd_count)
    with pytest.raises(ProtocolError) as caught:
        if bytewise:
            for i in range(len(wire)):
                decoder.feed(wire[i : i + 1], () if i else fds)
        else:
            decoder.feed(wire, fds)
    assert text in str(caught.value)
    assert all(fd.closed for fd in fds)


@pytest.mark.parametrize("room", [2, 8])
@pytest.mark.parametrize("count", [0, 1])
def test_a_table_may_have_room_for_more_regions_than_it_names(count, room):
    """User-mode Linux sends two places and fills one; what is left in the other is nothing."""
    regions = (REGION,) * count
    wire = header(R.SET_MEM_TABLE, 8 + 32 * room) + MemoryTable(regions).pack()
    fds = eventfds(count)
    (message,) = Decoder().feed(wire + b"\xa5" * 32 * (room - count), fds)
    assert message.payload == MemoryTable(regions)
    assert len(message.fds) == count
    message.close()


def test_size_is_refused_from_the_header_before_a_byte_of_payload_is_kept():
    decoder = Decoder()
    with pytest.raises(ProtocolError, match="payload of 1048576 bytes"):
        decoder.feed(header(R.SET_MEM_TABLE, 1 << 20))


def test_an_error_also_closes_the_fds_of_messages_decoded_with_it():
    decoder, fds = Decoder(), eventfds(1)
    assert decoder.feed(ONE[:5], fds) == []
    with pytest.raises(ProtocolError, match="version 0"):
        decoder.feed(ONE[5:] + bytes(12))
    assert fds[0].closed


def test_fds_that_come_with_the_payload_are_refused():
    decoder, fds = Decoder(), eventfds(1)
    wire = encode(R.SET_VRING_KICK, VringFile(0, True))
    assert decoder.feed(wire[:12]) == []
    with pytest.raises(ProtocolError, match="SET_VRING_KICK: 1 fds came after its header"):
        decoder.feed(wire[12:], fds)
    assert fds[0].closed


def test_half_a_message_is_closed_with_its_fds():
    decoder, fds = Decoder(), eventfds(8)
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
