"""Ports that come and go, are announced, and are polled by several workers."""

import os
import threading
import time

import pytest

from tests.backends.netguest import BROADCAST, IN_ORDER, MODERN, PACKED, Guest, frame, mac
from tests.vswitch.net import MULTICAST, PATIENT_US, STRANGER, net
from vhostpy.backends.net.device import NetDevice
from vhostpy.errors import ConfigError
from vhostpy.runtime.pool import Workers
from vhostpy.vswitch.switch import Switch

# Attaching, detaching, announcing -------------------------------------------------------------


def test_a_detached_port_is_forgotten_and_its_place_given_again():
    n = net(4)
    n.send(0, frame(mac(1), mac(0)))
    n.run()
    n.received()
    n[1].stop()
    n[1].device.close()
    assert [entry[2] for entry in n.switch.fdb.entries()].count(1) == 0
    assert n[1].device.port.index == -1
    n.send(0, frame(mac(1), mac(0)), frame(BROADCAST, mac(0)))
    n.run()
    flooded = [frame(mac(1), mac(0)), frame(BROADCAST, mac(0))]
    assert n.received() == [[], [], flooded, flooded]
    assert NetDevice("new", n.switch).port.index == 1


def test_a_detached_port_takes_its_queues_along():
    n = net(2)
    n[0].device.close()
    assert n.switch.status()["queue_count"] == 1
    assert n.switch.status()["port_count"] == 1


def test_a_port_is_attached_once_and_elsewhere_unknown():
    n = net(1)
    with pytest.raises(ValueError):
        n.switch.attach(n[0].device.port)
    with pytest.raises(ValueError):
        Switch(Workers(1)).detach(n[0].device.port)
    with pytest.raises(ValueError):
        n.switch.open_queue(n[0].device.port, 0)


def test_a_senseless_wait_is_refused():
    with pytest.raises(ConfigError):
        Switch(Workers(1), full_wait_us=-1)


def test_an_announcement_reaches_the_others_and_is_learned():
    n = net()
    n.switch.fdb.flush()
    n.switch.announce(n[1].device.port, STRANGER)
    assert n.switch.injector(n[1].device.port).turn() == 1
    first, mine, third = n.received()
    assert first == third and len(first) == 1 and mine == []
    rarp = first[0]
    assert len(rarp) == 60
    assert rarp[:14] == BROADCAST + STRANGER + b"\x80\x35"
    assert rarp[14:42] == bytes.fromhex("0001 0800 0604 0003") + (STRANGER + bytes(4)) * 2
    assert n.switch.fdb.port_behind(STRANGER) == 1
    n.send(0, frame(STRANGER, mac(0)))
    n.run()
    assert n.received() == [[], [frame(STRANGER, mac(0))], []]


def test_scapy_reads_an_announcement_as_reverse_arp():
    from scapy.layers.l2 import ARP, Ether

    from vhostpy.vswitch.injector import rarp_frame

    packet = Ether(rarp_frame(STRANGER))
    assert packet.type == 0x8035
    arp = ARP(bytes(packet.payload))
    assert (arp.op, arp.hwsrc, arp.hwdst) == (3, STRANGER.hex(":"), STRANGER.hex(":"))


def test_announcements_beyond_what_is_kept_are_lost_and_no_more():
    n = net(2)
    for number in range(200):
        n.switch.announce(n[0].device.port, mac(1000 + number))
    while n.switch.injector(n[0].device.port).turn():
        pass
    assert len(n[1].received()) == 64
    n.switch.announce(n[0].device.port, STRANGER)
    assert n.switch.injector(n[0].device.port).turn() == 1


@pytest.mark.parametrize("address", [BROADCAST, MULTICAST, b"\x02" * 5])
def test_only_a_stations_address_can_be_announced(address):
    n = net(1)
    with pytest.raises(ValueError):
        n.switch.announce(n[0].device.port, address)


def test_status_is_plain_and_counts():
    n = net(2)
    n.send(0, frame(mac(1), mac(0)))
    n.run()
    status = n.switch.status()
    assert (status["port_count"], status["queue_count"], status["fdb_entries"]) == (2, 2, 2)
    assert status["ports"][1] == {"index": 1, "name": "vu1", "queues": [0]}


# With worker threads -----------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["one_worker", "two_workers"])
def workers(request):
    w = Workers(request.param)
    w.start()
    yield w
    w.stop()


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came in time"
        time.sleep(0.001)


