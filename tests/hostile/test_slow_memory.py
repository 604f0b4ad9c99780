"""Guests whose memory makes whoever touches it wait: their neighbours wait twice at most."""

import time

import pytest

from tests.backends.netguest import Guest, frame, mac
from tests.hostile.pagefaults import PAGE, PageFaults
from vhostpy.backends.net.device import NetDevice
from vhostpy.runtime.pool import Workers
from vhostpy.vswitch.switch import Switch

HELD, LENGTH = 32 << 20, 16 << 20
STALL_S = 0.01  # longer than what a worker takes for a busy poll
DEADLINE_S = 20


class Neighbours:
    """A hostile guest, part of whose memory is slow, and two innocent ones; real workers."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = Workers(workers)
        self.switch = Switch(self.workers, full_wait_us=0)
        self.hostile, *self.innocent = (
            Guest(NetDevice(f"vu{i}", self.switch), memory_bytes=256 << 20) for i in range(3)
        )
        for i in range(3):
            self.switch.fdb.seen(mac(i), i)
        for guest in self.innocent:
            guest.post(2048, count=200)
        self.faults = PageFaults(self.hostile.memory, HELD, LENGTH)
        self.page = HELD
        self.tag = 0

    def __enter__(self):
        self.workers.start()
        return self

    def __exit__(self, *_):
        self.faults.__exit__()
        self.workers.stop()

    def slow_page(self) -> int:
        self.page += PAGE
        return self.page - PAGE

    def exchange(self) -> None:
        """The innocent reach each other, now."""
        for sender, receiver, to, source in ((0, 1, 2, 1), (1, 0, 1, 2)):
            self.tag += 1
            data = frame(mac(to), mac(source), 60, self.tag)
            self.innocent[sender].send(data)
            self.innocent[sender].kick()
            eventually(lambda g=self.innocent[receiver], d=data: d in g.received())

    def stall(self) -> None:
        """The fault that comes lasts for a while."""
        page = self.faults.begun()
        time.sleep(STALL_S)
        self.faults.end(page)


def eventually(condition):
    end = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.0005)
    return value


@pytest.mark.parametrize("behind", ["the header", "the snapshot"])
def test_a_sender_with_slow_memory_is_polled_apart_and_no_receiver_is_blamed(behind):
    with Neighbours() as n:

        def send():
            whole = [(n.slow_page(), 1000)]
            if behind == "the snapshot":
                start = n.hostile.allocate(72)
                n.hostile.memory.write(start, bytes(12) + frame(mac(1), mac(0)))
                whole.insert(0, (start, 72))
            n.hostile.drivers[1].add(whole, [])
            n.hostile.kick()

        for _ in range(2):
            send()
            n.stall()
            n.exchange()
        assert eventually(n.workers.isolate) == ["vu0"]
        for _ in range(3):
            send()
            page = n.faults.begun()
            n.exchange()  # while it lasts
            n.faults.end(page)
        assert n.workers.isolate() == []
        assert n.switch.forwarder(n.hostile.device.port).worker == 1
        for guest in n.innocent:
            assert guest.drops() == {}
        eventually(lambda: n.hostile.counters()["from_guest_packets"] == 5)
        # Its rings stay there when they start again: nothing is learned anew.
        n.hostile.restart(1)
        assert n.switch.forwarder(n.hostile.device.port).worker == 1
        n.exchange()


def test_a_receiver_with_slow_memory_gets_nothing_for_a_while_and_no_sender_is_blamed():
    with Neighbours() as n:
        for _ in range(4):
            n.hostile.post_bad([(n.slow_page(), 2048)])

        def send():
            n.tag += 1
            n.innocent[0].send(frame(mac(0), mac(1), 60, n.tag))
            n.innocent[0].kick()

        for _ in range(2):
            send()
            n.stall()
            n.exchange()
        for i in range(3):
            send()
            eventually(lambda i=i: n.hostile.drops() == {"receiver_slow": i + 1})
            n.exchange()
        assert n.workers.isolate() == []
        assert n.hostile.counters()["to_guest_packets"] == 2


def test_a_worker_does_not_wait_for_another_that_waits_for_a_receivers_memory():
    with Neighbours(workers=2) as n:
        first, second = n.innocent
        homes = [n.switch.forwarder(g.device.port).worker for g in n.innocent]
        assert homes[0] != homes[1]
        n.hostile.post_bad([(n.slow_page(), 2048)])
        first.send(frame(mac(0), mac(1)))
        first.kick()
        page = n.faults.begun()
        second.send(frame(mac(0), mac(2)))
        second.send(frame(mac(1), mac(2)))
        second.kick()
        eventually(lambda: first.received() == [frame(mac(1), mac(2))])
        assert n.hostile.drops() == {"receiver_full": 1}
        n.faults.end(page)
