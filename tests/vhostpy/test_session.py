"""The session: what is answered and refused, and what holds whatever is said."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.talk import (
    FAR_REGION,
    FEATURES,
    LOG_ALL,
    PACKED,
    PLAIN,
    PROTOCOL_FEATURES,
    REGION,
    TOP,
    UVA,
    FakeDevice,
    Talk,
    eventfd,
    eventfds,
    open_fds,
    ring_address,
)
from vhostpy._spec import ProtocolFeature
from vhostpy.errors import GuestError, ProtocolError, Refused, VhostpyError
from vhostpy.protocol.codec import FRONT_END_TABLE
from vhostpy.protocol.codec import FrontEndRequest as R
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
    SharedObject,
    ShmemConfig,
    SingleRegion,
    VringFile,
    VringState,
)
from vhostpy.session.handlers import SERVED
from vhostpy.session.steps import Reply, SetLog, SetMemory, SetMtu, StartRing
from vhostpy.system.fds import OwnedFd

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
def test_message_without_an_answer_is_acknowledged_only_where_that_is_asked(
    talk, request_, payload, fds
):
    talk.say(request_, payload, tuple(eventfds(fds)))
    # QEMU would wait for ever.
    unasked = [Empty()] if request_ == R.SET_LOG_BASE else []
    assert [answer.payload for answer in talk.answers] == unasked
    assert talk.ask(request_, payload, tuple(eventfds(fds))) == U64(0)


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


# What is not served ---------------------------------------------------------------------

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
    fds = tuple(eventfds(fds))
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


def test_each_request_of_the_document_has_a_handler_or_says_what_it_needs():
    for request in R:
        assert (request in SERVED) != bool(FRONT_END_TABLE[request].needs), request


def test_request_that_nobody_knows_ends_a_session_that_asks_for_no_ack(talk):
    with pytest.raises(Refused, match="request 46: the vhost-user document knows no such"):
        talk.say(46, b"")


@pytest.mark.parametrize("request_", [R.ADD_MEM_REG, R.SET_CONFIG, R.SET_STATUS])
def test_what_needs_a_protocol_feature_is_refused_before_it_is_negotiated(fresh, request_):
    fresh.negotiate(protocol=1 << ProtocolFeature.REPLY_ACK)
    payload, fds = next((p, n) for r, p, n in SETTERS if r == request_)
    assert fresh.ask(request_, payload, tuple(eventfds(fds))) == U64(1)
    assert fresh.session.regions == []


# Steps ----------------------------------------------------------------------------------


class Remembering(FakeDevice):
    def protocol_features(self):
        return super().protocol_features() | 1 << ProtocolFeature.INFLIGHT_SHMFD


GONE = MemoryRegion(1 << 40, 1 << 20, 1 << 41, 0)
# Rings 0 and 1 run; ring 2 lacks a kick fd, ring 3 memory.
STEPPED = [
    *(case for case in SETTERS if case[0] not in (R.RESET_OWNER, R.SET_VRING_KICK)),
    (R.SET_VRING_KICK, VringFile(1, True), 1),
    (R.SET_VRING_KICK, VringFile(2, True), 1),
    (R.RESET_OWNER, Empty(), 0),
    (R.SET_FEATURES, U64(FEATURES | LOG_ALL), 0),
    (R.SET_VRING_ADDR, ring_address(1, log=1), 0),
    (R.GET_VRING_BASE, VringState(1, 0), 0),
    (R.SET_MEM_TABLE, MemoryTable((FAR_REGION,)), 1),
    (R.ADD_MEM_REG, SingleRegion(GONE), 1),
    (R.GET_INFLIGHT_FD, Inflight(0, 0, 4, 128), 0),
    (R.SET_INFLIGHT_FD, Inflight(4096, 0, 4, 128), 1),
    (R.GET_CONFIG, Config(0, 0, bytes(8)), 0),
]
STEPPED_IDS = [f"{request.name}-{i}" for i, (request, _, _) in enumerate(STEPPED)]


def _stepped(request: int) -> Talk:
    talk = Talk(Remembering())
    talk.negotiate(protocol=PROTOCOL_FEATURES | 1 << ProtocolFeature.INFLIGHT_SHMFD)
    talk.table(REGION, FAR_REGION)
    if request != R.SET_INFLIGHT_FD:  # before any ring runs
        for index in (0, 1):
            talk.start(index)
            talk.say(R.SET_VRING_ENABLE, VringState(index, index ^ 1))
            for each in (R.SET_VRING_CALL, R.SET_VRING_ERR):
                talk.say(each, VringFile(index, True), (eventfd(),))
    talk.num(2)
    talk.address(2)
    if request != R.SET_INFLIGHT_FD:
        talk.add(GONE)
        talk.num(3)
        talk.address(3, uva=GONE.uva)
        talk.kick(3)
        talk.remove(GONE)
    return talk


@pytest.mark.parametrize(("request_", "payload", "fds"), STEPPED, ids=STEPPED_IDS)
@pytest.mark.parametrize("end", ["closed", "failed"])
def test_handler_that_ends_at_any_step_keeps_no_fd_and_changes_nothing_before_it_succeeds(
    no_garbage, end, request_, payload, fds
):
    everything = open_fds()
    for last in itertools.count(1):
        talk = _stepped(request_)
        before, status, owned = open_fds(), talk.session.status(), eventfds(fds)
        message = talk.hear(request_, payload, tuple(owned), need_reply=True)
        steps = talk.session.handle(message)
        seen, results, finished = [next(steps)], [], False  # which hold what they have
        try:
            for _ in range(last - 1):
                results.append(talk.carry_out(seen[-1]))
                seen.append(steps.send(results[-1]))
            if end == "closed":
                steps.close()
            else:
                while True:  # and no answer reaches anybody
                    seen.append(steps.throw(GuestError("it fails")))
        except StopIteration:
            finished = True
        except GuestError:
            pass
        assert all(fd.closed for fd in owned)
        # A ring starts with what is known before; and so does who only answers.
        if last == 1 and not isinstance(seen[0], StartRing | Reply):
            assert open_fds() == before
            assert end == "failed" or talk.session.status() == status
        made = [result for result in results if isinstance(result, OwnedFd)]
        assert all(fd.closed for fd in made)
        talk.close()
        assert all(fd.closed for fd in message.fds)
        del steps
        assert open_fds() == everything
        if finished:
            return


# Anything at all ------------------------------------------------------------------------

BY_FILE = [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR]
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


@pytest.mark.usefixtures("no_garbage")
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
        fds = tuple(eventfds(_fd_count(request, payload)))
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
    talk.close()
    assert open_fds() == before
