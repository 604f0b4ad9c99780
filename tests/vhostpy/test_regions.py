"""Which of the front-end's addresses are memory; what it costs to know that."""

import asyncio
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving import serving
from vhostpy._spec import Feature, Limit, ProtocolFeature
from vhostpy.backends.net.device import NetDevice
from vhostpy.errors import ProtocolError
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.memory.guest import GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping
from vhostpy.protocol.payloads import MemoryRegion
from vhostpy.server.connection import Connection
from vhostpy.server.listen import Server
from vhostpy.session.regions import Spans
from vhostpy.vswitch.switch import Switch

PAGE = 4096
TOP = 1 << 64
PAIRS = 128

# Overlapping, nested, side by side, and at both ends of what there is.
regions = st.lists(
    st.tuples(
        st.integers(0, 12).flatmap(lambda at: st.sampled_from([at, TOP // 8 - 12 + at])),
        st.integers(1, 6),
    ).map(lambda pair: (pair[0] * 8, min(pair[1] * 8, TOP - pair[0] * 8))),
    max_size=8,
).map(lambda pairs: [(uva, size) for uva, size in pairs if size])
spans = st.tuples(
    st.one_of(st.integers(0, 200), st.integers(TOP - 200, TOP - 1)), st.integers(1, 60)
)


def holders(table, uva, length):
    """The regions that hold all of it, found by looking at each."""
    return [
        i for i, (start, size) in enumerate(table) if start <= uva and uva + length <= start + size
    ]


@given(regions, st.lists(spans, max_size=20))
def test_a_span_is_in_one_region_or_it_is_not(table, asked):
    made = Spans([MemoryRegion(i << 20, size, uva, 0) for i, (uva, size) in enumerate(table)])
    for uva, length in asked:
        assert ((uva, uva + length) in made) == bool(holders(table, uva, length))


@given(regions, st.lists(spans, max_size=20))
def test_user_addresses_that_overlap_are_found_as_by_looking_at_each(table, asked):
    fd = os.memfd_create("regions")
    os.ftruncate(fd, PAGE)
    # Each at an offset of its own, so that addresses of ours tell which one it was.
    infos = [
        RegionInfo(i << 20, size, uva, Mapping(fd, i * 48, size))
        for i, (uva, size) in enumerate(table)
    ]
    os.close(fd)
    memory = GuestMemory(infos)
    for uva, length in asked:
        found = holders(table, uva, length)
        places = {memory.translate((i << 20) + uva - table[i][0], length)[0][0] for i in found}
        if places:
            assert memory.hva(uva, length) in places
        else:
            with pytest.raises(ProtocolError):
                memory.hva(uva, length)
        if here := holders(table, uva, 1):
            assert memory.gpa(uva) in {(i << 20) + uva - table[i][0] for i in here}
        else:
            with pytest.raises(ProtocolError):
                memory.gpa(uva)


def test_a_message_costs_little_with_all_rings_and_regions_that_there_can_be(
    workers, tmp_path, monkeypatch
):
    costs: dict[str, list[float]] = {}
    handle = Connection._handle

    async def timed(self, message):
        start = time.thread_time()
        await handle(self, message)
        costs.setdefault(message.name, []).append(1e3 * (time.thread_time() - start))

    def costs_ms():
        """Of one page that goes and comes: the least, as the machine has other things to do."""
        costs.clear()
        for _ in range(10):
            end.rem_mem_reg(pages[0])
            end.add_mem_reg(pages[0])
        return max(map(min, costs.values()))

    path = str(tmp_path / "s")
    device = NetDevice("p", Switch(workers), pairs=PAIRS)
    # The rings lie in what was shared last.
    with serving(Server(device, path=path)), FrontEnd(path, layout=((1 << 40, 32 << 20),)) as end:
        wanted = (
            ProtocolFeature.MQ,
            ProtocolFeature.REPLY_ACK,
            ProtocolFeature.CONFIGURE_MEM_SLOTS,
        )
        end.negotiate(1 << Feature.VERSION_1 | 1 << Feature.NET_MQ, sum(1 << bit for bit in wanted))
        pages = [MemoryRegion(i << 20, PAGE, i << 20, 0) for i in range(Limit.MEM_SLOTS_MAX - 1)]
        for page in pages:
            end.add_mem_reg(page)
        end.set_mem_table()
        for index in range(2 * PAIRS):
            end.start_queue(index, 64)
        monkeypatch.setattr(Connection, "_handle", timed)
        running = costs_ms()
        # All of them wait for their memory.
        end.rem_mem_reg(end.shared.regions[0])
        waiting = costs_ms()
    assert running < 4 and waiting < 4, (running, waiting)


def test_rings_that_stop_and_start_by_one_message_let_others_have_their_turns(
    workers, tmp_path, monkeypatch
):
    turns: list[int] = []
    handle = Connection._handle

    async def counted(self, message):
        loop, count = asyncio.get_running_loop(), 0

        def tick():
            nonlocal count, next_tick
            count += 1
            next_tick = loop.call_soon(tick)

        next_tick = loop.call_soon(tick)
        await handle(self, message)
        next_tick.cancel()
        turns.append(count)

    path = str(tmp_path / "s")
    device = NetDevice("p", Switch(workers), pairs=PAIRS)
    with serving(Server(device, path=path)), FrontEnd(path) as end:
        wanted = (
            ProtocolFeature.MQ,
            ProtocolFeature.REPLY_ACK,
            ProtocolFeature.CONFIGURE_MEM_SLOTS,
        )
        end.negotiate(1 << Feature.VERSION_1 | 1 << Feature.NET_MQ, sum(1 << bit for bit in wanted))
        end.set_mem_table()
        for index in range(2 * PAIRS):
            end.start_queue(index, 8)
        monkeypatch.setattr(Connection, "_handle", counted)
        end.rem_mem_reg(end.shared.regions[0])
        end.add_mem_reg(end.shared.regions[0])
    assert len(turns) == 2 and min(turns) >= 2 * PAIRS - 1
