"""Config space, status, reset, and what only network devices are told."""

import pytest

from tests.talk import FAR_REGION, FEATURES, REGION
from vhostpy.errors import ProtocolError
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.payloads import U64, Config, Empty, VringState
from vhostpy.session.ring import RingState
from vhostpy.session.steps import SendRarp, SetMtu, StartRing, StopRing, WriteConfig


def test_config_is_padded_to_what_was_asked(talk):
    got = talk.ask(R.GET_CONFIG, Config(0, 0, bytes(256)))
    assert got == Config(0, 0, bytes(range(1, 61)) + bytes(196))
    assert talk.ask(R.GET_CONFIG, Config(58, 1, bytes(4))) == Config(58, 1, b"\x3b\x3c\0\0")
    assert talk.ask(R.GET_CONFIG, Config(252, 0, bytes(4))) == Config(252, 0, bytes(4))


@pytest.mark.parametrize(
    "asked", [Config(0, 0, b""), Config(1, 0, bytes(256)), Config((1 << 32) - 1, 0, bytes(8))]
)
def test_config_beyond_its_space_is_answered_with_nothing(talk, asked):
    assert talk.ask(R.GET_CONFIG, asked) == Empty()
    assert talk.ask(R.SET_OWNER) == U64(0)


def test_config_is_written_by_the_guest_and_by_a_migration(talk):
    for flags in (0, 1):
        assert talk.say(R.SET_CONFIG, Config(56, flags, b"abcd")) == [WriteConfig(56, b"abcd")]


@pytest.mark.parametrize(
    "config", [Config(57, 0, b"abcd"), Config((1 << 32) - 2, 0, b"abcd"), Config(0, 0, b"")]
)
def test_config_beyond_the_devices_is_not_written(talk, config):
    assert talk.ask(R.SET_CONFIG, config) == U64(1)


def test_config_with_unknown_flags_ends_the_session(talk):
    with pytest.raises(ProtocolError, match="flags 0x2"):
        talk.say(R.SET_CONFIG, Config(0, 2, b"a"))


def test_mtu_within_virtios_bounds_is_passed_on(talk):
    for mtu in (68, 9000, 65535):
        assert talk.say(R.NET_SET_MTU, U64(mtu)) == [SetMtu(mtu)]
    for mtu in (0, 67, 65536, 1 << 40):
        assert talk.ask(R.NET_SET_MTU, U64(mtu)) == U64(1)


def test_rarp_takes_the_first_six_bytes_as_mac(talk):
    value = int.from_bytes(bytes.fromhex("525400123456") + b"\xff\xff", "little")
    assert talk.say(R.SEND_RARP, U64(value)) == [SendRarp(bytes.fromhex("525400123456"))]


def test_status_is_kept_for_who_asks(talk):
    assert talk.say(R.SET_STATUS, U64(15)) == []
    assert talk.ask(R.GET_STATUS) == U64(15)
    with pytest.raises(ProtocolError, match="8 bits"):
        talk.say(R.SET_STATUS, U64(256))


def test_reset_stops_all_rings_and_keeps_the_memory(talk):
    talk.start(0)
    talk.start(1)
    talk.bases[0] = 5
    talk.num(2)
    talk.kick(2)
    talk.say(R.SET_VRING_ENABLE, VringState(3, 1))
    talk.say(R.SET_STATUS, U64(15))
    assert talk.say(R.RESET_DEVICE) == [StopRing(0), StopRing(1)]
    for ring in talk.session.rings[:4]:
        assert (ring.state, ring.enabled) == (RingState.STOPPED, False)
        assert (ring.num, ring.base, ring.desc_uva, ring.kick) == (0, None, None, None)
    assert talk.session.regions == [REGION, FAR_REGION]
    assert talk.ask(R.GET_STATUS) == U64(0)
    assert talk.start() == []
    assert talk.say(R.SET_FEATURES, U64(FEATURES))[-1] == StartRing(0)
