"""Memory regions, the dirty log, memory for requests under way."""

import pytest

from tests.talk import (
    FAR_REGION,
    FEATURES,
    LOG_ALL,
    PROTOCOL_FEATURES,
    REGION,
    TOP,
    UVA,
    FakeDevice,
    eventfd,
    ready,
)
from vhostpy._spec import ProtocolFeature
from vhostpy.errors import ProtocolError, Refused
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.payloads import (
    U64,
    Empty,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    SingleRegion,
)
from vhostpy.session.steps import (
    AddRegion,
    MakeInflight,
    RemoveRegion,
    SetInflight,
    SetLog,
    SetMemory,
    StartRing,
    StopRing,
)


def test_memory_is_replaced_while_a_ring_runs(talk):
    talk.start()
    moved = MemoryRegion(0, 8 << 20, UVA, 0)
    (step,) = talk.table(moved)
    assert isinstance(step, SetMemory)
    assert step.regions == (moved,)
    assert talk.running == {0}


@pytest.mark.parametrize("way", ["slots", "table"])
def test_ring_whose_memory_goes_stops_before_and_goes_on_when_it_is_back(talk, way):
    talk.start()
    talk.bases[0] = 17
    kick = talk.session.rings[0].kick
    gone = talk.remove(REGION) if way == "slots" else talk.table(FAR_REGION)
    assert gone[0] == StopRing(0, resumes=True)
    assert isinstance(gone[1], RemoveRegion if way == "slots" else SetMemory)
    assert talk.answers == []
    assert not kick.closed
    status = talk.session.status()
    assert "ring 0: memory for its descriptor area" in status["waits_for"]
    back = talk.add(REGION) if way == "slots" else talk.table(REGION, FAR_REGION)
    assert back[-1] == StartRing(0)
    assert talk.session.rings[0].base == 17
    assert talk.session.rings[0].kick is kick


@pytest.mark.parametrize("way", ["slots", "table", "table, elsewhere"])
@pytest.mark.parametrize("kick", ["after", "before"])
def test_stopped_rings_addresses_go_with_the_memory_that_they_were_in(talk, way, kick):
    """Of another guest, or of the same one after a reboot: the new memory may have anything
    where the ring was, or nothing."""
    talk.start()
    talk.stop()
    if kick == "before":
        talk.say(R.SET_FEATURES, U64(FEATURES | LOG_ALL))  # the ring then waits for a log
        assert talk.kick() == []
    if way == "slots":
        talk.remove(REGION)
        steps = talk.add(REGION)
    else:
        steps = talk.table(FAR_REGION if "elsewhere" in way else REGION)
    steps += talk.say(R.SET_LOG_BASE, Log(4096, 0), (eventfd(),))
    steps += talk.kick() if kick == "after" else []
    assert StartRing(0) not in steps
    assert "ring 0: its addresses" in talk.session.status()["waits_for"]
    there = {} if "elsewhere" not in way else {"uva": FAR_REGION.uva}
    assert talk.address(**there) == [StartRing(0)]


def test_stopped_rings_addresses_stay_where_its_memory_does(talk):
    talk.start()
    talk.stop()
    talk.remove(FAR_REGION)
    assert talk.kick() == [StartRing(0)]


@pytest.mark.parametrize("before", ["never ran", "ran elsewhere"])
def test_addresses_that_come_before_the_memory_stay(talk, before):
    if before == "ran elsewhere":
        talk.start()
        talk.stop()
        talk.table(FAR_REGION)
    talk.num()
    talk.address()
    talk.table(REGION)
    assert talk.kick() == [StartRing(0)]


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
        (step,) = fresh.add(MemoryRegion(i << 20, 1 << 20, UVA + (i << 20), i << 20))
        assert isinstance(step, AddRegion)
    with pytest.raises(ProtocolError, match="510 regions, at most 509"):
        fresh.add(MemoryRegion(509 << 20, 1 << 20, UVA + (509 << 20), 0))


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


# Dirty log ------------------------------------------------------------------------------


def test_log_is_set_before_it_is_answered(talk):
    (step,) = talk.say(R.SET_LOG_BASE, Log(0x1000, 0x2000), (eventfd(),))
    assert (step.offset, step.size) == (0x2000, 0x1000)
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
    steps = fresh.say(R.SET_LOG_BASE, Log(4096, 0), (eventfd(),))
    assert [type(step) for step in steps] == [SetLog, StartRing]


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


# Requests under way ---------------------------------------------------------------------


class Remembering(FakeDevice):
    def protocol_features(self):
        return super().protocol_features() | 1 << ProtocolFeature.INFLIGHT_SHMFD


@pytest.fixture
def remembering(no_fd_leaks):
    talk = ready(Remembering())
    yield talk
    talk.close()


def test_inflight_memory_is_made_to_measure_and_given_away(remembering):
    steps = remembering.session.handle(remembering.hear(R.GET_INFLIGHT_FD, Inflight(0, 0, 4, 128)))
    size = 4 * 32832 + 8  # 1024 each, which a guest may take
    assert next(steps) == MakeInflight(size)
    made = eventfd()
    reply = steps.send(made)
    assert Inflight.unpack(reply.payload) == Inflight(size, 0, 4, 128)
    assert reply.fds == (made,) and not made.closed
    with pytest.raises(StopIteration):
        steps.send(None)
    assert made.closed


def test_inflight_memory_is_taken_before_rings_run(remembering):
    (step,) = remembering.say(R.SET_INFLIGHT_FD, Inflight(9000, 64, 4, 128), (eventfd(),))
    assert isinstance(step, SetInflight)
    assert (step.offset, step.size, step.num_queues, step.queue_size) == (64, 9000, 4, 128)
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
