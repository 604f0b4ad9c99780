"""Network cases: what is sent, by whom, and what vhostpy is to reach."""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.devices import Device, Ovs, Testpmd, Vhostpy
from bench.peers.generators import dpdk, own_net
from bench.peers.interleave import interleave
from bench.peers.results import Results
from vhostpy.load._net import Touch
from vhostpy.load.net import IMIX

UNKIND = {"touch": Touch.HEADER}
WHOLE = {"touch": Touch.FRAME}
SIZES = (64, 128, 256, 512, 1024, 1500)


@dataclass(frozen=True)
class Case:
    """One row: a generator with its settings, and the ratios to be reached."""

    name: str
    text: str
    generator: Callable[..., dict[str, Any]] = own_net
    plan: dict[str, Any] = field(default_factory=dict)
    goals: dict[str, float] = field(default_factory=dict)
    ports: int = 2
    peers: tuple[str, ...] = ("testpmd", "ovs")
    unit: str = "Mpps"
    chart: float | None = None  # its place on the chart's axis
    lower_is_better: bool = False


def _sizes() -> list[Case]:
    return [
        Case(f"{size}B-split", f"{size} B, split, whole frame touched",
             plan={"sizes": (size,), **WHOLE}, chart=size,
             goals={"testpmd": 2.5, "ovs": 2.7} if size == 1500 else {})
        for size in SIZES
    ]  # fmt: skip


CASES = [
    Case("64B-header", "64 B, split, headers touched", plan=UNKIND,
         goals={"testpmd": 2.4, "ovs": 3.0}),
    Case("64B-packed", "64 B, packed, headers touched", plan={"layout": "packed", **UNKIND},
         goals={"testpmd": 2.0, "ovs": 2.7}),
    *_sizes(),
    Case("dpdk-64B-split", "64 B, split, DPDK's virtio-user", dpdk, {"size": 64},
         {"testpmd": 1.5, "ovs": 2.1}),
    Case("dpdk-64B-packed", "64 B, packed, DPDK's virtio-user", dpdk,
         {"size": 64, "vdev": ",packed_vq=1"}, {"testpmd": 1.6, "ovs": 2.4}),
    Case("dpdk-1500B-split", "1500 B, split, DPDK's virtio-user", dpdk, {"size": 1500},
         {"testpmd": 1.4, "ovs": 1.6}),
    Case("imix", "IMIX, split, headers touched", plan={"sizes": IMIX, **UNKIND},
         goals={"ovs": 3.0}),
    Case("macs-30000", "64 B, 30,000 MAC pairs", plan={"macs": 30000, **UNKIND},
         goals={"ovs": 3.0}),
    Case("queue-256", "64 B, queues of 256", plan={"queue_size": 256, **UNKIND},
         goals={"ovs": 3.0}),
    Case("9000B", "9,000 B, mergeable buffers", plan={"sizes": (9000,), **WHOLE},
         peers=("testpmd",), goals={"testpmd": 2.0}),
    Case("65535B", "64 KiB, mergeable buffers", plan={"sizes": (65549,), **WHOLE}, peers=()),
    Case("flood-8", "64 B broadcast from one of 8 ports",
         plan={"broadcast": True, "senders": 1, **UNKIND}, ports=8, peers=("ovs",),
         goals={"ovs": 2.0}),
    Case("latency", "64 B, one frame in flight: p50", unit="us", lower_is_better=True,
         plan={"window": 1, "latency": True, **UNKIND}, goals={"testpmd": 1.0}),
]  # fmt: skip


def run(cases: list[Case], results: Results, options: argparse.Namespace) -> None:
    """Runs all cases, those of one number of ports together."""
    for ports in sorted({case.ports for case in cases}):
        with tempfile.TemporaryDirectory(prefix="bp") as folder:
            group = [case for case in cases if case.ports == ports]
            devices = _start(Path(folder), ports, group, options)
            try:
                for case in group:
                    used = [device for name, device in devices.items()
                            if name == "vhostpy" or name in case.peers]  # fmt: skip
                    interleave(case, used, results, options)
            finally:
                for device in devices.values():
                    device.close()


def _start(
    folder: Path, ports: int, cases: list[Case], options: argparse.Namespace
) -> dict[str, Device]:
    wanted = {"vhostpy", *(peer for case in cases for peer in case.peers)}
    devices: dict[str, Device] = {}
    for kind in (Vhostpy, Testpmd, Ovs):
        if kind.name in wanted and (not options.devices or kind.name in options.devices):
            device: Device = (
                Vhostpy(folder, ports, "net", "--fdb-limit", "65536")
                if kind is Vhostpy
                else kind(folder, ports)
            )
            devices[kind.name] = device
            device.start()
            device.pause()
    return devices
