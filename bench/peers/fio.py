"""fio on the very file that vhostpy serves: what the kernel gives without any device between."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.peers import core
from bench.peers.devices import Device, used_share
from bench.peers.generators import Calm, per_cpu

WARMUP_S = 1
MARGIN_S = 0.3


class Fio(Device):
    """No server: it is generator and device at once, on the device's core."""

    name = "fio"
    polls = False

    def __init__(self, folder: Path, image: Path, *, direct: bool) -> None:
        super().__init__(folder, 0)
        self.image, self.direct = image, direct
        self.generator = self.run

    def start(self) -> None:
        """Nothing to start."""

    def run(
        self, device: Device, seconds: int, *, depth: int, pattern: str = "randread",
        block_bytes: int = 4096,
    ) -> dict[str, Any]:  # fmt: skip
        """One run, with the plan of `vhostpy load`: `value` is kIOPS."""
        argv = [
            "fio", "--name=bench", f"--filename={self.image}", "--ioengine=io_uring",
            f"--direct={int(self.direct)}", f"--rw={pattern}", f"--bs={block_bytes}",
            f"--iodepth={depth}", "--norandommap", "--randrepeat=0", "--thread", "--time_based",
            f"--runtime={seconds}", f"--ramp_time={WARMUP_S}", "--invalidate=0",
            "--output-format=json",
        ]  # fmt: skip
        calm = Calm()
        process = core.start(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        # What fio says of its processor time leaves out the kernel's threads that work for it.
        time.sleep(WARMUP_S + MARGIN_S)
        used = used_share(process.pid, seconds - 2 * MARGIN_S)
        output = process.communicate()[0].decode()
        if process.returncode:
            raise RuntimeError(f"fio ended with {process.returncode}")
        result = json.loads(output[output.index("{") :])
        (job,) = result["jobs"]
        way = job["write" if "write" in pattern else "read"]
        run = {
            "value": way["iops"] / 1e3,
            "mb_s": way["bw_bytes"] / 1e6,
            "device_used_share": used,
            "busy_share": used,
        }
        if times := way["clat_ns"].get("percentile"):
            names = {"p50": "50.000000", "p99": "99.000000", "p99_9": "99.900000"}
            run |= {f"latency_{name}_us": times[key] / 1e3 for name, key in names.items()}
        run["machine_share"] = calm.share()
        return run | per_cpu(run)
