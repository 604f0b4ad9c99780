"""The session: what each message changes, in any order, and what it refuses."""

import gc
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.talk import (
    FAR_REGION,
    FEATURES,
    PROTOCOL_FEATURES,
    REGION,
    UVA,
    FakeDevice,
    Talk,
    eventfd,
    open_fds,
    ready,
    ring_address,
)
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.effects import (
    AddRegion,
    EnableRing,
    MakeInflight,
    RemoveRegion,
    ResetDevice,
    SendRarp,
    SetBackendChannel,
    SetFeatures,
    SetInflight,
    SetLog,
    SetMemory,
    SetMtu,
    SetRingAddresses,
    SetRingBase,
    SetRingCall,
    SetRingErr,
    SetRingKick,
    SetStatus,
    StartRing,
    StopRing,
    WriteConfig,
)
from vhostpy.errors import GuestError, ProtocolError, Refused, VhostpyError
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
    SharedObject,
    ShmemConfig,
    SingleRegion,
    VringFile,
    VringState,
)
from vhostpy.protocol import FrontEndRequest as R
from vhostpy.ringstate import RingState

LOG_ALL = 1 << Feature.LOG_ALL
PLAIN = FEATURES & ~(1 << Feature.PROTOCOL_FEATURES)
PACKED = FEATURES | 1 << Feature.RING_PACKED


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


@pytest.fixture
def fresh():
    talk = Talk()
    yield talk
    talk.session.close()


@pytest.fixture
def talk():
    talk = ready()
    yield talk
    talk.session.close()


# Negotiation ---------------------------------------------------------------------------


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


# Answers -------------------------------------------------------------------------------

SETTERS = [
    (R.SET_FEATURES, U64(FEATURES), 0),
    (R.SET_OWNER, Empty(), 0),
    (R.RESET_OWNER, Empty(), 0),
    (R.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES), 0),
    (R.SET_MEM_TABLE, MemoryTable((REGION,)), 1),
    (R.SET_LOG_BASE, Log(4096, 0), 1),
    (R.SET_LOG_FD, Empty(), 1),
    (R.SET_VRING_NUM, VringState(1, 128), 0),
    (R.SET_VRING_ADDR, ring_address(1), 0),
    (R.SET_VRING_BASE, VringState(1, 7), 0),
    (R.SET_VRING_KICK, VringFile(1, True), 1),
    (R.SET_VRING_CALL, VringFile(1, True), 1),
    (R.SET_VRING_ERR, VringFile(1, True), 1),
    (R.SET_VRING_ENABLE, VringState(1, 1), 0),
    (R.SEND_RARP, U64(0), 0),
    (R.NET_SET_MTU, U64(1500), 0),
    (R.SET_BACKEND_REQ_FD, Empty(), 1),
    (R.SET_CONFIG, Config(0, 0, b"x"), 0),
    (R.RESET_DEVICE, Empty(), 0),
    (R.ADD_MEM_REG, SingleRegion(MemoryRegion(1 << 40, 4096, 1 << 41, 0)), 1),
    (R.REM_MEM_REG, SingleRegion(REGION), 1),
    (R.SET_STATUS, U64(7), 0),
]
SETTER_IDS = [request.name for request, _, _ in SETTERS]


@pytest.mark.parametrize(("request_", "payload", "fds"), SETTERS, ids=SETTER_IDS)
def test_message_without_an_answer_is_acknowledged_where_that_is_asked(
    talk, request_, payload, fds
):
    assert talk.ask(request_, payload, tuple(eventfd() for _ in range(fds))) == U64(0)


@pytest.mark.parametrize(("request_", "payload", "fds"), SETTERS, ids=SETTER_IDS)
def test_message_is_not_acknowledged_where_that_is_not_asked(talk, request_, payload, fds):
    talk.say(request_, payload, tuple(eventfd() for _ in range(fds)))
    if request_ == R.SET_LOG_BASE:  # QEMU would wait for ever
        assert [answer.payload for answer in talk.answers] == [Empty()]
    else:
        assert talk.answers == []


def test_need_reply_means_nothing_without_reply_ack(fresh):
    fresh.negotiate(protocol=PROTOCOL_FEATURES & ~(1 << ProtocolFeature.REPLY_ACK))
    fresh.say(R.SET_OWNER, need_reply=True)
    assert fresh.answers == []
    with pytest.raises(Refused):
        fresh.say(R.NET_SET_MTU, U64(1), need_reply=True)


