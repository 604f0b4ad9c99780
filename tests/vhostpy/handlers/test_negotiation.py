"""Features, protocol features, and what the owner may say."""

import pytest

from tests.talk import FEATURES, LOG_ALL, PACKED, PLAIN, PROTOCOL_FEATURES, FakeDevice, eventfd
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.errors import Refused
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.payloads import U64, VringState
from vhostpy.session.steps import EnableRing, SetBackendChannel, SetFeatures


def test_offer_is_the_devices_and_what_the_core_serves(fresh):
    fresh.say(R.GET_FEATURES)
    offered = fresh.answers[0].payload.value
    assert offered == FakeDevice().features() | LOG_ALL | 1 << Feature.PROTOCOL_FEATURES
    fresh.say(R.GET_PROTOCOL_FEATURES)
    names = {f.name for f in ProtocolFeature if fresh.answers[0].payload.value >> f & 1}
    assert names == {
        "MQ", "LOG_SHMFD", "REPLY_ACK", "BACKEND_REQ", "CONFIGURE_MEM_SLOTS", "STATUS",
        "RESET_DEVICE", "RARP", "MTU", "CONFIG",
    }  # fmt: skip


def test_features_are_set_as_a_whole(fresh):
    assert fresh.say(R.SET_FEATURES, U64(FEATURES)) == [SetFeatures(FEATURES)]
    assert fresh.say(R.SET_FEATURES, U64(PLAIN)) == [SetFeatures(PLAIN)]


@pytest.mark.parametrize(
    ("request_", "bit", "name"),
    [
        (R.SET_FEATURES, Feature.IN_ORDER, "IN_ORDER"),
        (R.SET_FEATURES, 63, "bit 63"),
        (R.SET_PROTOCOL_FEATURES, ProtocolFeature.INFLIGHT_SHMFD, "INFLIGHT_SHMFD"),
    ],
)
def test_what_was_not_offered_is_refused_by_name(fresh, request_, bit, name):
    fresh.negotiate()
    assert fresh.ask(request_, U64(1 << bit)) == U64(1)
    assert fresh.session.features == FEATURES
    assert fresh.session.protocol_features == PROTOCOL_FEATURES
    with pytest.raises(Refused, match=f"not offered: {name}"):
        fresh.say(request_, U64(1 << bit))


def test_log_all_is_toggled_while_rings_run_and_disables_none(talk):
    talk.start()
    talk.say(R.SET_VRING_ENABLE, VringState(0, 1))
    for features in (FEATURES | LOG_ALL, FEATURES, FEATURES):
        assert talk.say(R.SET_FEATURES, U64(features)) == [SetFeatures(features)]
    assert talk.session.rings[0].enabled
    assert talk.session.rings[0].started


def test_other_features_do_not_change_under_a_running_ring(talk):
    talk.start()
    assert talk.ask(R.SET_FEATURES, U64(PACKED)) == U64(1)
    assert talk.session.features == FEATURES
    talk.stop()
    assert talk.say(R.SET_FEATURES, U64(PACKED)) == [SetFeatures(PACKED)]


def test_queue_number_and_slots_are_told(talk):
    assert talk.ask(R.GET_QUEUE_NUM) == U64(128)
    assert talk.ask(R.GET_MAX_MEM_SLOTS) == U64(509)


def test_back_end_channel_is_handed_over(talk):
    (step,) = talk.say(R.SET_BACKEND_REQ_FD, b"", (eventfd(),))
    assert isinstance(step, SetBackendChannel)


def test_reset_owner_disables_rings_that_can_be_enabled_again(talk):
    talk.start()
    talk.say(R.SET_VRING_ENABLE, VringState(0, 1))
    assert talk.say(R.RESET_OWNER) == [EnableRing(0, False)]
    assert talk.running == {0}


def test_reset_owner_is_ignored_where_nothing_could_enable_rings_again(fresh):
    fresh.negotiate(features=PLAIN)
    assert fresh.say(R.RESET_OWNER) == []
    assert fresh.session.rings[0].enabled
