"""Block cases: patterns, storages, and what vhostpy is to reach beside qemu-storage-daemon."""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from bench.peers.case import Case
from bench.peers.crowd import DISKS, Disks, all_disks, resting_disks
from bench.peers.devices import Device, StorageDaemon, Vhostpy
from bench.peers.fio import Fio
from bench.peers.generators import fill, own_blk, seldom
from bench.peers.interleave import run_group
from bench.peers.qemu_img import qemu_img
from bench.peers.results import Results

GIB = 1 << 30
DISK_BYTES = 4 * GIB  # of the local disk's image; the page cache has no part in O_DIRECT
TMPFS = Path("/dev/shm")
LONG = {"block_bytes": 128 << 10, "depth": 16}
PATTERNS = ("randread", "randwrite")

rate = partial(Case, generator=own_blk, unit="kIOPS", peers=("qsd",))
latency = partial(
    rate, unit="us", figure="latency_p99_us", lower_is_better=True, saturates=False,
    plan={"depth": 1},
)  # fmt: skip


def _null() -> list[Case]:
    goals = {1: {}, 16: {"qsd": 3.2}, 64: {"qsd": 3.5}, 128: {"qsd": 4.5}}
    return [
        rate("null-1-libblkio", "null storage, 4 KiB read, depth 1, by qemu-img bench",
             generator=qemu_img, plan={"depth": 1}, goals={"qsd": 30.0}, saturates=False),
        rate("null-1-libblkio-adaptive", "the same, adaptive polling", generator=qemu_img,
             plan={"depth": 1}, poll="adaptive", saturates=False),
    ] + [
        rate(f"null-{depth}", f"null storage, 4 KiB random read, depth {depth}",
             plan={"depth": depth}, goals=goal, chart=depth, saturates=depth > 1)
        for depth, goal in goals.items()
    ] + [
        rate(f"null-{depth}-adaptive", f"the same, depth {depth}, adaptive polling",
             plan={"depth": depth}, poll="adaptive", saturates=depth > 1)
        for depth in goals
    ]  # fmt: skip


def _latencies() -> list[Case]:
    return [
        latency("null-latency", "null storage, 4 KiB random read, depth 1, busy polling: p99"),
        latency("null-latency-adaptive", "the same, adaptive polling", poll="adaptive"),
        latency("null-latency-woken", "a read each ms, adaptive polling, woken from sleep: p99",
                generator=seldom, plan={}, poll="adaptive", sleeps=True, goals={"qsd": 1.0}),
    ]  # fmt: skip


def _tmpfs() -> list[Case]:
    both = ("fio", "qsd")
    short = [
        rate(f"tmpfs-{pattern}-{depth}", f"file on tmpfs, 4 KiB {pattern}, depth {depth}",
             plan={"depth": depth, "pattern": pattern}, storage="tmpfs", peers=both,
             goals={"fio": 0.95, "qsd": 2.0}, saturates=depth > 1)
        for pattern in PATTERNS for depth in (1, 64)
    ]  # fmt: skip
    long = [
        rate(f"tmpfs-{pattern}-128K", f"file on tmpfs, 128 KiB {pattern}, in a row, depth 16",
             plan={"pattern": pattern, **LONG}, storage="tmpfs", peers=both, unit="MB/s",
             figure="mb_s", goals={"fio": 0.95})
        for pattern in ("read", "write")
    ]  # fmt: skip
    # A device that polls uses all of its core, whatever it does: so not here.
    cpu = [
        rate(f"tmpfs-{pattern}-128K-cpu", f"the same, {pattern}, adaptive polling: CPU time",
             plan={"pattern": pattern, **LONG}, storage="tmpfs", poll="adaptive", peers=both,
             unit="ms/GB", figure="cpu_ms_per_gb", lower_is_better=True, saturates=False,
             goals={"qsd": 1.0})
        for pattern in ("read", "write")
    ]  # fmt: skip
    return short + long + cpu


