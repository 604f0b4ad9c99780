"""A switch with guests on it, whose turns are taken by hand."""

from tests.backends.netguest import Guest, mac
from vhostpy.backends.net.device import NetDevice
from vhostpy.runtime.pool import Workers
from vhostpy.vswitch.switch import Switch

STRANGER = mac(999)
MULTICAST = b"\x33\x33\x00\x00\x00\x01"
PATIENT_US = 1_000_000  # longer than any test takes
LATER = 1 << 63


class Net:
    """A switch with guests on it; station i is behind guest i. Turns are taken by hand."""

    def __init__(self, guests: int = 3, *, full_wait_us: int = PATIENT_US, **more) -> None:
        self.switch = Switch(Workers(1), full_wait_us=full_wait_us)
        self.guests = [
            Guest(NetDevice(f"vu{i}", self.switch), **{"size": 256, **more}) for i in range(guests)
        ]
        for i in range(guests):
            self.switch.fdb.seen(mac(i), i)

    def __getitem__(self, i: int) -> Guest:
        return self.guests[i]

    def send(self, i: int, *frames: bytes) -> None:
        for data in frames:
            self[i].send(data)
        self[i].kick()

    def turn(self, i: int, **budget: int) -> int:
        return self.switch.forwarder(self[i].device.port).turn(**budget)

    def run(self, **budget: int) -> None:
        """Turns until nothing is left to do, and all senders have paused."""
        there = [i for i, g in enumerate(self.guests) if g.device.status()["rings_started"]]
        while sum(self.turn(i, **budget) for i in there):
            pass
        for i in there:
            self.turn(i, now=LATER)

    def received(self) -> list[list[bytes]]:
        return [g.received() for g in self.guests]

    def drops(self) -> list[dict[str, int]]:
        return [g.drops() for g in self.guests]


def net(guests: int = 3, buffers: int = 200, **more) -> Net:
    n = Net(guests, **more)
    for g in n.guests:
        if buffers:
            g.post(2048, count=buffers)
    return n