def test_message_with_an_answer_is_answered_once_though_need_reply_is_set(talk):
    assert talk.ask(R.GET_FEATURES) == U64(talk.session.offered)
    assert talk.ask(R.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 0)
    talk.start()
    assert talk.ask(R.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 0)


def test_refusal_of_the_device_is_acknowledged_and_the_session_goes_on(talk):
    talk.fail = (SetMtu, Refused("MTU 9000 is above --mtu 1500"))
    assert talk.ask(R.NET_SET_MTU, U64(9000)) == U64(1)
    assert talk.ask(R.SET_OWNER) == U64(0)
    assert talk.session.status()["refused"] == {"NET_SET_MTU": 1}


def test_unknown_requests_fill_neither_the_log_nor_our_memory(talk, caplog):
    for request in range(1000, 2000):
        assert talk.ask(request).data == U64(1).pack()
    assert talk.session.status()["refused"] == {"unknown request": 1000}
    assert len(caplog.records) == 1


def test_refusal_nobody_would_hear_ends_the_session(talk):
    talk.fail = (SetMtu, Refused("MTU 9000 is above --mtu 1500"))
    with pytest.raises(Refused, match="above --mtu"):
        talk.say(R.NET_SET_MTU, U64(9000))
    with pytest.raises(ProtocolError, match="after the session ended"):
        talk.say(R.SET_OWNER)


@pytest.mark.parametrize("kind", [ProtocolError, GuestError])
def test_error_of_the_data_plane_is_told_and_ends_the_session(talk, kind):
    talk.fail = (SetMemory, kind("cannot map"))
    with pytest.raises(kind, match="cannot map"):
        talk.say(R.SET_MEM_TABLE, MemoryTable((REGION,)), (eventfd(),), need_reply=True)
    assert [answer.payload for answer in talk.answers] == [U64(1)]
    assert talk.session.status()["handshake"] == "ended"


def test_log_base_that_fails_is_not_answered_as_if_it_had_worked(talk):
    talk.fail = (SetLog, ProtocolError("cannot map"))
    with pytest.raises(ProtocolError):
        talk.say(R.SET_LOG_BASE, Log(4096, 0), (eventfd(),))
    assert talk.answers == []


# Requests under way --------------------------------------------------------------------------


class Remembering(FakeDevice):
    def protocol_features(self):
        return super().protocol_features() | 1 << ProtocolFeature.INFLIGHT_SHMFD


@pytest.fixture
def remembering():
    talk = ready(Remembering())
    yield talk
    talk.session.close()


def test_inflight_memory_is_made_to_measure_and_given_away(remembering):
    (effect,) = remembering.say(R.GET_INFLIGHT_FD, Inflight(0, 0, 4, 128))
    assert effect == MakeInflight(4 * 32832, 4, 128)  # for 1024 each, which a guest may take
    fd = eventfd()
    (reply,) = remembering.session.inflight_made(effect, fd)
    assert Inflight.unpack(reply.payload) == Inflight(4 * 32832, 0, 4, 128)
    assert reply.fds == (fd,)
    fd.close()


def test_inflight_memory_is_taken_before_rings_run(remembering):
    (effect,) = remembering.say(R.SET_INFLIGHT_FD, Inflight(9000, 64, 4, 128), (eventfd(),))
    assert isinstance(effect, SetInflight)
    assert (effect.offset, effect.size, effect.num_queues, effect.queue_size) == (64, 9000, 4, 128)
    remembering.start()
    assert remembering.ask(R.SET_INFLIGHT_FD, Inflight(9000, 0, 4, 128), (eventfd(),)) == U64(1)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (Inflight(4096, 0, 0, 128), "0 queues"),
        (Inflight(4096, 0, 257, 128), "257 queues"),
        (Inflight(4096, 0, 1, 0), "queues of 0"),
        (Inflight(4096, 0, 1, 32769), "queues of 32769"),
        (Inflight(0, 0, 1, 128), "0x0 bytes"),
        (Inflight(1 << 63, 1 << 63, 1, 128), "0x8000000000000000 bytes"),
    ],
)
def test_inflight_memory_that_makes_no_sense_ends_the_session(remembering, payload, words):
    with pytest.raises(ProtocolError, match=words):
        remembering.say(R.SET_INFLIGHT_FD, payload, (eventfd(),))


