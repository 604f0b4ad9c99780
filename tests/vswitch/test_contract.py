"""What any port owes the switch, and the switch any port: one that is no guest shows it."""

import pytest

from tests.backends.netguest import BROADCAST, frame, mac
from tests.scripted import ScriptedPort
from tests.vswitch.net import Net, net


def uplink(n: Net, name: str = "up0") -> ScriptedPort:
    port = ScriptedPort(name)
    n.switch.attach(port)
    n.switch.open_queue(port, 0)
    return port


def test_a_header_that_was_made_in_a_turn_and_its_payload_arrive_as_one_frame():
    n = net()
    up = uplink(n)
    sent = [frame(mac(1), mac(90), size, size) for size in (60, 61, 1514)]
    for each in sent:
        up.send(each)
    assert n.switch.forwarder(up).turn() == 3
    assert n.received() == [[], sent, []]
    assert up.released == 3


def test_stations_of_two_vlans_with_one_address_are_two():
    n = net(0)
    a, b, c = (uplink(n, name) for name in "abc")
    a.send(frame(BROADCAST, mac(7)), vlan=10)
    b.send(frame(BROADCAST, mac(7)), vlan=20)
    for port in (a, b):
        n.switch.forwarder(port).turn()
    before = a.received, b.received
    # In one burst: the answer for one VLAN is not the other's.
    for vlan in (10, 20, 10, 20, 20):
        c.send(frame(mac(7), mac(8)), vlan=vlan)
    n.switch.forwarder(c).turn()
    assert (a.received - before[0], b.received - before[1]) == (2, 3)


@pytest.mark.parametrize("how", ["frames", "bytes", "steps"])
def test_a_turn_is_spent_by_what_the_port_charges(how):
    """Segments, or the time of system calls: the switch sees neither in the frames."""
    n = net(3)
    up = uplink(n)
    budget = {"frames": {"frames": 100}, "bytes": {"size": 10_000}, "steps": {"steps": 100}}[how]
    up.segments, up.steps = (1, 100) if how == "steps" else (100, 0)
    # Two groups: the uplink's first. It spends the turn; the other waits for the next one.
    n.send(0, frame(mac(9), mac(0)), frame(mac(1), mac(0)))
    n.switch.fdb.seen(mac(9), up.index)
    n.turn(0, **budget)
    assert (up.received, n.received()[1]) == (1, [])
    n.turn(0, **budget)
    assert (up.received, n.received()[1]) == (1, [frame(mac(1), mac(0))])


def test_a_flood_stops_behind_the_port_that_spent_the_turn():
    n = net(1)
    ups = [uplink(n, f"up{i}") for i in range(3)]
    ups[0].segments = 1000
    n.send(0, frame(BROADCAST, mac(0)))
    n.turn(0)
    assert [up.received for up in ups] == [1, 0, 0]
    n.turn(0)
    assert [up.received for up in ups] == [1, 1, 1]


def test_full_receivers_of_a_flood_spend_the_turn_too():
    n = net(5, buffers=0)
    n.send(0, frame(BROADCAST, mac(0)))
    n.turn(0, frames=2)
    assert sum(drops.get("receiver_full", 0) for drops in n.drops()) == 2
    n.run()
    assert sum(drops.get("receiver_full", 0) for drops in n.drops()) == 4


def test_everyone_is_everyone_where_ports_left_holes():
    n = net(0)
    ports = [uplink(n, f"up{i}") for i in range(130)]
    stay = [ports[i] for i in (0, 1, 63, 64, 65, 127, 128, 129)]
    for port in ports:
        if port not in stay:
            n.switch.detach(port)
    stay[3].send(frame(BROADCAST, mac(5)))
    n.switch.forwarder(stay[3]).turn()
    assert [port.received for port in stay] == [1, 1, 1, 0, 1, 1, 1, 1]
    assert sum(port.received for port in ports) == 7
