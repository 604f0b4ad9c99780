"""Block cases: patterns, storages, and what vhostpy is to reach beside qemu-storage-daemon."""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.devices import Device, StorageDaemon, Vhostpy
from bench.peers.generators import fill, own_blk
from bench.peers.interleave import interleave
from bench.peers.results import Results

GIB = 1 << 30
TMPFS = Path("/dev/shm")


@dataclass(frozen=True)
class Case:
    """One row: a storage, a pattern, and the ratio to be reached."""

    name: str
    text: str
    storage: str
    plan: dict[str, Any] = field(default_factory=dict)
    goals: dict[str, float] = field(default_factory=dict)
    generator: Callable[..., dict[str, Any]] = own_blk
    unit: str = "kIOPS"
    poll: str = "busy"
    chart: float | None = None
    lower_is_better: bool = False


def _null() -> list[Case]:
    goals = {1: 30.0, 16: 3.2, 64: 3.5, 128: 4.5}
    return [
        Case(f"null-{depth}", f"null storage, 4 KiB random read, depth {depth}", "null",
             {"depth": depth}, {"qsd": goal}, chart=depth)
        for depth, goal in goals.items()
    ] + [
        Case(f"null-{depth}-adaptive", f"the same, depth {depth}, adaptive polling", "null",
             {"depth": depth}, poll="adaptive")
        for depth in goals
    ]  # fmt: skip


CASES = [
    *_null(),
    Case("ram-1", "RAM, 4 KiB random read, depth 1 (QSD: file on tmpfs)", "ram", {"depth": 1},
         {"qsd": 4.3}),
    Case("ram-64", "the same, depth 64", "ram", {"depth": 64}, {"qsd": 4.8}),
    Case("ram-64-write", "random write, depth 64", "ram",
         {"depth": 64, "pattern": "randwrite"}, {"qsd": 4.1}),
    Case("ram-128K", "128 KiB random read, depth 16", "ram",
         {"depth": 16, "block_bytes": 128 << 10}, {"qsd": 2.2}),
    *[Case(f"tmpfs-{pattern}-{depth}", f"file on tmpfs, 4 KiB {pattern}, depth {depth}", "tmpfs",
           {"depth": depth, "pattern": pattern}, {"qsd": 2.0})
      for pattern in ("randread", "randwrite") for depth in (1, 64)],
]  # fmt: skip


def run(cases: list[Case], results: Results, options: argparse.Namespace) -> None:
    """Runs all cases, those of one storage and way of polling together."""
    for storage, poll in dict.fromkeys((case.storage, case.poll) for case in cases):
        group = [case for case in cases if (case.storage, case.poll) == (storage, poll)]
        with (
            tempfile.TemporaryDirectory(prefix="bp") as folder,
            tempfile.TemporaryDirectory(prefix="bp", dir=TMPFS) as memory,
        ):
            devices = _devices(Path(folder), Path(memory), storage, poll)
            if options.devices:
                devices = [device for device in devices if device.name in options.devices]
            try:
                for device in devices:
                    device.start()
                    if storage != "null":
                        fill(device)
                    device.pause()
                for case in group:
                    interleave(case, devices, results, options)
            finally:
                for device in devices:
                    device.close()


def _devices(folder: Path, memory: Path, storage: str, poll: str) -> list[Device]:
    if storage == "null":
        ours = ("--null", "1T")
        theirs = f"driver=null-co,node-name=disk,size={1 << 40},read-zeroes=off"
    else:
        for name in ("vhostpy", "qsd"):
            with (memory / name).open("wb") as image:
                image.truncate(GIB)
        ours = ("--ram", "1G") if storage == "ram" else ("--file", str(memory / "vhostpy"))
        theirs = f"driver=file,node-name=disk,aio=io_uring,filename={memory / 'qsd'}"
    return [Vhostpy(folder, 1, "blk", *ours, poll=poll), StorageDaemon(folder, theirs)]