NOT_SERVED = [
    (R.IOTLB_MSG, Iotlb(0, 0, 0, 0, 0), 0, U64(1)),
    (R.SET_VRING_ENDIAN, VringState(0, 1), 0, U64(1)),
    (R.CREATE_CRYPTO_SESSION, b"", 0, None),
    (R.CLOSE_CRYPTO_SESSION, U64(0), 0, U64(1)),
    (R.POSTCOPY_ADVISE, Empty(), 0, Empty()),
    (R.POSTCOPY_LISTEN, Empty(), 0, U64(1)),
    (R.POSTCOPY_END, Empty(), 0, U64(1)),
    (R.GET_INFLIGHT_FD, Inflight(0, 0, 1, 256), 0, Inflight(0, 0, 0, 0)),
    (R.SET_INFLIGHT_FD, Inflight(4096, 0, 65535, 65535), 1, U64(1)),
    (R.GPU_SET_SOCKET, Empty(), 1, U64(1)),
    (R.VRING_KICK, VringState(0, 0), 0, U64(1)),
    (R.GET_SHARED_OBJECT, SharedObject(bytes(16)), 0, Empty()),
    (R.SET_DEVICE_STATE_FD, DeviceState(0, 0), 1, U64(0x101)),
    (R.CHECK_DEVICE_STATE, Empty(), 0, U64(1)),
    (R.GET_SHMEM_CONFIG, Empty(), 0, ShmemConfig(())),
    (R.GET_VRING_BASE_SKIP_DRAIN, VringState(0, 0), 0, None),
    (46, b"whatever", 3, U64(1)),
    (0xFFFFFFFF, b"", 0, U64(1)),
]


@pytest.mark.parametrize(
    ("request_", "payload", "fds", "answer"), NOT_SERVED, ids=[str(c[0]) for c in NOT_SERVED]
)
def test_what_is_not_served_is_refused_as_the_document_says(talk, request_, payload, fds, answer):
    fds = tuple(eventfd() for _ in range(fds))
    if answer is None:  # no answer can say no
        with pytest.raises(Refused, match="is not offered"):
            talk.ask(request_, payload, fds)
        assert talk.answers == []
    elif request_ in set(R):
        assert talk.ask(request_, payload, fds) == answer
        assert talk.ask(R.SET_OWNER) == U64(0)
    else:  # the front-end's codec does not know it either
        talk.say(request_, payload, fds, need_reply=True)
        (got,) = talk.answers
        assert got.payload.data == answer.pack()
        assert talk.ask(R.SET_OWNER) == U64(0)
    assert all(fd.closed for fd in fds)


def test_request_that_nobody_knows_ends_a_session_that_asks_for_no_ack(talk):
    with pytest.raises(Refused, match="request 46: the vhost-user document knows no such"):
        talk.say(46, b"")


@pytest.mark.parametrize("request_", [R.ADD_MEM_REG, R.SET_CONFIG, R.SET_STATUS])
def test_what_needs_a_protocol_feature_is_refused_before_it_is_negotiated(fresh, request_):
    fresh.negotiate(protocol=1 << ProtocolFeature.REPLY_ACK)
    payload, fds = next((p, n) for r, p, n in SETTERS if r == request_)
    assert fresh.ask(request_, payload, tuple(eventfd() for _ in range(fds))) == U64(1)
    assert fresh.session.regions == []


# Rings: start and stop -----------------------------------------------------------------

STEPS = {
    "features": lambda t: t.say(R.SET_FEATURES, U64(FEATURES)),
    "memory": lambda t: t.table(REGION, FAR_REGION),
    "num": lambda t: t.num(),
    "address": lambda t: t.address(),
    "kick": lambda t: t.kick(),
}


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids="-".join)
def test_ring_starts_once_with_the_last_thing_it_needs_in_any_order(fresh, order):
    fresh.say(R.SET_PROTOCOL_FEATURES, U64(PROTOCOL_FEATURES))
    for step in order[:-1]:
        assert StartRing(0) not in STEPS[step](fresh)
        assert fresh.session.status()["handshake"].startswith(("neg", "mem"))
    effects = STEPS[order[-1]](fresh)
    assert effects[-1] == StartRing(0)
    ring = fresh.session.rings[0]
    assert (ring.num, ring.desc_uva, fresh.session.base_of(ring)) == (256, UVA, 0)
    assert ring.kick is not None
    assert not ring.kick.closed
    assert not ring.enabled


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


