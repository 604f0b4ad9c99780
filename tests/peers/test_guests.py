"""Two Linux guests under QEMU on one switch: what they exchange arrives, whatever they do.

Guests cost seconds to boot, so each pair serves all tests of its kind.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.peers import traffic
from tests.peers.backend import Backend, Footprint, assert_flat
from tests.peers.guest import Guest, boot
from tests.peers.qemu import Nic, Qemu, qemu7, qemu10, qemu11
from vhostpy._spec import Feature

pytestmark = [pytest.mark.guest, pytest.mark.timeout(200)]

A, B = "10.0.0.1", "10.0.0.2"


@dataclass(frozen=True, slots=True)
class Network:
    backend: Backend
    a: Guest
    b: Guest
    pairs: int
    mtu: int
    packed: bool

    @property
    def guests(self) -> tuple[Guest, Guest]:
        return self.a, self.b


def start_network(
    stack: ExitStack,
    directory: Path,
    qemu: Qemu,
    *,
    pairs: int = 1,
    mtu: int = 1500,
    packed: bool = False,
    in_order: bool = False,
) -> Network:
    """A switch of two ports with a booted guest at each, addresses set."""
    directory.mkdir(exist_ok=True)
    sockets = [directory / "vu0", directory / "vu1"]
    arguments: list[str | Path] = ["--socket", sockets[0], "--socket", sockets[1]]
    if mtu != 1500:
        arguments += ["--mtu", str(mtu)]
    backend = stack.enter_context(Backend("net", *arguments, directory=directory))
    guests = [
        Guest(
            name, directory / name, qemu=qemu, cpus=pairs, memory_mib=512,
            nics=[Nic(socket, f"52:54:00:00:00:0{number}", pairs,
                      host_mtu=mtu if mtu != 1500 else None, packed=packed, in_order=in_order)],
        )
        for number, (name, socket) in enumerate(zip("ab", sockets, strict=True), 1)
    ]
    for guest in guests:
        stack.callback(guest.close)
    boot(*guests)
    for guest, address in zip(guests, (A, B), strict=True):
        guest.set_address(f"{address}/24")
    return Network(backend, guests[0], guests[1], pairs, mtu, packed)


# QEMU 7.2 is what Debian 12 has (INTx under TCG; it repeats messages for each pair), QEMU 10
# has MSI-X, QEMU 11 shows IN_ORDER to the guest besides. Those that `make test` has time for,
# and the others.
NETWORKS: dict[str, tuple[Callable[[], Qemu], dict[str, Any]]] = {
    "qemu10": (qemu10, {}),
    "qemu10-packed": (qemu10, {"packed": True}),
    "qemu10-4pairs-mtu9000": (qemu10, {"pairs": 4, "mtu": 9000}),
    "qemu7-4pairs": (qemu7, {"pairs": 4}),
    "qemu10-4pairs": (qemu10, {"pairs": 4}),
    "qemu10-4pairs-packed": (qemu10, {"pairs": 4, "packed": True}),
    "qemu10-mtu9000": (qemu10, {"mtu": 9000}),
    "qemu7": (qemu7, {}),
    "qemu7-packed": (qemu7, {"packed": True}),
    "qemu7-4pairs-mtu9000": (qemu7, {"pairs": 4, "mtu": 9000}),
    "qemu11": (qemu11, {}),
    "qemu11-packed": (qemu11, {"packed": True}),
    "qemu11-2pairs-in-order": (qemu11, {"pairs": 2, "in_order": True}),
}


def networks(*short: str, without: str = "none") -> list[Any]:
    """All networks as parameters; those not in `short` run only in the long tests."""
    return [pytest.param(name, marks=[] if name in short else pytest.mark.long)
            for name in NETWORKS if not name.startswith(without)]


@pytest.fixture(
    scope="module",
    params=networks("qemu10", "qemu10-packed", "qemu10-4pairs-mtu9000", "qemu7-4pairs"))
def network(request: pytest.FixtureRequest, directory: Path) -> Iterator[Network]:
    qemu, kind = NETWORKS[request.param]
    with ExitStack() as stack:
        yield start_network(stack, directory / request.param, qemu(), **kind)


def assert_ping(guest: Guest, address: str, **how: int) -> None:
    pinged = traffic.ping(guest, address, **how)
    assert pinged.received == pinged.sent, pinged.output


def assert_answers(guest: Guest, address: str) -> None:
    """Once in five: streams without flow control fill the queues that pings go through."""
    pinged = traffic.ping(guest, address, count=5)
    assert pinged.received > 0, pinged.output


def test_guests_see_what_was_agreed(network: Network) -> None:
    for guest in network.guests:
        assert guest.check("cat /sys/class/net/eth0/mtu") == str(network.mtu)
        queues = guest.check("ls /sys/class/net/eth0/queues").split()
        assert sorted(queues) == sorted(
            f"{way}-{index}" for way in ("rx", "tx") for index in range(network.pairs))
        features = guest.check("cat /sys/class/net/eth0/device/features")
        assert features[Feature.RING_PACKED] == str(int(network.packed))


def test_pings_of_all_sizes_come_back(network: Network) -> None:
    for size in (56, 1472, network.mtu - 28):
        there_and_back = traffic.start_ping(network.b, A, size=size)
        assert_ping(network.a, B, size=size)
        pinged = traffic.pinged(there_and_back.wait().output)
        assert pinged.received == pinged.sent, pinged.output


def test_tcp_moves_100_mib_intact(network: Network) -> None:
    transfer = traffic.send_over_tcp(network.a, network.b, B, mib=100)
    assert transfer.received_sum == transfer.sent_sum


def test_tcp_streams_in_both_ways_at_once_stay_intact(network: Network) -> None:
    """Four streams, so that with four pairs several queues carry data at once."""
    script = ("for port in 6001 6002 6003 6004; do dd if=/dev/urandom of=/tmp/s$port bs=1M count=4 "
              "2> /dev/null; done; sha256sum /tmp/s6* | cut -d' ' -f1")
    ends = {network.a: (network.b, B), network.b: (network.a, A)}
    sums = {guest: guest.check(script).split() for guest in ends}
    jobs = []
    for guest in ends:
        for port in range(6001, 6005):
            guest.check(f"printf '#!/bin/sh\\ncat > /tmp/r{port}\\n' > /tmp/t{port}; "
                        f"chmod +x /tmp/t{port}")
            jobs.append(guest.background(f"nc -l -p {port} -e /tmp/t{port}"))
        guest.check("until [ $(netstat -ltn | grep -c ':600[1-4] ') = 4 ]; do usleep 10000; done")
    for guest, (_, address) in ends.items():
        jobs += [guest.background(f"nc {address} {port} < /tmp/s{port}")
                 for port in range(6001, 6005)]
    for job in jobs:
        assert job.wait(60).status == 0
    for guest, (peer, _) in ends.items():
        assert peer.check("sha256sum /tmp/r600[1-4] | cut -d' ' -f1").split() == sums[guest]
        peer.check("rm /tmp/r600[1-4]")


# --- guests that restart under traffic ----------------------------------------------------

RELOAD = "rmmod virtio_net && insmod /modules/virtio_net.ko"


# To us QEMU 11 comes and goes as QEMU 10 does: an hour for the same again is too much.
@pytest.fixture(scope="module", params=networks("qemu10-4pairs", without="qemu11"))
def restless(request: pytest.FixtureRequest, directory: Path) -> Iterator[Network]:
    """A pair of guests whose traffic never ends; guest a is the one that comes and goes."""
    qemu, kind = NETWORKS[request.param]
    with ExitStack() as stack:
        network = start_network(stack, directory / f"restless-{request.param}", qemu(), **kind)
        network.b.check("printf '#!/bin/sh\\ncat > /dev/null\\n' > /tmp/sink; chmod +x /tmp/sink")
        network.b.background("nc -ll -p 7000 -e /tmp/sink")
        # Towards guest a nothing waits for an answer, so it flows while a is away, too.
        network.b.check(f"arp -s {A} 52:54:00:00:00:01")
        network.b.background("while :; do dd if=/dev/zero bs=1400 count=100 2> /dev/null; "
                             f"usleep 1000; done | nc -u {A} 7001")
        network.b.background(f"ping -i 0.01 {A}")
        yield network


def bring_back(network: Network) -> None:
    """Guest a is up again: its address, its own stream towards b, and proof that both work."""
    network.a.set_address(f"{A}/24")
    assert_answers(network.a, B)
    network.a.check(f"nc {B} 7000 < /dev/zero > /dev/null 2>&1 &")


def reload_driver(network: Network, times: int) -> None:
    bring_back(network)
    before: Footprint | None = None
    for _ in range(times + 1):  # the first warms what stays
        network.a.check(RELOAD, timeout_s=60)
        bring_back(network)
        before = before or network.backend.footprint()
    assert before is not None
    assert_flat(before, network.backend.footprint())
    assert_still_serving(network)


def reboot(network: Network, times: int) -> None:
    before: Footprint | None = None
    for number in range(times + 1):
        # An orderly end, and the reset button under a running driver.
        if number % 2:
            network.a.reset()
        else:
            network.a.reboot()
        bring_back(network)
        before = before or network.backend.footprint()
    assert before is not None
    assert_flat(before, network.backend.footprint())
    assert_still_serving(network)


def assert_still_serving(network: Network) -> None:
    network.a.check("killall nc; true")
    transfer = traffic.send_over_tcp(network.a, network.b, B, mib=10)
    assert transfer.received_sum == transfer.sent_sum
    network.backend.check()


def test_driver_reloads_under_traffic(restless: Network) -> None:
    reload_driver(restless, times=10)


def test_guest_reboots_under_traffic(restless: Network) -> None:
    reboot(restless, times=2)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_driver_reloads_100_times_under_traffic(restless: Network) -> None:
    reload_driver(restless, times=100)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_guest_reboots_20_times_under_traffic(restless: Network) -> None:
    reboot(restless, times=20)


def replace_guest(network: Network, times: int) -> None:
    """QEMU is killed and another one takes the port; its neighbour talks on meanwhile."""
    before: Footprint | None = None
    for _ in range(times + 1):
        network.a.process.process.kill()
        network.a.close()
        boot(network.a)
        network.a.set_address(f"{A}/24")
        assert_answers(network.a, B)
        before = before or network.backend.footprint()
    assert before is not None
    assert_flat(before, network.backend.footprint())
    assert_still_serving(network)


def test_port_outlives_a_killed_qemu(restless: Network) -> None:
    replace_guest(restless, times=2)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_port_outlives_100_killed_qemus(restless: Network) -> None:
    replace_guest(restless, times=100)
