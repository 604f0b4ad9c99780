"""Generators on core 1: vhostpy's own `load`, and DPDK's virtio-user as a witness."""

import os
import re
import resource
import time
from typing import Any

from bench.peers.devices import Device, Interactive, cpu_s, machine_s, used_share
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.load import blk, net, report
from vhostpy.load.target import connect, memory_layout

GENERATOR_CORE = 1
WARMUP_S = 1.3  # a device's figures may be a second old when they are asked for
MACS = ("02:00:00:00:00:10", "02:00:00:00:00:11")


class Calm:
    """The share of the machine that nobody else used: what bench, device and its like leave."""

    def __init__(self, *pids: int) -> None:
        self.pids = pids
        self.since = self._times()

    def _times(self) -> tuple[float, float, float]:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended
        ours = time.process_time() + children.ru_utime + children.ru_stime
        ours += sum(cpu_s(pid) for pid in self.pids)
        return time.monotonic(), machine_s(), ours

    def share(self) -> float:
        """Since this was made."""
        seconds, all_of_it, ours = (
            now - then for now, then in zip(self._times(), self.since, strict=True)
        )
        return min(1.0, 1 - (all_of_it - ours) / seconds / (os.cpu_count() or 1))


class Watch(report.Progress):
    """The device's load, and its share of its core, from the first measured second to the last."""

    def __init__(self, device: Device) -> None:
        super().__init__(False)
        self.device = device
        self.mark: Any = None
        self.since: tuple[float, float] | None = None
        self.load: dict[str, float] = {}

    def show(self, text: Any = None) -> None:
        if self.since is None:
            self.mark, self.since = self.device.mark(), self._times()
        else:
            self.load = self.device.load(self.mark)
            now_s, used_s = self._times()
            share = (used_s - self.since[1]) / (now_s - self.since[0])
            self.load["device_used_share"] = share
            if self.device.polls:
                self.load["device_cpu_share"] = share

    def _times(self) -> tuple[float, float]:
        assert self.device.process is not None
        return time.monotonic(), cpu_s(self.device.process.pid)


def own_net(device: Device, seconds: int, **plan: Any) -> dict[str, Any]:
    """One run of `vhostpy load`: `value` is received Mpps."""
    watch = Watch(device)
    result = net.run(
        net.NetPlan(tuple(device.sockets), seconds=seconds, warmup_s=WARMUP_S,
                    cpu=GENERATOR_CORE, **plan),
        watch,
    )  # fmt: skip
    run = {"value": result["received_mpps"], **watch.load, "lost_share": result["lost_share"]}
    names = "received_gbit_s", "generator_full_share", "generator_cpu_share"
    run |= {name: result[name] for name in names}
    run |= _latency(result["latency_us"])
    if problem := report.wrong(result):
        raise RuntimeError(f"{device.name}: {problem}")
    if "cycles_per_packet" not in run and run.get("busy_share") and run["value"]:
        per_second = 1e6 * ticks_per_us()
        # What came in, whether or not it went out.
        run["cycles_per_packet"] = run["busy_share"] * per_second / (result["sent_mpps"] * 1e6)
    return run


def own_blk(device: Device, seconds: int, **plan: Any) -> dict[str, Any]:
    """One run of `vhostpy load`: `value` is kIOPS.

    With EVENT_IDX, as guests have it: without, qemu-storage-daemon is kicked at each request,
    and it is the generator's system calls that are measured.
    """
    watch = Watch(device)
    result = blk.run(
        blk.BlkPlan(device.sockets[0], seconds=seconds, warmup_s=WARMUP_S, cpu=GENERATOR_CORE,
                    event_idx=True, **plan),
        watch,
    )  # fmt: skip
    if problem := report.wrong(result):
        raise RuntimeError(f"{device.name}: {problem}")
    run = {"value": result["kiops"], **watch.load, "mb_s": result["mb_s"]}
    run |= _latency(result["read_latency_us" if result["reads"] else "write_latency_us"])
    names = "generator_cycles_per_request", "generator_busy_share", "generator_cpu_share"
    run |= {name: result[name] for name in names}
    return run | per_cpu(run)


def per_cpu(run: dict[str, Any]) -> dict[str, float]:
    """What a device made of its processor time."""
    used = run["device_used_share"]
    return {
        "kiops_per_core": run["value"] / used,  # in thousands a busy core-second
        "cpu_ms_per_gb": 1e6 * used / run["mb_s"],
    }


