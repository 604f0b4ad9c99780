"""The whole net path: random traffic between guests of all kinds, over real sockets.

Every frame arrives once, intact and in the order of its flow, or is counted as dropped,
while rings stop and go on, are disabled, and move to other memory.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.hostile.victim import eventually
from tests.rings import LAYOUTS
from tests.serving import serving
from tests.vswitch.traffic import Ledger, Station, mac_of
from vhostpy.backends.net.device import NetDevice
from vhostpy.runtime.pool import Workers
from vhostpy.server.listen import Server
from vhostpy.vswitch.switch import Switch

PAIRS = 2


class Network:
    """Stations on one switch, and what is on its way between them."""

    def __init__(self, devices: list[NetDevice], stations: list[Station], ledger: Ledger) -> None:
        self.devices, self.stations, self.ledger = devices, stations, ledger
        self.before = [counters_of(device) for device in devices]

    @property
    def chains(self) -> int:
        return sum(station.chains for station in self.stations)

    def step(self, dice: random.Random) -> None:
        """A little traffic, and now and then a change."""
        station = dice.choice(self.stations)
        for queue in range(station.pairs):
            self.burst(station, queue, dice.choice((1, 10, 70)))
        for other in self.stations:
            other.collect_sent()
            other.receive()
            if dice.random() < 0.03:
                other.lazy = not other.lazy
            if not other.lazy:
                other.post(dice.choice((1, 20, 100)))
        if dice.random() < 0.1:
            self.change(dice)

    def burst(self, station: Station, queue: int, count: int) -> None:
        for _ in range(count):
            # Floods come from the first only: its rings of frames to send never stop, so
            # that each copy of a frame that was not lost by a receiver arrives.
            if not station.send(queue, len(self.stations), floods=station.port == 0):
                break
        station.ring(2 * queue + 1).kick()

    def change(self, dice: random.Random) -> None:
        station = dice.choice(self.stations)
        index = dice.randrange(2 * station.pairs)
        if index & 1 and station.port == 0:
            station.new_memory_table()
            return
        match dice.randrange(5):
            case 0:
                station.stop(index)
            case 1:
                station.resume(index)
            case 2:
                if index & 1:
                    self.burst(station, index // 2, 70)  # some of it waits for a receiver
                station.stop(index)
                station.resume(index)
            case 3:
                station.enable(index, index in station.disabled)
            case 4:
                station.new_memory_table()

    def drain(self) -> None:
        """All rings run until everything sent has come back."""
        for station in self.stations:
            station.settle()

        def is_empty() -> bool:
            for station in self.stations:
                station.receive()
                station.post(100)
                station.collect_sent()
            return all(not places for s in self.stations for places in s.places[1::2])

        eventually(is_empty, "the end of all that was sent")
        for station in self.stations:
            station.receive()
        self.ledger.settle()

    def check(self) -> None:
        """The sums over all counters, and the reasons of the sender that is never disabled."""
        total: Counter = Counter()
        for device, station, before in zip(self.devices, self.stations, self.before, strict=True):
            counters = counters_of(device)
            counters.subtract(before)
            assert counters["from_guest_packets"] == sum(station.sent)
            assert counters["to_guest_packets"] == self.ledger.arrived[station.port]
            assert counters["to_guest_bytes"] == self.ledger.arrived_bytes[station.port]
            if station.port == 0:
                assert station.expected.items() <= drops_of(counters).items()
                assert counters["chain_faults.unmapped"] == station.expected["bad_chain"]
            total += counters
        drops = drops_of(total)
        expected = sum((station.expected for station in self.stations), Counter())
        assert drops.total() == self.ledger.lost.total() + expected.total(), (drops, expected)


def counters_of(device: NetDevice) -> Counter:
    """Sums over all queues, flat."""
    flat: Counter = Counter()
    for queue in device.status()["queues"]:
        for name, value in queue.items():
            if isinstance(value, dict):
                flat.update({f"{name}.{below}": count for below, count in value.items()})
            elif name != "index":
                flat[name] += value
    return flat


def drops_of(counters: Counter) -> Counter:
    names = [name for name in counters if name.startswith("drops.") and counters[name]]
    return Counter({name.removeprefix("drops."): counters[name] for name in names})


@contextmanager
def serving_switch(place: Path, dice: random.Random, ports: int) -> Iterator[list[Server]]:
    """Servers of the ports of one switch, which some workers poll."""
    workers = Workers(dice.randint(1, 3))
    switch = Switch(workers, full_wait_us=dice.choice((0, 100, 5000, 50_000)))
    devices = [NetDevice(f"vu{port}", switch, pairs=PAIRS) for port in range(ports)]
    servers = [Server(device, path=str(place / device.name)) for device in devices]
    workers.start()
    try:
        with serving(*servers):
            yield servers
    finally:
        workers.stop()


@contextmanager
def connected(
    servers: list[Server], dice: random.Random, layouts: Sequence[str]
) -> Iterator[Network]:
    """A station on each port, of one of the layouts."""
    ledger, devices = Ledger(), [server.device for server in servers]
    with ExitStack() as stack:
        stations = []
        for port, server in enumerate(servers):
            for queue in range(PAIRS):
                server.device.switch.fdb.seen(mac_of(port, queue), port)
            pairs, layout = dice.randint(1, PAIRS), dice.choice(layouts)
            stations.append(Station(server.path, port, ledger, dice, pairs, layout))
            stack.callback(stations[-1].end.close)
        yield Network(devices, stations, ledger)
    for server in servers:
        eventually(lambda s=server: s.connection is None, "the session's end")


def exchange(net: Network, dice: random.Random, chains: int) -> int:
    """So many chains, both ways together, and a look at what became of them."""
    while net.chains < chains:
        net.step(dice)
    net.drain()
    net.check()
    return net.chains


def run(place: Path, seed: int, chains: int) -> int:
    """Traffic in a network of its own; how many chains it was."""
    dice = random.Random(seed)
    with (
        serving_switch(place, dice, dice.randint(2, 4)) as servers,
        connected(servers, dice, LAYOUTS) as net,
    ):
        return exchange(net, dice, chains)


@pytest.mark.parametrize("seed", range(10))
def test_every_frame_arrives_once_in_order_or_is_counted(tmp_path, seed):
    run(tmp_path, seed, 15_000)


def test_front_ends_of_either_layout_take_turns_on_one_process(tmp_path):
    dice = random.Random(1)
    with serving_switch(tmp_path, dice, 2) as servers:
        for layout in ("split", "packed", "split", "packed", "packed", "split"):
            with connected(servers, dice, [layout]) as net:
                # Rings stop at random: how much arrives in a time is chance, but not whether.
                def arrives_at_both(net=net):
                    net.step(dice)
                    return min(net.ledger.arrived[port] for port in range(2)) > 20

                eventually(arrives_at_both, f"traffic both ways, {layout}")
                exchange(net, dice, 2000)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_frame_of_10_million_chains_arrives_or_is_counted(tmp_path):
    done, seed = 0, 1000
    while done < 10_000_000:
        done += run(tmp_path, seed, 250_000)
        seed += 1