# Rings: changes while they run ------------------------------------------------------------

FILES = [
    (R.SET_VRING_KICK, "kick", SetRingKick),
    (R.SET_VRING_CALL, "call", SetRingCall),
    (R.SET_VRING_ERR, "err", SetRingErr),
]


@pytest.mark.parametrize(("request_", "name", "effect"), FILES, ids=[f[1] for f in FILES])
def test_replaced_fd_of_a_running_ring_is_closed_by_who_swaps_it(talk, request_, name, effect):
    talk.start()
    talk.say(request_, VringFile(0, True), (eventfd(),))
    old = getattr(talk.session.rings[0], name)
    talk.fail = (effect, ProtocolError("stop here, before it is carried out"))
    with pytest.raises(ProtocolError):
        talk.say(request_, VringFile(0, True), (eventfd(),))
    new = getattr(talk.session.rings[0], name)
    assert not new.closed
    assert new is not old


@pytest.mark.parametrize(("request_", "name", "effect"), FILES, ids=[f[1] for f in FILES])
def test_fd_of_a_running_ring_is_swapped_and_taken_away(talk, request_, name, effect):
    talk.start()
    talk.say(request_, VringFile(0, True), (eventfd(),))
    old = getattr(talk.session.rings[0], name)
    (swap,) = talk.say(request_, VringFile(0, True), (eventfd(),))
    assert isinstance(swap, effect)
    assert swap.replaced is old
    (gone,) = talk.say(request_, VringFile(0, False))
    assert isinstance(gone, effect)
    assert getattr(talk.session.rings[0], name) is None


@pytest.mark.parametrize(("request_", "name", "effect"), FILES, ids=[f[1] for f in FILES])
def test_fd_of_a_stopped_ring_is_replaced_and_the_old_one_closed(talk, request_, name, effect):
    for _ in range(3):
        old = getattr(talk.session.rings[0], name)
        assert talk.say(request_, VringFile(0, True), (eventfd(),)) == []
        assert old is None or old.closed
        assert not getattr(talk.session.rings[0], name).closed


def test_addresses_and_base_of_a_running_ring_change(talk):
    talk.start()
    assert talk.address(log=1, used_log_gpa=0x5000) == [SetRingAddresses(0)]
    ring = talk.session.rings[0]
    assert (ring.log_used, ring.used_log_gpa) == (True, 0x5000)
    assert talk.address(uva=UVA + 0x100) == [SetRingAddresses(0)]
    assert (ring.desc_uva, ring.log_used) == (UVA + 0x100, False)
    assert talk.say(R.SET_VRING_BASE, VringState(0, 3)) == [SetRingBase(0)]
    assert ring.base == 3


def test_size_of_a_running_ring_does_not_change(talk):
    talk.start()
    assert talk.num(num=256) == []
    assert talk.ask(R.SET_VRING_NUM, VringState(0, 128)) == U64(1)
    assert talk.session.rings[0].num == 256


# Memory --------------------------------------------------------------------------------


def test_memory_is_replaced_while_a_ring_runs(talk):
    talk.start()
    moved = MemoryRegion(0, 8 << 20, UVA, 0)
    (effect,) = talk.table(moved)
    assert isinstance(effect, SetMemory)
    assert effect.regions == (moved,)
    assert talk.running == {0}


@pytest.mark.parametrize("way", ["slots", "table"])
def test_ring_whose_memory_goes_stops_before_and_goes_on_when_it_is_back(talk, way):
    talk.start()
    talk.bases[0] = 17
    kick = talk.session.rings[0].kick
    gone = talk.remove(REGION) if way == "slots" else talk.table(FAR_REGION)
    assert gone[0] == StopRing(0)
    assert isinstance(gone[1], RemoveRegion if way == "slots" else SetMemory)
    assert talk.answers == []
    assert not kick.closed
    status = talk.session.status()
    assert "ring 0: waits for memory for its descriptor area" in status["waits_for"]
    back = talk.add(REGION) if way == "slots" else talk.table(REGION, FAR_REGION)
    assert back[-1] == StartRing(0)
    assert talk.session.rings[0].base == 17
    assert talk.session.rings[0].kick is kick


def test_region_is_removed_by_addresses_and_size_whatever_its_offset(talk):
    other = MemoryRegion(FAR_REGION.gpa, FAR_REGION.size, FAR_REGION.uva, 0x999000)
    assert talk.remove(other) == [RemoveRegion(FAR_REGION)]
    assert talk.session.regions == [REGION]


