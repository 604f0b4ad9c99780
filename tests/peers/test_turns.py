"""Front-ends of different makers in turn on one running switch: DPDK's virtio-user, QEMU, ours."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.peers.devices import Interactive
from tests.hostile.victim import eventually
from tests.peers import traffic
from tests.peers.backend import Backend, Footprint, assert_flat
from tests.peers.guest import Guest, boot
from tests.peers.qemu import Nic, qemu10
from vhostpy.load import net, report
from vhostpy.load.net_loop import Touch

pytestmark = [pytest.mark.guest, pytest.mark.timeout(200)]

MACS = "02:00:00:00:00:01", "02:00:00:00:00:02"


def ours(sockets: list[str], layout: str) -> None:
    """Every byte of what passes is checked."""
    plan = net.NetPlan(
        tuple(sockets), seconds=0.2, warmup_s=0.05, layout=layout, touch=Touch.FRAME, verify=True
    )
    result = net.run(plan)
    assert result["received_packets"] > 1000 and report.wrong(result) == ""


def dpdk(sockets: list[str], layout: str) -> None:
    """Packets that each port sends on to the other, round and round."""
    memory = ["--no-huge"]  # a memfd then
    for number, (path, mac) in enumerate(zip(sockets, MACS, strict=True)):
        device = f"net_virtio_user{number},path={path},mac={mac},queue_size=256"
        memory += ["--vdev", device + (",packed_vq=1" if layout == "packed" else "")]
    testpmd = Interactive(0, "vhostpy-turns", memory, [])

    def received() -> list[int]:
        text = testpmd.command("show port stats all")
        return [int(count) for count in re.findall(r"RX-packets:\s+(\d+)", text)]

    try:
        testpmd.command(f"set eth-peer 0 {MACS[1]}")
        testpmd.command(f"set eth-peer 1 {MACS[0]}")
        testpmd.command("set fwd mac")
        testpmd.command("start tx_first 2")
        eventually(lambda: min(received()) > 10_000, "traffic both ways")
        testpmd.command("stop")
    finally:
        testpmd.close()


def qemu(sockets: list[str], layout: str) -> None:
    """Two Linux guests that ping each other."""
    with ExitStack() as stack:
        guests = [
            Guest(
                name, Path(path).parent / f"{name}-{layout}", qemu=qemu10(), memory_mib=512,
                nics=[Nic(Path(path), mac, packed=layout == "packed")],
            )
            for name, path, mac in zip("ab", sockets, MACS, strict=True)
        ]  # fmt: skip
        for guest in guests:
            stack.callback(guest.close)
        boot(*guests)
        for number, guest in enumerate(guests, 1):
            guest.set_address(f"10.0.0.{number}/24")
        pinged = traffic.ping(guests[0], "10.0.0.2", count=20)
        assert pinged.received == pinged.sent, pinged.output


TURNS: list[tuple[Callable[[list[str], str], None], str]] = [
    (ours, "split"), (dpdk, "split"), (qemu, "packed"), (dpdk, "packed"), (ours, "packed"),
    (dpdk, "split"),
]  # fmt: skip


def test_front_ends_of_all_makers_and_layouts_follow_each_other_on_one_switch(directory: Path):
    sockets = [str(directory / "turn0"), str(directory / "turn1")]
    arguments = [word for path in sockets for word in ("--socket", path)]
    with Backend("net", *arguments, directory=directory) as backend:

        def is_quiet() -> bool:
            return not any(s["connected"] for s in backend.status()["sockets"])

        before: Footprint | None = None
        for front_end, layout in TURNS:
            front_end(sockets, layout)
            eventually(is_quiet, "a front-end that is gone")
            backend.check()
            before = before or backend.footprint()
        assert_flat(before, backend.footprint())
        for port in json.loads(backend.ask("stats", "--json"))["ports"]:
            assert sum(queue["from_guest_packets"] for queue in port["queues"]) > 10_000
            for queue in port["queues"]:
                assert not any(queue["chain_faults"].values()), queue
                assert not any(queue["buffer_faults"].values()), queue