@pytest.mark.parametrize(
    "features",
    [MODERN, PACKED, MODERN | IN_ORDER, PACKED | IN_ORDER],
    ids=["split", "packed", "split_in_order", "packed_in_order"],
)
def test_workers_forward_what_guests_send_to_each_other(workers, features):
    switch = Switch(workers, full_wait_us=PATIENT_US)
    kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    guests = [
        Guest(
            NetDevice(f"vu{i}", switch),
            kick_fds=[kicks[i]],
            memory_bytes=512 << 20,
            features=features,
        )
        for i in range(2)
    ]
    for i in range(2):
        switch.fdb.seen(mac(i), i)
    total, sent = 3000, [0, 0]
    got: list[list[bytes]] = [[], []]

    def step() -> bool:
        for i, g in enumerate(guests):
            g.sent()
            got[i] += g.received()
            while g.drivers[0].free:
                g.post(2048)
            while sent[i] < total and g.drivers[1].free:
                g.send(frame(mac(1 - i), mac(i), 60 + sent[i] % 1400, sent[i]))
                sent[i] += 1
            g.kick()
        return len(got[0]) + len(got[1]) == 2 * total

    until(step)
    for i in range(2):
        expected = [frame(mac(i), mac(1 - i), 60 + n % 1400, n) for n in range(total)]
        assert got[i] == expected
        assert guests[i].drops() == {}
    for g in guests:
        g.stop()
    for fd in kicks:
        os.close(fd)


def test_a_kick_wakes_a_worker_that_sleeps_and_so_does_a_replaced_one(workers):
    switch = Switch(workers)
    kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    guests = [Guest(NetDevice(f"vu{i}", switch), kick_fds=[kicks[i]]) for i in range(2)]
    guests[1].post(2048, count=10)
    forwarder = switch.forwarder(guests[0].device.port)
    got: list[bytes] = []
    for number in range(2):
        until(lambda: forwarder.is_parked)
        guests[0].send(frame(BROADCAST, mac(0), 60 + number))
        assert guests[0].drivers[1].kick() or number
        if number:
            os.eventfd_write(kicks[2], 1)
        until(lambda n=number: got.extend(guests[1].received()) or len(got) == n + 1)
        if not number:
            guests[0].device.ring_kick(1, kicks[2])
    assert got == [frame(BROADCAST, mac(0), 60), frame(BROADCAST, mac(0), 61)]
    for g in guests:
        g.stop()
    for fd in kicks:
        os.close(fd)


def test_a_worker_that_sleeps_at_once_keeps_no_buffers_of_a_sender():
    workers = Workers(1, poll="interrupt")
    workers.start()
    kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
    g = Guest(NetDevice("vu0", Switch(workers)), kick_fds=[kick_fd])
    g.send(frame(BROADCAST, mac(0)))
    g.kick()
    until(g.sent)
    g.stop()
    workers.stop()
    os.close(kick_fd)


def test_an_announcement_wakes_a_worker_that_sleeps(workers):
    switch = Switch(workers)
    guests = [
        Guest(NetDevice(f"vu{i}", switch), kick_fds=[os.eventfd(0, os.EFD_NONBLOCK)])
        for i in range(2)
    ]
    guests[1].post(2048, count=10)
    for number in range(3):
        switch.announce(guests[0].device.port, mac(100 + number))
        got: list[bytes] = []
        until(lambda g=got: g.extend(guests[1].received()) or bool(g))
        assert got[0][6:12] == mac(100 + number)
        until(lambda: switch.injector(guests[0].device.port).is_parked)


def test_ports_come_and_go_while_workers_forward(workers):
    switch = Switch(workers, full_wait_us=0)
    sender = Guest(NetDevice("sender", switch), memory_bytes=512 << 20)
    stay = Guest(NetDevice("stay", switch), memory_bytes=512 << 20)
    switch.fdb.seen(mac(1), 1)
    stop = threading.Event()
    got: list[bytes] = []
    number = 0

    def step() -> None:
        nonlocal number
        sender.sent()
        got.extend(stay.received())
        while stay.drivers[0].free:
            stay.post(2048)
        while sender.drivers[1].free > 200:
            sender.send(frame(mac(1), mac(0), 60, number))
            sender.send(frame(BROADCAST, mac(0), 61, number))
            number += 1
        sender.kick()

    for round_ in range(60):
        guest = Guest(NetDevice(f"guest{round_}", switch), memory_bytes=4 << 20)
        guest.post(2048, count=100)
        step()
        guest.received()
        guest.stop()
        step()
        guest.device.close()
    stop.set()
    until(lambda: step() or len(got) > 500)
    tags = [int.from_bytes(f[14:18], "big") for f in got if f[:6] == mac(1)]
    assert tags == sorted(set(tags))
    sender.stop()
    stay.stop()
