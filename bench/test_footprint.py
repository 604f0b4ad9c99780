"""What vhostpy costs at rest: time to listen, idle CPU, resident memory."""

import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from vhostpy._spec import Feature
from vhostpy.frontend.frontend import FrontEnd

IDLE_S = 2.0


def start(path: Path) -> subprocess.Popen[bytes]:
    """A `vhostpy net` process that listens on `path`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vhostpy", "net", "--socket", str(path)],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(path))
                return process
            except OSError:
                time.sleep(0.002)
    process.kill()
    raise TimeoutError("vhostpy net did not listen within 10 s")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    assert process.wait(10) == 0


def cpu_s(pid: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_start_to_listening(benchmark, tmp_path):
    """Wall time from exec to a socket that accepts (goal: 0.3 s)."""
    processes = []
    paths = (tmp_path / f"vu{i}" for i in itertools.count())
    benchmark.pedantic(lambda: processes.append(start(next(paths))), rounds=5, warmup_rounds=1)
    benchmark.extra_info["start_to_listening_s"] = benchmark.stats.stats.median
    for process in processes:
        stop(process)


def test_idle_with_a_connected_port(benchmark, tmp_path):
    """CPU share and resident memory with a port whose rings run (goals: 1 %, 60 MB)."""
    path = tmp_path / "vu0"
    process = start(path)
    front_end = FrontEnd(str(path))
    front_end.negotiate(1 << Feature.VERSION_1 | 1 << Feature.PROTOCOL_FEATURES, 0)
    front_end.set_mem_table()
    for index in range(2):
        front_end.start_queue(index, 256)
        front_end.enable(index, True)
    time.sleep(0.2)
    before = cpu_s(process.pid)
    benchmark.pedantic(time.sleep, args=(IDLE_S,), rounds=1)
    benchmark.extra_info["idle_cpu_percent"] = 100 * (cpu_s(process.pid) - before) / IDLE_S
    rss_pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    benchmark.extra_info["resident_mb"] = rss_pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    front_end.close()
    stop(process)