def _latency(spread: dict[str, Any] | None) -> dict[str, float]:
    if not spread or not spread["count"]:
        return {}
    return {f"latency_{name}_us": spread[name] for name in ("p50", "p99", "p99_9")}


def idle(device: Device, seconds: int) -> dict[str, Any]:
    """No load at all: `value` is the percentage of a core that the device uses."""
    assert device.process is not None
    time.sleep(WARMUP_S)
    calm = Calm(device.process.pid)
    share = used_share(device.process.pid, seconds)
    return {"value": 100 * share, "machine_share": calm.share()}


def seldom(device: Device, seconds: int) -> dict[str, Any]:
    """Reads of 4 KiB, one each millisecond: a device that may sleep does. `value` is kIOPS."""
    latencies_us = []
    os.sched_setaffinity(0, {GENERATOR_CORE})
    try:
        with connect(device.sockets[0]) as front_end:
            front_end.negotiate(1 << Feature.VERSION_1, 1 << ProtocolFeature.CONFIG)
            front_end.layout = memory_layout(1 << 20)
            front_end.set_mem_table()
            ring = front_end.start_queue(0, 16).ring
            ring.disarm()
            header, data = front_end.allocate(16), front_end.allocate(4096)
            status = front_end.allocate(1)  # the header is one of zeros: a read of sector 0
            calm = Calm(device.process.pid if device.process else os.getpid())
            begin_ns = time.perf_counter_ns()
            while (since_ns := time.perf_counter_ns()) < begin_ns + seconds * 10**9:
                ring.add([(header, 16)], [(data, 4096), (status, 1)])
                ring.kick()
                while not ring.used():
                    if time.perf_counter_ns() - since_ns > 10**9:
                        raise TimeoutError("a read was not answered within a second")
                latencies_us.append((time.perf_counter_ns() - since_ns) / 1e3)
                time.sleep(0.001)
    finally:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    places = {"p50": 0.5, "p99": 0.99, "p99_9": 0.999}
    latencies_us.sort()
    return {
        "value": len(latencies_us) / seconds / 1e3,
        "machine_share": calm.share(),
        **{
            f"latency_{name}_us": latencies_us[int(share * len(latencies_us))]
            for name, share in places.items()
        },
    }


def fill(device: Device) -> None:
    """Writes all of a disk: memory that was never written is one page of zeros, and fast."""
    if not device.sockets:
        return  # it reads another's
    plan = blk.BlkPlan(device.sockets[0], pattern="read", verify=True, block_bytes=128 << 10,
                       depth=16, seconds=0.1, warmup_s=0.1, cpu=GENERATOR_CORE)  # fmt: skip
    if problem := report.wrong(blk.run(plan)):
        raise RuntimeError(f"{device.name}: {problem}")


def dpdk(device: Device, seconds: int, *, size: int, vdev: str = "") -> dict[str, Any]:
    """One run of testpmd with two virtio-user ports: `value` is what returns, in Mpps."""
    eal = ["--single-file-segments"]
    for index, path in enumerate(device.sockets[:2]):
        eal += ["--vdev", f"net_virtio_user{index},mac={MACS[index]},path={path},"
                          f"queue_size=1024{vdev}"]  # fmt: skip
    prompt = Interactive(GENERATOR_CORE, "gen", eal, ["--burst=64"])
    try:
        prompt.command(f"set txpkts {size}")
        prompt.command(f"set eth-peer 0 {MACS[1]}")
        prompt.command(f"set eth-peer 1 {MACS[0]}")
        # A learning switch has to have seen both addresses before the load starts.
        prompt.command("set fwd txonly")
        prompt.command("start")
        time.sleep(0.2)
        prompt.command("stop")
        prompt.command("set fwd io")
        prompt.command("start tx_first 16")
        time.sleep(WARMUP_S)
        watch = Watch(device)
        watch.show()
        prompt.command("show port stats all")
        share = used_share(prompt.process.pid, seconds)
        output = prompt.command("show port stats all")
        watch.show()
    finally:
        prompt.close()
    mpps = sum(int(n) for n in re.findall(r"Rx-pps:\s+(\d+)", output)) / 1e6
    run = {"value": mpps, "generator_cpu_share": share, **watch.load}
    if "cycles_per_packet" not in run and run.get("busy_share") and mpps:
        run["cycles_per_packet"] = run["busy_share"] * ticks_per_us() / mpps
    return run


_rate: list[float] = []


def ticks_per_us() -> float:
    """Of the clock in which devices count cycles."""
    if not _rate:
        from vhostpy.load.net_loop import clock_rate

        _rate.append(clock_rate())
    return _rate[0]
