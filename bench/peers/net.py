"""Network cases: what is sent, by whom, and what vhostpy is to reach."""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.peers.case import Case
from bench.peers.crowd import PORTS, Crowd
from bench.peers.devices import Device, Ovs, Testpmd, Vhostpy
from bench.peers.generators import dpdk, idle, own_net
from bench.peers.interleave import run_group
from bench.peers.results import Results
from bench.peers.turns import APART, CROSSING, TwoWorkers, WorkerEach, by_turns
from vhostpy.load.net import IMIX
from vhostpy.load.net_loop import Touch

UNKIND = {"touch": Touch.HEADER}
WHOLE = {"touch": Touch.FRAME}
SIZES = (64, 128, 256, 512, 1024, 1500)
ONE_FRAME = {"window": 1, "latency": True, **UNKIND}
# Seldom enough that the device sleeps in between, and from one side only: each frame wakes it.
SELDOM = {**ONE_FRAME, "rate_pps": 1000.0, "senders": 1}

rate = partial(Case, generator=own_net, peers=("testpmd", "ovs"), unit="Mpps")
latency = partial(
    rate, unit="us", figure="latency_p50_us", lower_is_better=True, saturates=False,
    peers=("testpmd",),
)  # fmt: skip


def _sizes() -> list[Case]:
    return [
        rate(f"{size}B-split", f"{size} B, split, whole frame touched",
             plan={"sizes": (size,), **WHOLE}, chart=size,
             goals={"testpmd": 2.5, "ovs": 2.7} if size == 1500 else {})
        for size in SIZES
    ]  # fmt: skip


CASES = [
    rate("64B-header", "64 B, split, headers touched", plan=UNKIND,
         goals={"testpmd": 2.4, "ovs": 3.0}),
    rate("64B-packed", "64 B, packed, headers touched", plan={"layout": "packed", **UNKIND},
         goals={"testpmd": 2.0, "ovs": 2.7}),
    *_sizes(),
    rate("dpdk-64B-split", "64 B, split, DPDK's virtio-user",
         generator=dpdk, plan={"size": 64}, goals={"testpmd": 1.5, "ovs": 2.1}),
    rate("dpdk-64B-packed", "64 B, packed, DPDK's virtio-user", generator=dpdk,
         plan={"size": 64, "vdev": ",packed_vq=1"}, goals={"testpmd": 1.6, "ovs": 2.4}),
    rate("dpdk-1500B-split", "1500 B, split, DPDK's virtio-user",
         generator=dpdk, plan={"size": 1500}, goals={"testpmd": 1.4, "ovs": 1.6}),
    rate("imix", "IMIX, split, headers touched", plan={"sizes": IMIX, **UNKIND},
         goals={"ovs": 3.0}),
    rate("macs-30000", "64 B, 30,000 MAC pairs", plan={"macs": 30000, **UNKIND},
         goals={"ovs": 3.0}),
    rate("queue-256", "64 B, queues of 256", plan={"queue_size": 256, **UNKIND},
         goals={"ovs": 3.0}),
    rate("9000B-header", "9,000 B, mergeable buffers, headers touched",
         plan={"sizes": (9000,), **UNKIND}, peers=("testpmd",), goals={"testpmd": 2.0}),
    rate("9000B", "9,000 B, mergeable buffers, whole frame touched",
         plan={"sizes": (9000,), **WHOLE}, peers=("testpmd",), goals={"testpmd": 2.0}),
    rate("65535B", "64 KiB, mergeable buffers, whole frame touched",
         plan={"sizes": (65549,), **WHOLE}, peers=()),
    rate("flood-8", "64 B broadcast from one of 8 ports",
         plan={"broadcast": True, "senders": 1, **UNKIND}, ports=8, peers=("ovs",),
         goals={"ovs": 2.0}),
    rate("ports-1000", f"64 B, {PORTS:,} connected ports, two of them busy", plan=UNKIND,
         setup="crowd", poll="adaptive", peers=("two ports",), goals={"two ports": 0.9}),
    rate("ports-1000-idle", f"CPU time of {PORTS:,} connected ports that rest", generator=idle,
         setup="crowd", poll="adaptive", peers=(), unit="%", most=1.0, lower_is_better=True,
         saturates=False, sleeps=True),
    *[rate(name, f"64 B, two workers, a pair of ports each{how}", generator=by_turns,
           plan={"peers": peers}, setup="workers", poll="interrupt", peers=("a process each",),
           unit="cycles", lower_is_better=True, saturates=False, sleeps=True,
           goals={"a process each": 1 / most})
      for name, how, peers, most in (
          ("workers-2", "", APART, 1.15),
          ("workers-2-crossing", ", traffic between the workers", CROSSING, 1.4),
      )],
    latency("latency", "64 B, one frame in flight, busy polling: p50", plan=ONE_FRAME,
            goals={"testpmd": 1.0}),
    latency("latency-adaptive", "the same, adaptive polling", plan=ONE_FRAME, poll="adaptive"),
    latency("latency-woken", "64 B, a frame each ms, adaptive polling: p50, woken from sleep",
            plan=SELDOM, poll="adaptive", most=50.0, sleeps=True),
]  # fmt: skip


def run(cases: list[Case], results: Results, options: argparse.Namespace) -> None:
    """Runs all cases, those that share their devices together."""
    for key in dict.fromkeys(map(_key, cases)):
        group = [case for case in cases if _key(case) == key]
        with tempfile.TemporaryDirectory(prefix="bp") as folder:
            run_group(group, _devices(Path(folder), group), results, options)


def _key(case: Case) -> tuple[str, int, str]:
    return case.setup, case.ports, case.poll


def _devices(folder: Path, cases: list[Case]) -> list[Device]:
    """Those of all cases that are alike in what they need."""
    setup, ports, poll = _key(cases[0])
    ours: dict[str, Callable[[], Device]] = {
        "": lambda: Vhostpy(folder, ports, "net", "--fdb-limit", "65536", poll=poll),
        "crowd": lambda: Crowd(folder),
        "workers": lambda: TwoWorkers(folder),
    }
    makers: dict[str, Callable[[], Device]] = {
        "vhostpy": ours[setup],
        "testpmd": lambda: Testpmd(folder, ports),
        "ovs": lambda: Ovs(folder, ports),
        "two ports": lambda: Vhostpy(folder, 2, "net", poll=poll, name="two ports"),
        "a process each": lambda: WorkerEach(folder),
    }
    wanted = {"vhostpy", *(peer for case in cases for peer in case.peers)}
    return [make() for name, make in makers.items() if name in wanted]
