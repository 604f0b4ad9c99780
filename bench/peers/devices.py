"""Devices under test: processes on core 0 that can be stopped, and say how busy they are."""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from bench.peers import core
from bench.peers.core import DEVICE_CORE, PINNED
from vhostpy.site import control

OVS = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"


class Device:
    """A process that serves sockets. `load` of two marks: busy share and cycles a packet."""

    name = ""
    polls = True  # it takes all of its core, unless it is disturbed
    # What differs from a case's plan; and what is asked instead of the case's generator.
    plan: ClassVar[dict[str, Any]] = {}
    generator: Callable[..., dict[str, Any]] | None = None

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.sockets = [str(folder / f"{self.name}{index}") for index in range(count)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Ends it."""
        if self.process is not None:
            self.resume()
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def is_gone(self) -> bool:
        """It ended of itself, or (qemu-storage-daemon) has closed its export for good."""
        return self.process is not None and (
            self.process.poll() is not None or not all(map(os.path.exists, self.sockets))
        )

    def pause(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def mark(self) -> Any:
        """From here on its load is measured."""

    def load(self, mark: Any) -> dict[str, float]:
        """`busy_share` since the mark, and where it is known `cycles_per_packet`."""
        return {}

    def wait_for_sockets(self, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not all(os.path.exists(path) for path in self.sockets):
            if time.monotonic() > deadline or (self.process and self.process.poll() is not None):
                raise RuntimeError(f"{self.name}: {self.sockets} did not appear")
            time.sleep(0.02)


class Vhostpy(Device):
    """`vhostpy net` or `vhostpy blk`; a worker for each of `cpus`."""

    name = "vhostpy"

    def __init__(self, folder: Path, count: int, verb: str = "net", *flags: str,
                 poll: str = "busy", name: str = "vhostpy",
                 cpus: tuple[int, ...] = (DEVICE_CORE,), tree: Path | None = None,
                 ) -> None:  # fmt: skip
        self.name = name
        self.tree = tree  # of another revision
        super().__init__(folder, count)
        self.polls = poll == "busy"
        self.verb = verb
        self.argv = [sys.executable, "-m", "vhostpy", verb, "--poll", poll, *flags,
                     "--cpus", ",".join(map(str, cpus))]  # fmt: skip
        self.control = folder / f"{self.name}.control"

    def start(self) -> None:
        argv = [*self.argv, "--control", str(self.control)]
        for path in self.sockets:
            argv += ["--socket", path]
        # A switch's control thread may have the other core; storage has one for all it does.
        start = core.start if self.verb == "blk" else subprocess.Popen
        self.process = start(argv, stderr=subprocess.DEVNULL, cwd=self.tree,
                             start_new_session=self.tree is not None)  # fmt: skip
        self.wait_for_sockets()

    def mark(self) -> Any:
        # Up to a second old: the load has to run since then.
        with control.Client(self.control) as client:
            return client.ask("status")["workers"][0]

    def load(self, mark: Any) -> dict[str, float]:
        now = self.mark()
        total = now["total_ticks"] - mark["total_ticks"]
        return {"busy_share": (now["busy_ticks"] - mark["busy_ticks"]) / total} if total else {}


class Interactive:
    """A testpmd that is told what to do."""

    def __init__(self, core: int, prefix: str, eal: list[str], options: list[str]) -> None:
        self.prefix = prefix
        argv = ["stdbuf", "-oL", "dpdk-testpmd", "--lcores", f"(0,1)@{core}", "--main-lcore", "0",
                "--no-pci", "-m", "512", "--file-prefix", prefix, *eal, "--",
                "-i", "--nb-cores=1", "--forward-mode=io",
                "--total-num-mbufs=32768", "--txd=1024", "--rxd=1024", *options]  # fmt: skip
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
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
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            assert self.process.stdin is not None
            self.process.stdin.write(b"quit\n")
            self.process.stdin.close()
            self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        # DPDK leaves its hugepages behind, for whoever wants to look at them.
        for path in Path("/dev/hugepages").glob(f"{self.prefix}map_*"):
            path.unlink()


class Testpmd(Device):
    """net_vhost ports in io-forward mode, two by two: it switches nothing."""

    name = "testpmd"

    def start(self) -> None:
        eal: list[str] = []
        for index, path in enumerate(self.sockets):
            eal += ["--vdev", f"net_vhost{index},iface={path},queues=1"]
        self.prompt = Interactive(DEVICE_CORE, "dut", eal, [])
        self.process = self.prompt.process
        self.prompt.command("set record-core-cycles on")
        self.prompt.command("start")
        self.wait_for_sockets()

    def close(self) -> None:
        if self.process is not None:
            self.resume()
            self.prompt.close()

    def mark(self) -> Any:
        self.prompt.command("clear fwd stats all")
        return time.monotonic()

    def load(self, mark: Any) -> dict[str, float]:
        text = self.prompt.command("show fwd stats all")
        seconds = time.monotonic() - mark
        found = re.search(
            r"cycles/packet=([\d.]+) \(total cycles=(\d+).*? at (\d+) MHz", text, re.DOTALL
        )
        if not found:
            return {}
        busy = int(found[2]) / (int(found[3]) * 1e6 * seconds)
        return {"busy_share": busy, "cycles_per_packet": float(found[1])}


class Ovs(Device):
    """OVS-DPDK with action NORMAL: a learning switch."""

    name = "ovs"

    def start(self) -> None:
        run = self.folder / "ovs-run"
        run.mkdir()
        self.sockets = [str(run / Path(path).name) for path in self.sockets]
        self.env = os.environ | {
            "OVS_RUNDIR": str(run), "OVS_LOGDIR": str(run), "OVS_DBDIR": str(run)
        }  # fmt: skip
        database, self.db = run / "conf.db", f"unix:{run}/db.sock"
        schema = "/usr/share/openvswitch/vswitch.ovsschema"
        subprocess.run(["ovsdb-tool", "create", database, schema], check=True, env=self.env)
        self.server = subprocess.Popen(
            ["ovsdb-server", database, f"--remote=p{self.db}", f"--unixctl={run}/db.ctl"],
            env=self.env, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _wait_for(run / "db.sock")
        self._vsctl("--no-wait", "init")
        self._vsctl(
            "--no-wait", "set", "Open_vSwitch", ".",
            "other_config:dpdk-init=true", f"other_config:pmd-cpu-mask={1 << DEVICE_CORE:#x}",
            f"other_config:dpdk-lcore-mask={1 << DEVICE_CORE:#x}",
            "other_config:dpdk-socket-mem=512",
            "other_config:dpdk-extra=--no-pci --file-prefix ovs",
        )  # fmt: skip
        self.process = subprocess.Popen(
            [*PINNED, OVS, self.db, f"--pidfile={run}/vswitchd.pid",
             f"--unixctl={run}/vswitchd.ctl", "--log-file"],
            env=self.env, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._vsctl("add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev",
                    "other_config:mac-table-size=65536")  # fmt: skip
        for path in self.sockets:
            port = Path(path).name
            self._vsctl("add-port", "br0", port, "--", "set", "Interface", port,
                        "type=dpdkvhostuser")  # fmt: skip
        self.wait_for_sockets()

    def _vsctl(self, *words: str) -> None:
        subprocess.run(
            ["ovs-vsctl", f"--db={self.db}", "-t", "20", *words],
            check=True, env=self.env, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def _appctl(self, *words: str) -> str:
        argv = ["ovs-appctl", "-t", str(self.folder / "ovs-run" / "vswitchd.ctl"), *words]
        return subprocess.run(argv, check=True, env=self.env, capture_output=True, text=True).stdout

    def close(self) -> None:
        super().close()
        self.server.terminate()
        self.server.wait(10)
        shutil.rmtree(self.folder / "ovs-run", ignore_errors=True)
        for path in Path("/dev/hugepages").glob("ovsmap_*"):
            path.unlink()

    def mark(self) -> Any:
        self._appctl("dpif-netdev/pmd-stats-clear")

    def load(self, mark: Any) -> dict[str, float]:
        text = self._appctl("dpif-netdev/pmd-stats-show")
        busy = re.search(r"processing cycles: \d+ \(([\d.]+)%\)", text)
        cycles = re.search(r"avg processing cycles per packet: ([\d.]+)", text)
        result = {"busy_share": float(busy[1]) / 100} if busy else {}
        return result | ({"cycles_per_packet": float(cycles[1])} if cycles else {})


class StorageDaemon(Device):
    """qemu-storage-daemon with one export; `node` is its --blockdev."""

    name = "qsd"
    polls = False

    def __init__(self, folder: Path, node: str) -> None:
        super().__init__(folder, 1)
        self.node = node

    def start(self) -> None:
        export = (
            f"type=vhost-user-blk,id=export,addr.type=unix,addr.path={self.sockets[0]},"
            "node-name=disk,writable=on"
        )
        self.process = core.start(
            ["qemu-storage-daemon", "--blockdev", self.node, "--export", export]
        )
        self.wait_for_sockets()

    def mark(self) -> Any:
        return time.monotonic(), cpu_s(self.process.pid) if self.process else 0.0

    def load(self, mark: Any) -> dict[str, float]:
        now_s, used_s = self.mark()
        return {"busy_share": (used_s - mark[1]) / (now_s - mark[0])}


def cpu_s(pid: int) -> float:
    """User and system time that a process has used, to the nanosecond."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3), which Python lacks


def used_share(pid: int, seconds: float) -> float:
    """Waits so long; the share of a core that a process has used meanwhile."""
    since_s, used_s = time.monotonic(), cpu_s(pid)
    time.sleep(seconds)
    return (cpu_s(pid) - used_s) / (time.monotonic() - since_s)


def machine_s() -> float:
    """Time that all processors together have not been idle, the hypervisor's included."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _wait_for(path: Path, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} did not appear")
        time.sleep(0.02)