def test_removing_a_region_closes_the_fd_that_should_not_have_come(talk):
    fd = eventfd()
    talk.say(R.REM_MEM_REG, SingleRegion(FAR_REGION), (fd,))
    assert fd.closed


def test_qemu_may_say_each_region_once_for_every_queue_pair(talk):
    """QEMU before 8.0 does; what is there is not mapped again, what is gone stays gone."""
    fd = eventfd()
    assert talk.say(R.ADD_MEM_REG, SingleRegion(REGION), (fd,)) == []
    assert fd.closed
    assert talk.session.regions == [REGION, FAR_REGION]
    assert talk.remove(FAR_REGION) == [RemoveRegion(FAR_REGION)]
    assert talk.remove(FAR_REGION) == []
    assert talk.session.regions == [REGION]


def test_509_regions_are_taken_and_no_more(fresh):
    fresh.negotiate()
    for i in range(509):
        (effect,) = fresh.add(MemoryRegion(i << 20, 1 << 20, UVA + (i << 20), i << 20))
        assert isinstance(effect, AddRegion)
    with pytest.raises(ProtocolError, match="510 regions, at most 509"):
        fresh.add(MemoryRegion(509 << 20, 1 << 20, UVA + (509 << 20), 0))


TOP = 1 << 64
BAD_REGIONS = {
    "zero size": (MemoryRegion(1 << 40, 0, 1 << 41, 0), "size 0"),
    "gpa wraps": (MemoryRegion(TOP - 4096, 8192, 1 << 41, 0), "GPA 0xfffffffffffff000 pass"),
    "uva wraps": (MemoryRegion(1 << 40, 8192, TOP - 4096, 0), "UVA 0xfffffffffffff000 pass"),
    "offset wraps": (MemoryRegion(1 << 40, 8192, 1 << 41, TOP - 4096), "offset 0xf"),
    "offset beyond off_t": (MemoryRegion(1 << 40, 4096, 1 << 41, 1 << 63), "offset 0x8"),
    "all of it": (MemoryRegion(0, TOP - 1, 0, 0), "pass"),
    "overlaps": (MemoryRegion(REGION.size - 1, 4096, 1 << 41, 0), "regions overlap"),
    "the same elsewhere": (MemoryRegion(0, REGION.size, 1 << 41, 0), "regions overlap"),
    "holds another": (MemoryRegion(0, 1 << 33, 1 << 41, 0), "regions overlap"),
}


@pytest.mark.parametrize(("region", "text"), BAD_REGIONS.values(), ids=BAD_REGIONS.keys())
@pytest.mark.parametrize("way", ["slots", "table"])
def test_region_that_cannot_be_is_refused_and_its_fd_closed(talk, region, text, way):
    fds = (eventfd(),) if way == "slots" else (eventfd(), eventfd())
    with pytest.raises(ProtocolError, match=text) as caught:
        if way == "slots":
            talk.say(R.ADD_MEM_REG, SingleRegion(region), fds)
        else:
            talk.say(R.SET_MEM_TABLE, MemoryTable((REGION, region)), fds)
    assert not isinstance(caught.value, Refused)
    assert all(fd.closed for fd in fds)
    assert talk.session.regions == [REGION, FAR_REGION]


def test_region_may_end_at_the_top_of_the_address_space(fresh):
    fresh.negotiate()
    region = MemoryRegion(TOP - 4096, 4096, TOP - 4096, 0)
    assert len(fresh.add(region)) == 1


def test_table_without_regions_says_what_qemu_lacks(fresh):
    fresh.negotiate()
    with pytest.raises(ProtocolError, match="share=on"):
        fresh.table()


# Dirty log -------------------------------------------------------------------------------


def test_log_is_set_before_it_is_answered(talk):
    (effect,) = talk.say(R.SET_LOG_BASE, Log(0x1000, 0x2000), (eventfd(),))
    assert (effect.offset, effect.size) == (0x2000, 0x1000)
    assert [answer.payload for answer in talk.answers] == [Empty()]