def _disk() -> list[Case]:
    disk = partial(rate, storage="disk", poll="adaptive", peers=("fio", "qsd"), saturates=False,
                   pairs=9)  # fmt: skip
    return [
        disk(f"disk-{pattern}-{depth}",
             f"local disk, O_DIRECT, 4 KiB {pattern}, depth {depth}: IOPS per busy core-second",
             plan={"depth": depth, "pattern": pattern}, unit="k", figure="kiops_per_core",
             goals={"qsd": 1.3})
        for pattern in PATTERNS for depth in (1, 64)
    ] + [
        disk(f"disk-{pattern}-128K", f"local disk, O_DIRECT, 128 KiB {pattern}, depth 16",
             plan={"pattern": pattern, **LONG}, unit="MB/s", figure="mb_s")
        for pattern in ("read", "write")
    ]  # fmt: skip


CASES = [
    *_null(),
    *_latencies(),
    rate("ram-1", "RAM, 4 KiB random read, depth 1 (QSD: file on tmpfs)", storage="ram",
         plan={"depth": 1}, goals={"qsd": 4.3}, saturates=False),
    rate("ram-64", "the same, depth 64", storage="ram", plan={"depth": 64}, goals={"qsd": 4.8}),
    rate("ram-64-write", "random write, depth 64", storage="ram",
         plan={"depth": 64, "pattern": "randwrite"}, goals={"qsd": 4.1}),
    rate("ram-128K", "128 KiB random read, depth 16", storage="ram", plan=LONG,
         goals={"qsd": 2.2}),
    *_tmpfs(),
    *_disk(),
    rate("disks-64", f"{DISKS} disks in one process, all busy: the slowest below the fastest",
         generator=all_disks, setup="disks", peers=(), unit="%", most=10.0, lower_is_better=True,
         saturates=False),
    rate("disks-64-idle", f"CPU time of {DISKS} disks that rest", generator=resting_disks,
         setup="disks", peers=(), unit="%", most=1.0, lower_is_better=True, saturates=False,
         sleeps=True),
]  # fmt: skip


def run(cases: list[Case], results: Results, options: argparse.Namespace) -> None:
    """Runs all cases, those that share their devices together."""
    for key in dict.fromkeys(map(_key, cases)):
        group = [case for case in cases if _key(case) == key]
        with (
            tempfile.TemporaryDirectory(prefix="bp") as folder,
            tempfile.TemporaryDirectory(prefix="bp", dir=_images(group[0].storage)) as images,
        ):
            devices = _devices(Path(folder), Path(images), group[0])
            ready = fill if group[0].storage != "null" else None
            run_group(group, devices, results, options, ready)


def _key(case: Case) -> tuple[str, str, str]:
    return case.setup, case.storage, case.poll


def _images(storage: str) -> Path:
    if storage != "disk":
        return TMPFS
    # Beside the source: the system's folder for temporary files may be memory.
    folder = Path(__file__).parents[2] / ".cache"
    folder.mkdir(exist_ok=True)
    return folder


def _devices(folder: Path, images: Path, case: Case) -> list[Device]:
    """Those of all cases that are alike in what they need."""
    if case.setup == "disks":
        return [Disks(folder)]
    storage, poll = case.storage, case.poll
    if storage == "null":
        theirs = f"driver=null-co,node-name=disk,size={1 << 40},read-zeroes=off"
        return [Vhostpy(folder, 1, "blk", "--null", "1T", poll=poll), StorageDaemon(folder, theirs)]
    direct = storage == "disk"
    size = DISK_BYTES if direct else GIB
    for name in ("vhostpy", "qsd"):
        with (images / name).open("wb") as image:
            image.truncate(size)
    theirs = f"driver=file,node-name=disk,aio=io_uring,filename={images / 'qsd'}"
    if direct:
        theirs += ",cache.direct=on"
    ours = ["--ram", "1G"] if storage == "ram" else ["--file", str(images / "vhostpy")]
    if direct:
        ours.append("--direct")
    return [
        Vhostpy(folder, 1, "blk", *ours, poll=poll),
        Fio(folder, images / "vhostpy", direct=direct),
        StorageDaemon(folder, theirs),
    ]
