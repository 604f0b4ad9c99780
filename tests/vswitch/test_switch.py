"""The switch between real rings: who gets a frame, in which order, and what is dropped."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.netguest import (
    BROADCAST,
    IN_ORDER,
    INDIRECT,
    MODERN,
    PACKED,
    VERSION_1,
    frame,
    mac,
)
from tests.vswitch.net import LATER, MULTICAST, STRANGER, Net, net

# Who gets it -----------------------------------------------------------------------------


def test_a_known_destination_gets_the_frame_alone():
    n = net()
    n.send(0, frame(mac(1), mac(0)))
    n.run()
    assert n.received() == [[], [frame(mac(1), mac(0))], []]
    assert len(n[0].sent()) == 1
    assert n.drops() == [{}, {}, {}]


@pytest.mark.parametrize("to", [STRANGER, BROADCAST, MULTICAST])
def test_unknown_and_group_destinations_reach_all_others(to):
    n = net()
    n.send(1, frame(to, mac(1)))
    n.run()
    assert n.received() == [[frame(to, mac(1))], [], [frame(to, mac(1))]]


def test_sources_are_learned():
    n = net()
    n.switch.fdb.flush()
    n.send(2, frame(BROADCAST, STRANGER))
    n.run()
    n.received()
    n.send(0, frame(STRANGER, mac(0)))
    n.run()
    assert n.received() == [[], [], [frame(STRANGER, mac(0))]]


def test_a_station_that_moves_is_found_where_it_is():
    n = net()
    n.send(0, frame(mac(1), mac(0)))
    n.run()
    n.send(2, frame(BROADCAST, mac(1)))
    n.run()
    n.received()
    n.send(0, frame(mac(1), mac(0)))
    n.run()
    assert n.received() == [[], [], [frame(mac(1), mac(0))]]


def test_a_frame_for_its_own_port_is_not_reflected():
    n = net()
    n.switch.fdb.seen(STRANGER, 0)
    n.send(0, frame(STRANGER, mac(0)), frame(mac(0), mac(0)))
    n.run()
    assert n.received() == [[], [], []]
    assert n.drops() == [{"reflected": 2}, {}, {}]
    assert len(n[0].sent()) == 2


def test_a_group_address_as_source_is_dropped_and_not_learned():
    n = net()
    n.send(0, frame(mac(1), MULTICAST), frame(mac(1), BROADCAST))
    n.run()
    assert n.received() == [[], [], []]
    assert n.drops()[0] == {"bad_source": 2}
    assert len(n.switch.fdb.entries()) == 3


def test_alone_in_the_switch_there_is_no_destination():
    n = net(1)
    n.send(0, frame(BROADCAST, mac(0)), frame(STRANGER, mac(0)))
    n.run()
    assert n.drops() == [{"no_destination": 2}]
    assert len(n[0].sent()) == 2


def test_frames_that_the_port_refuses_are_counted_under_its_reason():
    n = net()
    n.send(0, b"short", frame(mac(1), mac(0)), frame(mac(1), mac(0), 70000))
    n[0].drivers[1].add([(1 << 40, 100)], [])
    n.send(0, frame(mac(1), mac(0), 61))
    n.run()
    assert n[1].received() == [frame(mac(1), mac(0)), frame(mac(1), mac(0), 61)]
    assert n.drops()[0] == {"too_short": 1, "too_long": 1, "bad_chain": 1}
    assert n[0].counters()["unmapped"] == 1
    assert len(n[0].sent()) == 5


def test_a_disabled_sender_is_discarded_by_name():
    n = net()
    n[0].device.ring_enabled(1, False)
    n.send(0, frame(mac(1), mac(0)))
    n.run()
    assert n.received() == [[], [], []]
    assert n.drops()[0] == {"disabled": 1}
    assert len(n[0].sent()) == 1


def test_a_port_without_a_guest_drops_by_name():
    n = net()
    n[1].stop()
    n.switch.fdb.seen(mac(1), 1)
    n.send(0, frame(mac(1), mac(0)), frame(BROADCAST, mac(0)))
    n.run()
    assert n[2].received() == [frame(BROADCAST, mac(0))]
    assert n.drops()[1] == {"receiver_down": 2}


# Order and budget ----------------------------------------------------------------------


def test_a_burst_to_several_ports_keeps_each_flows_order():
    n = net(4)
    frames = [frame(mac(1 + i % 3), mac(0), 60 + i, i) for i in range(60)]
    n.send(0, *frames)
    assert n.turn(0) == 60
    assert n.received() == [[], frames[0::3], frames[1::3], frames[2::3]]


@pytest.mark.parametrize("budget", [{"frames": 1}, {"size": 1}, {"frames": 3}, {"size": 300}])
def test_a_flood_that_is_cut_short_goes_on_where_it_stopped(budget):
    n = net(5)
    frames = [frame(BROADCAST, mac(0), 60 + i, i) for i in range(10)]
    n.send(0, *frames)
    turns = 0
    while n.turn(0, **budget):
        turns += 1
    assert n.received() == [[], frames, frames, frames, frames]
    assert turns > 3
    assert n.drops() == [{}] * 5


def test_a_turn_spends_its_budget_and_no_more_than_a_port_beyond_it():
    n = net(5)
    n.send(0, *[frame(BROADCAST, mac(0), 60, i) for i in range(10)])
    n.turn(0, frames=8)
    assert sum(map(len, n.received())) == 8
    n.turn(0, frames=8)
    assert sum(map(len, n.received())) == 8
    n.send(1, *[frame(mac(2), mac(1), 60, i) for i in range(10)])
    n.turn(1, frames=4)
    assert len(n[2].received()) == 4
    n.turn(1, size=60 * 3)
    assert len(n[2].received()) == 3


def test_a_flood_under_way_is_flooded_on_though_its_destination_was_learned():
    n = net(4)
    n.send(0, frame(STRANGER, mac(0)))
    n.turn(0, frames=1)
    n.switch.fdb.seen(STRANGER, 1)
    while n.turn(0, frames=1):
        pass
    assert n.received() == [[]] + [[frame(STRANGER, mac(0))]] * 3


def test_a_flood_under_way_ends_when_its_sender_is_disabled():
    n = net(4)
    n.send(0, frame(BROADCAST, mac(0)))
    n.turn(0, frames=1)
    n[0].device.ring_enabled(1, False)
    n.run()
    assert sum(map(len, n.received())) == 1
    assert n.drops()[0] == {"disabled": 1}
    n[0].device.ring_enabled(1, True)
    n.send(0, frame(BROADCAST, mac(0), 61))
    n.run()
    assert sum(map(len, n.received())) == 3


# Receivers that are full ------------------------------------------------------------------


def test_what_does_not_fit_waits_in_the_senders_ring():
    n = net(buffers=0)
    frames = [frame(mac(1), mac(0), 60, i) for i in range(6)]
    n[1].post(2048, count=2)
    n.send(0, *frames)
    assert n.turn(0) > 0
    assert n[1].received() == frames[:2]
    n[1].post(2048, count=3)
    n.turn(0)
    assert n[1].received() == frames[2:5]
    assert n.turn(0) > 0
    n[1].post(2048)
    n.run()
    assert n[1].received() == frames[5:]
    assert n.drops()[1] == {}
    assert len(n[0].sent()) == 6


def test_a_receiver_that_is_full_does_not_hold_up_others():
    n = net(buffers=0)
    n[2].post(2048, count=100)
    frames = [frame(mac(1 + i % 2), mac(0), 60, i) for i in range(20)]
    n.send(0, *frames)
    n.turn(0)
    assert n[2].received() == frames[1::2]
    n.turn(0)
    assert n[2].received() == []
    n[1].post(2048, count=100)
    n.run()
    assert n[1].received() == frames[0::2]


def test_a_station_that_goes_on_sending_is_seen_in_each_second():
    n = net(2)
    for second in range(1000, 1010):
        n.switch.tick(second)
        n.send(0, frame(mac(1), mac(0)))
        n.send(1, frame(mac(0), mac(1)))
        n.run()
        assert [age for _, _, _, age in n.switch.fdb.entries()] == [0, 0]


def test_a_sender_that_pauses_gets_its_last_buffers_back():
    n = net()
    n.send(0, frame(mac(1), mac(0)))
    assert n.turn(0, now=0) == 1
    n.turn(0, now=n[0].device.port.pause_ticks - 1)
    assert n[0].sent() == []
    n.turn(0, now=n[0].device.port.pause_ticks)
    assert len(n[0].sent()) == 1


def test_a_sender_that_never_pauses_waits_only_for_its_last_few_buffers():
    n = net()
    back = 0
    for i in range(30):
        n.send(0, frame(mac(1), mac(0)))
        n.turn(0, now=i * (n[0].device.port.pause_ticks - 1))
        back += len(n[0].sent())
        assert back >= i - 5


def test_a_sender_whose_ring_was_held_meanwhile_gets_them_too():
    n = net()
    n.send(0, frame(mac(1), mac(0)))
    assert n.turn(0) == 1
    ring = n[0].hold(1)
    assert n.turn(0) == 0
    ring.set_live(True)
    assert n.turn(0, now=LATER) == 0
    assert len(n[0].sent()) == 1


def wait_ticks(n: Net) -> int:
    return n.switch.full_wait_ticks


def test_what_waits_is_dropped_when_its_time_is_up_and_counted_at_the_receiver():
    n = net(buffers=0, full_wait_us=100)
    n.send(0, *[frame(mac(1), mac(0), 60, i) for i in range(3)])
    assert n.turn(0, now=1000) == 3
    assert n.turn(0, now=1000 + wait_ticks(n) - 1) == 3
    assert n.drops()[1] == {}
    n.turn(0, now=1000 + wait_ticks(n))
    assert n.drops() == [{}, {"receiver_full": 3}, {}]
    assert n.turn(0, now=LATER) == 0
    assert len(n[0].sent()) == 3


def test_a_receiver_that_took_nothing_gets_no_further_wait_until_it_does():
    n = net(buffers=0, full_wait_us=100)
    n.send(0, frame(mac(1), mac(0)))
    n.turn(0, now=1000)
    now = 1000 + wait_ticks(n)
    n.turn(0, now=now)
    for number in range(3):  # also from another sender
        n.send(2 * (number % 2), frame(mac(1), mac(2 * (number % 2))))
        n.turn(2 * (number % 2), now=now + 1)
    assert n.drops()[1] == {"receiver_full": 4}
    n[1].post(2048)
    n.send(0, frame(mac(1), mac(0), 61), frame(mac(1), mac(0), 62))
    assert n.turn(0, now=now + 2) == 2
    assert n[1].received() == [frame(mac(1), mac(0), 61)]
    assert n.drops()[1] == {"receiver_full": 4}, "it took one: the other may wait again"
    n[1].post(2048)
    n.turn(0, now=now + 3)
    assert n[1].received() == [frame(mac(1), mac(0), 62)]


def test_a_receiver_that_takes_a_little_all_the_time_makes_no_frame_wait_for_ever():
    n = net(buffers=0, full_wait_us=100)
    half = (wait_ticks(n) + 1) // 2  # rounded up: two of them are the whole wait
    frames = [frame(mac(1), mac(0), 60, i) for i in range(60)]
    n.send(0, *frames)
    for step in range(5):
        n[1].post(2048)
        n.turn(0, now=1000 + step * half)
    assert n[1].received() == frames[:3]
    assert n.drops()[1] == {"receiver_full": 57}


def test_copies_of_a_flood_never_wait():
    n = net(buffers=0)
    n[2].post(2048, count=10)
    n.send(0, *[frame(BROADCAST, mac(0), 60, i) for i in range(4)])
    n.run()
    assert len(n[2].received()) == 4
    assert n.drops() == [{}, {"receiver_full": 4}, {}]


def test_without_a_wait_what_does_not_fit_is_dropped_at_once():
    n = net(buffers=0, full_wait_us=0)
    n.send(0, frame(mac(1), mac(0)))
    n.turn(0)
    assert n.drops()[1] == {"receiver_full": 1}
    assert n.turn(0) == 0


@pytest.mark.parametrize("features", [MODERN, PACKED, MODERN | IN_ORDER, PACKED | IN_ORDER])
def test_a_ring_that_stops_while_frames_wait_goes_on_behind_those_delivered(features):
    n = net(buffers=0, features=features)
    n[2].post(2048, count=100)
    to = [1, 2, 1, 2, 2, 1, 1]
    frames = [frame(mac(port), mac(0), 60, i) for i, port in enumerate(to)]
    n.send(0, *frames)
    n.turn(0)
    n[0].restart(1)
    n[1].post(2048, count=100)
    n.run()
    # Those that waited between them are lost, not those behind them.
    assert n.received() == [[], frames[5:], [frames[i] for i in (1, 3, 4)]]
    assert n.drops() == [{"stopped": 2}, {}, {}]
    assert n[0].counters()["from_guest_packets"] == len(n[0].sent()) == len(frames)


@pytest.mark.parametrize("turns", [0, 1])
def test_a_ring_that_stops_in_the_middle_of_a_flood_floods_no_port_twice(turns):
    n = net(4)
    frames = [frame(BROADCAST, mac(0), 60, i) for i in range(2)]
    n.send(0, *frames)
    for _ in range(turns):
        n.turn(0, frames=2)
    n[0].restart(1)
    n.run()
    got = n.received()
    assert got[1] == frames and got[2] == got[3] == ([] if turns else frames)
    assert n[0].drops() == ({"stopped": 2} if turns else {})


# Against a model ----------------------------------------------------------------------------

SIZES = st.one_of(st.integers(20, 200), st.integers(20, 9000), st.sampled_from([65549, 65557]))
SENT = st.tuples(
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, "stranger", "all"]),
    SIZES,
    st.lists(st.integers(1, 300), max_size=6, unique=True),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.lists(SENT, min_size=1, max_size=10)),
        st.tuples(st.just("post"), st.integers(0, 2), st.integers(1, 5)),
        st.tuples(st.just("turn"), st.integers(0, 2)),
    ),
    max_size=25,
)
BUDGETS = st.sampled_from(
    [{}, {"frames": 1}, {"frames": 3}, {"size": 1}, {"size": 2000}, {"frames": 7, "size": 9000}]
)


class Model:
    """What each station must have got: unicasts all and in order, floods in order."""

    def __init__(self, n: Net) -> None:
        self.net = n
        self.tag = 0
        self.unicasts: dict[tuple[int, int], list[bytes]] = {}
        self.floods: dict[tuple[int, int, bytes], list[bytes]] = {}
        self.arrived: list[list[bytes]] = [[] for _ in n.guests]
        self.reflected: Counter[int] = Counter()

    def send(self, source: int, to: int | str, size: int, cuts: list[int]) -> None:
        self.tag += 1
        address = {"stranger": STRANGER, "all": BROADCAST}.get(to) or mac(to)
        data = frame(address, mac(source), size, self.tag)
        self.net[source].send(data, cuts=cuts)
        self.net[source].kick()
        if to == source:
            self.reflected[source] += 1
        elif isinstance(to, int):
            self.unicasts.setdefault((source, to), []).append(data)
        else:
            for other in range(len(self.net.guests)):
                if other != source:
                    self.floods.setdefault((source, other, address), []).append(data)

    def collect(self) -> None:
        for mine, new in zip(self.arrived, self.net.received(), strict=True):
            mine += new

    def check(self) -> None:
        lost: Counter[int] = Counter()
        for receiver, frames in enumerate(self.arrived):
            for source in range(len(self.arrived)):
                flow = [f for f in frames if f[:12] == mac(receiver) + mac(source)]
                assert flow == self.unicasts.get((source, receiver), [])
                for address in (STRANGER, BROADCAST):
                    copies = [f for f in frames if f[:12] == address + mac(source)]
                    expected = self.floods.get((source, receiver, address), [])
                    remaining = iter(expected)
                    assert all(copy in remaining for copy in copies), "order, and each once"
                    lost[receiver] += len(expected) - len(copies)
        for i, drops in enumerate(self.net.drops()):
            expected_drops = {"reflected": self.reflected[i], "receiver_full": lost[i]}
            assert drops == {name: count for name, count in expected_drops.items() if count}


@pytest.mark.parametrize(
    ("features", "buffer"),
    [
        *[(MODERN, (2048,)), (MODERN, (300,)), (MODERN, (100, 500))],
        *[(VERSION_1 | INDIRECT, (66000,)), (PACKED, (300,)), (PACKED, (100, 500))],
        *[(MODERN | IN_ORDER, (300,)), (PACKED | IN_ORDER, (2048,))],
    ],
    ids=[
        *("mergeable", "small", "pieces", "whole", "packed", "packed_pieces"),
        *("split_in_order", "packed_in_order"),
    ],
)
@given(steps=STEPS, budget=BUDGETS)
def test_every_frame_arrives_once_in_order_or_is_counted(features, buffer, steps, budget):
    n = Net(3, features=features, size=1024, memory_bytes=256 << 20)
    model = Model(n)
    for what, *arguments in steps:
        if what == "send":
            for sent in arguments[0]:
                model.send(*sent)
        elif what == "post":
            n[arguments[0]].post(*buffer, count=arguments[1])
        else:
            n.turn(arguments[0], **budget)
            model.collect()
    # Then every receiver gets what it needs, and all is sent.
    for _ in range(100_000):
        for g in n.guests:
            while g.drivers[0].free > 400:
                g.post(*buffer)
        busy = [n.turn(i, **budget) for i in range(3)]
        model.collect()
        if not any(busy):
            break
    model.check()
    for i, g in enumerate(n.guests):
        n.turn(i, now=LATER)
        g.sent()
        assert g.drivers[1].free == 1024