@pytest.mark.parametrize(
    "where",
    [Log(0, 0), Log(2, TOP - 1), Log(TOP - 1, 2), Log(TOP - 1, TOP - 1), Log(1, (1 << 63) - 1)],
    ids=str,
)
def test_log_that_wraps_or_is_empty_ends_the_session(talk, where):
    fd = eventfd()
    with pytest.raises(ProtocolError, match="are no log"):
        talk.say(R.SET_LOG_BASE, where, (fd,))
    assert fd.closed
    assert not talk.session.logging


def test_log_without_a_file_ends_the_session(talk):
    with pytest.raises(ProtocolError, match="0 fds"):
        talk.say(R.SET_LOG_BASE, Log(4096, 0))


def test_log_by_address_is_refused(fresh):
    fresh.negotiate(protocol=1 << ProtocolFeature.REPLY_ACK)
    assert fresh.ask(R.SET_LOG_BASE, U64(0x1000)) == U64(1)


def test_ring_that_is_to_be_logged_waits_for_its_log(fresh):
    """QEMU that connects while it migrates sends the log behind the kick fds."""
    fresh.negotiate(FEATURES | LOG_ALL)
    fresh.table(REGION)
    assert fresh.start() == []
    assert "the dirty log (SET_LOG_BASE)" in fresh.session.status()["waits_for"]
    effects = fresh.say(R.SET_LOG_BASE, Log(4096, 0), (eventfd(),))
    assert [type(effect) for effect in effects] == [SetLog, StartRing]


def test_ring_waits_for_no_log_that_cannot_come(fresh):
    without = PROTOCOL_FEATURES & ~(1 << ProtocolFeature.LOG_SHMFD)
    fresh.negotiate(FEATURES | LOG_ALL, without)
    fresh.table(REGION)
    assert StartRing(0) in fresh.start()


def test_log_of_a_migration_that_ended_is_not_the_next_ones(talk):
    talk.say(R.SET_LOG_BASE, Log(4096, 0), (eventfd(),))  # QEMU's order: log, then LOG_ALL
    talk.say(R.SET_FEATURES, U64(FEATURES | LOG_ALL))
    assert StartRing(0) in talk.start(0)
    talk.say(R.SET_FEATURES, U64(FEATURES))
    assert StartRing(1) in talk.start(1)
    talk.say(R.SET_FEATURES, U64(FEATURES | LOG_ALL))
    assert talk.start(2) == []


# Faults of rings -------------------------------------------------------------------------

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


# Device ----------------------------------------------------------------------------------


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


def test_config_is_written_with_its_reason(talk):
    for flags in (0, 1):
        effects = talk.say(R.SET_CONFIG, Config(56, flags, b"abcd"))
        assert effects == [WriteConfig(56, b"abcd", migration=bool(flags))]


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
    assert talk.say(R.SET_STATUS, U64(15)) == [SetStatus(15)]
    assert talk.ask(R.GET_STATUS) == U64(15)
    with pytest.raises(ProtocolError, match="8 bits"):
        talk.say(R.SET_STATUS, U64(256))


def test_back_end_channel_is_handed_over(talk):
    (effect,) = talk.say(R.SET_BACKEND_REQ_FD, b"", (eventfd(),))
    assert isinstance(effect, SetBackendChannel)


def test_reset_stops_all_rings_and_keeps_the_memory(talk):
    talk.start(0)
    talk.start(1)
    talk.bases[0] = 5
    talk.num(2)
    talk.kick(2)
    talk.say(R.SET_VRING_ENABLE, VringState(3, 1))
    talk.say(R.SET_STATUS, U64(15))
    assert talk.say(R.RESET_DEVICE) == [StopRing(0), StopRing(1), ResetDevice()]
    for ring in talk.session.rings[:4]:
        assert (ring.state, ring.enabled) == (RingState.STOPPED, False)
        assert (ring.num, ring.base, ring.desc_uva, ring.kick) == (0, None, None, None)
    assert talk.session.regions == [REGION, FAR_REGION]
    assert talk.ask(R.GET_STATUS) == U64(0)
    assert talk.start() == []
    assert talk.say(R.SET_FEATURES, U64(FEATURES))[-1] == StartRing(0)


def test_reset_owner_disables_rings_that_can_be_enabled_again(talk):
    talk.start()
    talk.say(R.SET_VRING_ENABLE, VringState(0, 1))
    assert talk.say(R.RESET_OWNER) == [EnableRing(0, False)]
    assert talk.running == {0}


def test_reset_owner_is_ignored_where_nothing_could_enable_rings_again(fresh):
    fresh.negotiate(features=PLAIN)
    assert fresh.say(R.RESET_OWNER) == []
    assert fresh.session.rings[0].enabled


