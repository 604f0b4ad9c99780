"""Rings: what starts and stops them, what changes while they run, what they cannot be."""

import itertools

import pytest

from tests.talk import (
    FAR_REGION,
    FEATURES,
    PACKED,
    PLAIN,
    PROTOCOL_FEATURES,
    REGION,
    TOP,
    UVA,
    Talk,
    eventfd,
    open_fds,
    ring_address,
)
from vhostpy.errors import ProtocolError
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.payloads import U64, VringFile, VringState
from vhostpy.session.ring import RingState
from vhostpy.session.steps import (
    EnableRing,
    SetRingAddresses,
    SetRingBase,
    SetRingCall,
    SetRingErr,
    SetRingKick,
    StartRing,
    StopRing,
)

STEPS = {
    "features": lambda t: t.say(R.SET_FEATURES, U64(FEATURES)),
    "memory": lambda t: t.table(REGION, FAR_REGION),
    "num": lambda t: t.num(),
    "address": lambda t: t.address(),
    "kick": lambda t: t.kick(),
}


@pytest.mark.parametrize("last", STEPS)
def test_ring_starts_once_with_the_last_thing_it_needs_in_any_order(no_fd_leaks, last):
    for order in itertools.permutations(set(STEPS) - {last}):
        talk = Talk()
        talk.say(R.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES))
        for step in order:
            assert StartRing(0) not in STEPS[step](talk), order
            assert talk.session.status()["handshake"].startswith(("neg", "mem"))
        assert STEPS[last](talk)[-1] == StartRing(0), order
        ring = talk.session.rings[0]
        assert (ring.num, ring.desc_uva, talk.session.base_of(ring)) == (256, UVA, 0)
        assert ring.kick is not None
        assert not ring.kick.closed
        assert not ring.enabled
        talk.close()


def test_ring_without_protocol_features_starts_enabled(fresh):
    fresh.negotiate(features=PLAIN)
    fresh.table(REGION)
    assert fresh.start() == [StartRing(0)]
    assert fresh.session.rings[0].enabled


def test_rings_are_enabled_at_once_when_protocol_features_are_not_taken(fresh):
    fresh.negotiate(features=PLAIN)
    assert all(ring.enabled for ring in fresh.session.rings)
    fresh.say(R.SET_FEATURES, U64(FEATURES))
    assert all(ring.enabled for ring in fresh.session.rings)  # never disabled by features


def test_ring_is_enabled_and_disabled_once_each(talk):
    talk.start()
    for enabled in (1, 0):
        state = VringState(0, enabled)
        assert talk.say(R.SET_VRING_ENABLE, state) == [EnableRing(0, bool(enabled))]
        assert talk.say(R.SET_VRING_ENABLE, state) == []


def test_enabling_a_stopped_ring_is_remembered(talk):
    assert talk.say(R.SET_VRING_ENABLE, VringState(0, 1)) == []
    talk.start()
    assert talk.session.rings[0].enabled
    talk.stop()
    assert talk.session.rings[0].enabled


def test_ring_without_a_kick_fd_is_polled(talk):
    talk.num()
    talk.address()
    assert talk.kick(poll=True) == [StartRing(0)]
    assert talk.session.rings[0].poll
    assert talk.session.rings[0].kick is None


def test_stopping_answers_with_the_base_after_the_ring_was_stopped(talk):
    talk.start()
    talk.bases[0] = 4711
    kick = talk.session.rings[0].kick
    assert talk.stop() == [StopRing(0)]
    assert [answer.payload for answer in talk.answers] == [VringState(0, 4711)]
    assert kick.closed
    assert talk.session.rings[0].state is RingState.STOPPED


def test_stopping_a_ring_that_never_ran_answers_with_what_was_set(talk):
    talk.say(R.SET_VRING_BASE, VringState(5, 99))
    assert talk.stop(5) == []
    assert [answer.payload for answer in talk.answers] == [VringState(5, 99)]


def test_stopping_a_waiting_ring_forgets_its_kick(fresh):
    fresh.negotiate()
    fresh.start()
    kick = fresh.session.rings[0].kick
    assert fresh.stop() == []
    assert kick.closed
    fresh.table(REGION, FAR_REGION)
    assert fresh.running == set()


def test_stopped_ring_starts_again_by_a_kick_at_the_base_it_is_given(talk):
    talk.start()
    talk.bases[0] = 10
    talk.stop()
    talk.say(R.SET_VRING_BASE, VringState(0, 65535))
    assert talk.num() == []
    assert talk.kick() == [StartRing(0)]
    assert talk.session.rings[0].base == 65535


