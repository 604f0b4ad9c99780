"""A net device as its front-end sees it: features, header, MTU, config space."""

import pytest

from tests.backends.netguest import LEGACY, MODERN, MRG_RXBUF, VERSION_1, device
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.errors import ConfigError, ProtocolError, Refused


def test_no_offload_is_offered():
    features = device().features()
    for name in Feature:
        if "CSUM" in name.name or "TSO" in name.name or "UFO" in name.name or "ECN" in name.name:
            assert not features >> name & 1
    for name in ("VERSION_1", "NET_MRG_RXBUF", "NET_MQ", "LOG_ALL", "PROTOCOL_FEATURES"):
        assert features >> Feature[name] & 1


def test_all_forms_of_a_ring_are_offered_but_no_reset():
    """QEMU shows RING_RESET to its guest, but tells us of no reset."""
    features = device().features()
    for name in ("INDIRECT_DESC", "EVENT_IDX", "RING_PACKED", "IN_ORDER"):
        assert features >> Feature[name] & 1
    assert not features >> Feature.RING_RESET & 1


def test_announcing_and_the_mtu_are_offered():
    offered = device().protocol_features()
    assert offered >> ProtocolFeature.RARP & 1
    assert offered >> ProtocolFeature.MTU & 1


@pytest.mark.parametrize(
    ("features", "size", "mergeable"),
    [(MODERN, 12, True), (VERSION_1, 12, False), (LEGACY, 10, False), (MRG_RXBUF, 12, True)],
)
def test_the_header_is_what_was_negotiated(features, size, mergeable):
    d = device()
    d.negotiated(features)
    assert (d.status()["header_size_bytes"], d.status()["mergeable"]) == (size, mergeable)


def test_an_mtu_above_the_ceiling_is_refused_with_both_values():
    d = device(mtu_limit=1500)
    d.set_mtu(1500)
    with pytest.raises(Refused, match=r"9000.*1500"):
        d.set_mtu(9000)
    assert d.status()["mtu"] == 1500
    device().set_mtu(9000)


@pytest.mark.parametrize("pairs", [0, 129])
def test_a_senseless_number_of_pairs_is_refused(pairs):
    with pytest.raises(ConfigError):
        device(pairs)


def test_the_config_space_is_the_front_ends():
    assert device().config() == b""
    with pytest.raises(ProtocolError):
        device().write_config(0, b"\0")