# Status ----------------------------------------------------------------------------------


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
        ("connected", "waiting for the first message"),
        ("negotiating", "waiting for SET_FEATURES"),
        ("negotiated", "waiting for SET_MEM_TABLE"),
        ("memory shared", "waiting for SET_VRING_KICK"),
        ("memory shared", "ring 1: waits for a kick fd (SET_VRING_KICK)"),
        ("memory shared", "ring 1: waits for its addresses (SET_VRING_ADDR)"),
        ("ready: rings 1 run", "rings 1: wait for SET_VRING_ENABLE"),
        ("ready: rings 1 run", ""),
    ]


def test_status_of_a_session_without_memory_names_share_on(fresh):
    fresh.negotiate()
    fresh.start()
    status = fresh.session.status()
    assert "share=on" in status["waits_for"]
    assert "share=on" in status["rings"][0]["waits_for"]


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
            "waits_for": "",
        }
    ]


# Anything at all -------------------------------------------------------------------------

small = st.integers(0, 3)
nums = st.sampled_from([0, 1, 2, 3, 256, 32768, 65535])
region_choice = st.sampled_from(
    [REGION, FAR_REGION, MemoryRegion(0x80000, 4 << 20, UVA, 0), MemoryRegion(0, 0, 0, 0)]
)
SAYINGS = st.one_of(
    st.tuples(
        st.sampled_from([R.SET_VRING_NUM, R.SET_VRING_BASE, R.GET_VRING_BASE, R.SET_VRING_ENABLE]),
        st.builds(VringState, small, nums),
    ),
    st.tuples(st.just(R.SET_VRING_ENABLE), st.builds(VringState, small, st.integers(0, 1))),
    st.tuples(st.sampled_from(BY_FILE), st.builds(VringFile, st.integers(0, 3), st.booleans())),
    st.tuples(st.just(R.SET_VRING_ADDR), small.map(ring_address)),
    st.tuples(
        st.just(R.SET_VRING_ADDR),
        st.builds(ring_address, small, desc_uva=st.sampled_from([0, UVA, UVA + 8, TOP - 16])),
    ),
    st.tuples(
        st.just(R.SET_FEATURES),
        st.sampled_from([FEATURES, PLAIN, PACKED, FEATURES | LOG_ALL, 1]).map(U64),
    ),
    st.tuples(
        st.just(R.SET_MEM_TABLE),
        st.lists(region_choice, max_size=3).map(tuple).map(MemoryTable),
    ),
    st.tuples(st.sampled_from([R.ADD_MEM_REG, R.REM_MEM_REG]), region_choice.map(SingleRegion)),
    st.tuples(st.just(R.SET_LOG_BASE), st.builds(Log, nums, nums)),
    st.tuples(st.sampled_from([R.RESET_DEVICE, R.RESET_OWNER, R.SET_OWNER]), st.just(Empty())),
)


def _fd_count(request, payload) -> int:
    if request in BY_FILE:
        return int(payload.has_fd)
    if request == R.SET_MEM_TABLE:
        return len(payload.regions)
    return int(request in (R.ADD_MEM_REG, R.SET_LOG_BASE))


@given(st.lists(SAYINGS, max_size=40), st.booleans())
def test_whatever_is_said_only_sound_rings_run_and_every_file_is_closed(sayings, prepared):
    before = open_fds()
    talk = Talk()
    session = talk.session
    if prepared:
        talk.negotiate()
        talk.table(REGION)
        talk.start(0)
    for request, payload in sayings:
        fds = tuple(eventfd() for _ in range(_fd_count(request, payload)))
        try:
            talk.say(request, payload, fds, need_reply=True)
        except VhostpyError:
            break
        assert talk.running == {ring.index for ring in session.rings if ring.started}
        for index in talk.running:
            ring = session.rings[index]
            assert ring.num in (1, 2, 256, 32768) or session.features == PACKED
            for part in ring.parts(session.features == PACKED):
                assert part.uva % part.alignment == 0
                assert any(
                    region.uva <= part.uva and part.uva + part.size <= region.uva + region.size
                    for region in session.regions
                )
            if session.features == PLAIN:
                assert ring.enabled or request in (R.SET_VRING_ENABLE, R.SET_FEATURES)
    session.close()
    assert open_fds() == before
