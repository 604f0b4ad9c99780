"""Status: where the handshake stands, and what it waits for."""

import pytest

from tests.talk import FEATURES, LOG_ALL, PROTOCOL_FEATURES, REGION, eventfd
from vhostpy.errors import SHARE_ON, ProtocolError
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.payloads import U64, Log, VringState
from vhostpy.session.steps import SetMemory


def test_status_says_at_each_step_what_it_waits_for(fresh):
    seen = []

    def look():
        status = fresh.session.status()
        seen.append((status["handshake"], status["waits_for"].split(";")[0]))

    look()
    fresh.say(R.GET_FEATURES)
    look()
    fresh.say(R.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES))
    fresh.say(R.SET_FEATURES, U64(FEATURES))
    look()
    fresh.table(REGION)
    look()
    fresh.num(1)
    look()
    fresh.kick(1)
    look()
    fresh.address(1)
    look()
    fresh.say(R.SET_VRING_ENABLE, VringState(1, 1))
    look()
    assert seen == [
        ("connected", "the first message"),
        ("negotiating", "SET_FEATURES"),
        ("negotiated", "SET_MEM_TABLE"),
        ("memory shared", "SET_VRING_KICK"),
        ("memory shared", "ring 1: a kick fd (SET_VRING_KICK)"),
        ("memory shared", "ring 1: its addresses (SET_VRING_ADDR)"),
        ("ready: rings 1 run", "rings 1: SET_VRING_ENABLE"),
        ("ready: rings 1 run", ""),
    ]


def test_status_of_a_session_without_memory_names_share_on(fresh):
    fresh.negotiate()
    fresh.start()
    status = fresh.session.status()
    assert "share=on" in status["waits_for"]
    assert "share=on" in status["rings"][0]["waits_for"]


@pytest.mark.parametrize(
    ("name", "told", "untold"),
    [
        ("", "share=on", "DPDK"),
        ("qemu-system-x86", "share=on", "DPDK"),
        ("ovs-vswitchd", "other_config:dpdk-extra=--single-file-segments", "QEMU"),
        ("dpdk-testpmd", "give it --single-file-segments", "QEMU"),
        ("crosvm", "crosvm must share its memory", "QEMU"),
    ],
)
def test_who_does_not_share_memory_is_told_how_in_its_own_words(fresh, name, told, untold):
    fresh.session.front_end = name
    fresh.negotiate()
    texts = [fresh.session.status()["waits_for"]]
    fresh.start()
    texts.append(fresh.session.status()["rings"][0]["waits_for"])
    fresh.fail = SetMemory, ProtocolError("cannot map", SHARE_ON)
    with pytest.raises(ProtocolError) as caught:
        fresh.table(REGION)
    texts.append(str(caught.value))
    del caught  # its frames keep fds
    for text in texts:
        assert told in text and untold not in text


def test_status_has_the_facts(talk):
    talk.start(1)
    talk.say(R.SET_LOG_BASE, Log(4096, 0), (eventfd(),))
    talk.say(R.SET_FEATURES, U64(FEATURES | LOG_ALL))
    status = talk.session.status()
    assert status["features"] == ["LOG_ALL", "EVENT_IDX", "PROTOCOL_FEATURES", "VERSION_1"]
    assert "CONFIG" in status["protocol_features"]
    assert (status["memory_regions"], status["memory_size_bytes"]) == (2, 5 << 20)
    assert status["dirty_log"]
    assert status["rings"] == [
        {
            "index": 1,
            "state": "started",
            "enabled": False,
            "size": 256,
            "base": 0,
            "poll": False,
            "broken": "",
            "waits_for": "",
        }
    ]
