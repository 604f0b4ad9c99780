"""Throughput beside `dpdk-testpmd`, interleaved in one run.

    python -m bench.peers --sizes 64 1500 --pairs 5

The generator is DPDK's own virtio-user with two ports on core 1; the device under test
runs on core 0: `vhostpy net --poll busy`, or testpmd's net_vhost in io-forward mode
(which switches nothing). Needs root, 2 MiB hugepages and Debian's `dpdk-dev`.
"""

import argparse
import contextlib
import json
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MACS = ("02:00:00:00:00:10", "02:00:00:00:00:11")
HUGEPAGES = 1024
DEVICE_CORE, GENERATOR_CORE = 0, 1


class Testpmd:
    """An interactive dpdk-testpmd."""

    def __init__(self, eal: list[str], options: list[str]) -> None:
        self.process = subprocess.Popen(
            [
                "stdbuf",
                "-oL",
                "dpdk-testpmd",
                *eal,
                "--",
                "-i",
                "--nb-cores=1",
                "--forward-mode=io",
                *options,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.buffer = b""
        self.expect(b"testpmd> ", 60)

    def expect(self, marker: bytes, timeout_s: float) -> str:
        """What it printed up to `marker`."""
        deadline = time.monotonic() + timeout_s
        assert self.process.stdout is not None
        while marker not in self.buffer:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(left, 0))
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not data:
                tail = self.buffer[-2000:].decode(errors="replace")
                raise RuntimeError(f"testpmd did not print {marker!r}; its last words:\n{tail}")
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(marker)
        return text.decode(errors="replace")

    def command(self, line: str, timeout_s: float = 20) -> str:
        """Runs one command; returns its output."""
        assert self.process.stdin is not None
        # The prompt comes more than once a command; the answer to nonsense comes once.
        self.process.stdin.write(line.encode() + b"\nsync\n")
        self.process.stdin.flush()
        return self.expect(b"Command not found", timeout_s)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            assert self.process.stdin is not None
            self.process.stdin.write(b"quit\n")
            self.process.stdin.close()
            self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def vhostpy_device(sockets: list[str]) -> Iterator[None]:
    """`vhostpy net` with two ports, its worker busy on the device core."""
    argv = [sys.executable, "-m", "vhostpy", "net", "--poll", "busy", "--cpus", str(DEVICE_CORE)]
    for path in sockets:
        argv += ["--socket", path]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        wait_for(sockets)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def testpmd_device(sockets: list[str]) -> Iterator[None]:
    """testpmd with two net_vhost ports in io-forward mode."""
    eal = ["--lcores", f"(0,1)@{DEVICE_CORE}", "--main-lcore", "0", "--no-pci", "-m", "512",
           "--file-prefix", "dut"]  # fmt: skip
    for i, path in enumerate(sockets):
        eal += ["--vdev", f"net_vhost{i},iface={path},queues=1"]
    device = Testpmd(eal, ["--total-num-mbufs=32768", "--txd=1024", "--rxd=1024"])
    device.command("start")
    try:
        yield
    finally:
        device.close()


def wait_for(paths: list[str], timeout_s: float = 10) -> None:
    """Until all sockets exist."""
    deadline = time.monotonic() + timeout_s
    while not all(os.path.exists(path) for path in paths):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{paths} did not appear")
        time.sleep(0.01)


def rate_mpps(sockets: list[str], size: int, seconds: float, vdev: str) -> float:
    """Packets a second that return to the generator, both ports together, in millions."""
    eal = ["--lcores", f"(0,1)@{GENERATOR_CORE}", "--main-lcore", "0", "--no-pci", "-m", "512",
           "--single-file-segments", "--file-prefix", "gen"]  # fmt: skip
    for i, path in enumerate(sockets):
        eal += ["--vdev", f"net_virtio_user{i},mac={MACS[i]},path={path},queue_size=1024{vdev}"]
    generator = Testpmd(eal, ["--total-num-mbufs=32768", "--txd=1024", "--rxd=1024", "--burst=64"])
    try:
        generator.command(f"set txpkts {size}")
        generator.command(f"set eth-peer 0 {MACS[1]}")
        generator.command(f"set eth-peer 1 {MACS[0]}")
        # A learning switch has to have seen both addresses before the load starts.
        generator.command("set fwd txonly")
        generator.command("start")
        time.sleep(0.2)
        generator.command("stop")
        generator.command("set fwd io")
        generator.command("start tx_first 16")
        time.sleep(0.5)
        generator.command("show port stats all")
        time.sleep(seconds)
        output = generator.command("show port stats all")
        return sum(int(n) for n in re.findall(r"Rx-pps:\s+(\d+)", output)) / 1e6
    finally:
        generator.close()


DEVICES = {"vhostpy": vhostpy_device, "testpmd": testpmd_device}


def prepare() -> None:
    """Hugepages for DPDK."""
    if shutil.which("dpdk-testpmd") is None:
        raise SystemExit("bench.peers: dpdk-testpmd is not installed\n  next: apt install dpdk-dev")
    Path("/proc/sys/vm/nr_hugepages").write_text(str(HUGEPAGES))
    Path("/dev/hugepages").mkdir(exist_ok=True)
    if not os.path.ismount("/dev/hugepages"):
        subprocess.run(["mount", "-t", "hugetlbfs", "none", "/dev/hugepages"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1500])
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs of runs")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured time of a run")
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), choices=DEVICES)
    parser.add_argument("--vdev", default="", help="more virtio-user options: ,packed_vq=1")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare()
    results = []
    for size in arguments.sizes:
        rates: dict[str, list[float]] = {name: [] for name in arguments.devices}
        for pair in range(arguments.pairs):
            for name in arguments.devices:
                with tempfile.TemporaryDirectory() as folder:
                    sockets = [f"{folder}/p{i}" for i in range(2)]
                    with DEVICES[name](sockets):
                        rate = rate_mpps(sockets, size, arguments.seconds, arguments.vdev)
                rates[name].append(rate)
                print(f"{size} B, pair {pair + 1}: {name} {rate:.2f} Mpps", file=sys.stderr)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        row = {"size_bytes": size, "runs_mpps": rates, "median_mpps": medians}
        if medians.get("testpmd"):
            row["ratio"] = medians.get("vhostpy", 0) / medians["testpmd"]
        results.append(row)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print(
        f"{'frame':>8} " + " ".join(f"{name + ' Mpps':>14}" for name in arguments.devices), "ratio"
    )
    for row in results:
        cells = " ".join(f"{row['median_mpps'][name]:14.2f}" for name in arguments.devices)
        print(f"{row['size_bytes']:>6} B {cells} {row.get('ratio', 0):.2f}")


if __name__ == "__main__":
    main()