def test_ring_restarts_as_often_as_one_likes_without_a_new_file(talk):
    talk.start()
    talk.say(R.SET_VRING_CALL, VringFile(0, True), (eventfd(),))
    before = open_fds()
    for base in range(200):
        talk.bases[0] = base
        assert talk.stop() == [StopRing(0)]
        assert talk.start() == [StartRing(0)]
        talk.say(R.SET_VRING_CALL, VringFile(0, True), (eventfd(),))
        assert talk.session.rings[0].base == base
    assert open_fds() == before


# Changes while they run -----------------------------------------------------------------

FILES = [
    (R.SET_VRING_KICK, "kick", SetRingKick),
    (R.SET_VRING_CALL, "call", SetRingCall),
    (R.SET_VRING_ERR, "err", SetRingErr),
]


@pytest.mark.parametrize(("request_", "name", "step"), FILES, ids=[f[1] for f in FILES])
def test_fd_of_a_running_ring_stays_where_its_successor_is_refused(talk, request_, name, step):
    talk.start()
    talk.say(request_, VringFile(0, True), (eventfd(),))
    old, new = getattr(talk.session.rings[0], name), eventfd()
    talk.fail = (step, ProtocolError("it is refused"))
    with pytest.raises(ProtocolError):
        talk.say(request_, VringFile(0, True), (new,))
    assert getattr(talk.session.rings[0], name) is old and not old.closed
    assert new.closed


@pytest.mark.parametrize(("request_", "name", "step"), FILES, ids=[f[1] for f in FILES])
def test_fd_of_a_running_ring_is_swapped_and_taken_away(talk, request_, name, step):
    talk.start()
    talk.say(request_, VringFile(0, True), (eventfd(),))
    old = getattr(talk.session.rings[0], name)
    steps = talk.session.handle(talk.hear(request_, VringFile(0, True), (eventfd(),)))
    swap = next(steps)
    assert isinstance(swap, step) and not swap.fd.closed
    assert getattr(talk.session.rings[0], name) is old and not old.closed
    with pytest.raises(StopIteration):
        steps.send(None)
    new = getattr(talk.session.rings[0], name)
    assert new is not old and not new.closed and old.closed
    assert talk.say(request_, VringFile(0, False)) == [step(0, None)]
    assert getattr(talk.session.rings[0], name) is None and new.closed


@pytest.mark.parametrize(("request_", "name", "step"), FILES, ids=[f[1] for f in FILES])
def test_fd_of_a_stopped_ring_is_replaced_and_the_old_one_closed(talk, request_, name, step):
    for _ in range(3):
        old = getattr(talk.session.rings[0], name)
        assert talk.say(request_, VringFile(0, True), (eventfd(),)) == []
        assert old is None or old.closed
        assert not getattr(talk.session.rings[0], name).closed


def test_addresses_and_base_of_a_running_ring_change(talk):
    talk.start()
    logged = ring_address(0, log=1, used_log_gpa=0x5000)
    assert talk.say(R.SET_VRING_ADDR, logged) == [SetRingAddresses(0, logged)]
    ring = talk.session.rings[0]
    assert (ring.log_used, ring.used_log_gpa) == (True, 0x5000)
    moved = ring_address(0, uva=UVA + 0x100)
    assert talk.say(R.SET_VRING_ADDR, moved) == [SetRingAddresses(0, moved)]
    assert (ring.desc_uva, ring.log_used) == (UVA + 0x100, False)
    assert talk.say(R.SET_VRING_BASE, VringState(0, 3)) == [SetRingBase(0, 3)]
    assert ring.base == 3


def test_size_of_a_running_ring_does_not_change(talk):
    talk.start()
    assert talk.num(num=256) == []
    assert talk.ask(R.SET_VRING_NUM, VringState(0, 128)) == U64(1)
    assert talk.session.rings[0].num == 256


# Faults ---------------------------------------------------------------------------------

BY_STATE = [
    R.SET_VRING_NUM,
    R.SET_VRING_BASE,
    R.GET_VRING_BASE,
    R.SET_VRING_ENABLE,
]
BY_FILE = [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR]


@pytest.mark.parametrize("request_", BY_STATE, ids=lambda r: r.name)
@pytest.mark.parametrize("index", [256, 257, 1 << 16, (1 << 32) - 1])
def test_ring_beyond_the_devices_is_refused_by_the_full_width_of_its_index(talk, request_, index):
    with pytest.raises(ProtocolError, match=f"ring {index}, the device has 256"):
        talk.say(request_, VringState(index, 1))
    assert talk.answers == []


@pytest.mark.parametrize("request_", BY_FILE, ids=lambda r: r.name)
@pytest.mark.parametrize("index", [0x200, 1 << 32, 1 << 63])
def test_vring_file_with_a_high_bit_is_no_other_ring(talk, request_, index):
    fd = eventfd()
    with pytest.raises(ProtocolError, match=f"ring {index}, the device has 256"):
        talk.say(request_, VringFile(index, True), (fd,))
    assert fd.closed


def test_ring_address_beyond_the_devices_is_refused(talk):
    with pytest.raises(ProtocolError, match="ring 256"):
        talk.address(256)


def test_last_ring_of_the_device_is_one(talk):
    assert talk.start(255) == [StartRing(255)]


@pytest.mark.parametrize("num", [0, 3, 100, 32769, 65535, (1 << 32) - 1])
def test_split_ring_of_that_size_is_refused(talk, num):
    with pytest.raises(ProtocolError, match=f"{num} descriptors"):
        talk.num(num=num)


def test_size_that_only_a_packed_ring_may_have_is_looked_at_again_when_it_starts(fresh):
    fresh.num(num=3)
    fresh.address()
    fresh.kick()
    fresh.table(REGION)
    with pytest.raises(ProtocolError, match="3 descriptors, a split ring has a power of two"):
        fresh.say(R.SET_FEATURES, U64(FEATURES))


def test_packed_ring_of_three_descriptors_starts(fresh):
    fresh.negotiate(features=PACKED)
    fresh.table(REGION)
    assert fresh.start(num=3) == [StartRing(0)]


def test_repeated_size_replaces_the_last_one(talk):
    before = open_fds()
    for _ in range(100):
        for num in (1, 256, 32768, 2):
            assert talk.num(num=num) == []
    assert talk.session.rings[0].num == 2
    assert open_fds() == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"desc_uva": UVA + 8}, "descriptor area at UVA .* aligned to 16"),
        ({"avail_uva": UVA + 0x1001}, "avail ring at UVA .* aligned to 2"),
        ({"used_uva": UVA + 0x2002}, "used ring at UVA .* aligned to 4"),
        ({"desc_uva": TOP - 16}, "descriptor area of 4096 bytes .* passes 2"),
        ({"avail_uva": TOP - 2}, "avail ring of 516 bytes .* passes 2"),
        ({"used_uva": TOP - 4}, "used ring of 2052 bytes .* passes 2"),
        ({"flags": 1, "used_log_gpa": TOP - 1}, "logged at GPA 0xf+, passes 2"),
    ],
)
def test_ring_that_cannot_lie_there_is_refused(talk, changes, text):
    talk.num()
    with pytest.raises(ProtocolError, match=text):
        talk.address(**changes)


def test_unknown_address_flag_is_refused(talk):
    assert talk.ask(R.SET_VRING_ADDR, ring_address(0, flags=2)) == U64(1)
    assert talk.session.rings[0].desc_uva is None


@pytest.mark.parametrize("part", ["desc_uva", "avail_uva", "used_uva"])
@pytest.mark.parametrize("where", [0x1000, UVA + REGION.size - 16], ids=["outside", "over the end"])
def test_ring_that_is_not_in_memory_ends_the_session_at_its_kick(talk, part, where):
    talk.num()
    talk.address(**{part: where})
    with pytest.raises(ProtocolError, match="is in none of the 2 regions") as caught:
        talk.kick()
    assert "share=on" in str(caught.value)


def test_running_ring_is_not_moved_out_of_memory(talk):
    talk.start()
    with pytest.raises(ProtocolError, match="is in none of the 2 regions"):
        talk.address(desc_uva=0x1000)


def test_ring_may_end_with_its_region(talk):
    talk.num(num=2)
    talk.address(used_uva=UVA + REGION.size - 20)  # 4 + 2 * 8, without EVENT_IDX's two bytes
    assert talk.kick() == [StartRing(0)]


def test_base_beyond_16_bits_is_refused_on_a_split_ring_only(talk):
    with pytest.raises(ProtocolError, match="base 65536"):
        talk.say(R.SET_VRING_BASE, VringState(0, 65536))


def test_packed_ring_has_both_indexes_in_its_base(fresh):
    fresh.negotiate(features=PACKED)
    fresh.say(R.SET_VRING_BASE, VringState(0, 0x80018001))
    fresh.stop()
    assert [answer.payload for answer in fresh.answers] == [VringState(0, 0x80018001)]


def test_packed_ring_without_a_base_starts_with_both_wrap_counters_at_1(fresh):
    fresh.negotiate(features=PACKED)
    fresh.stop()
    assert [answer.payload for answer in fresh.answers] == [VringState(0, 0x80008000)]


def test_enable_that_is_neither_0_nor_1_is_refused(talk):
    with pytest.raises(ProtocolError, match="ring 0: 2, expected 0 or 1"):
        talk.say(R.SET_VRING_ENABLE, VringState(0, 2))
