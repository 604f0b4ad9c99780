"""`qemu-img bench` as a witness: QEMU's own virtio-blk driver (libblkio), without a guest.

It asks for the next request some microseconds after the last came back, as a guest does:
a device that sleeps meanwhile has to be woken. `vhostpy load` is back before it sleeps.
"""

import re
import subprocess
import time
from typing import Any

from bench.peers.devices import Device, used_share
from bench.peers.generators import GENERATOR_CORE, WARMUP_S, Calm, Watch
from tests.peers import peers

FEW = 20_000  # requests, which tell how many a run needs


def qemu_img(device: Device, seconds: int, *, depth: int) -> dict[str, Any]:
    """One run of 4 KiB reads in a row: `value` is kIOPS."""
    count = int(FEW / _took_s(_start(device, depth, FEW)) * (WARMUP_S + seconds + 0.5))
    assert device.process is not None
    watch, calm = Watch(device), Calm(device.process.pid)
    process = _start(device, depth, count)
    time.sleep(WARMUP_S)
    watch.show()
    share = used_share(process.pid, seconds)
    watch.show()
    run = {"value": count / _took_s(process) / 1e3, "generator_busy_share": share, **watch.load}
    return run | {"machine_share": calm.share()}


def _start(device: Device, depth: int, count: int) -> subprocess.Popen[str]:
    program = peers.trixie("qemu-img")
    target = f"driver=virtio-blk-vhost-user,path={device.sockets[0]},cache.direct=on"
    argv = [
        "taskset", "-c", str(GENERATOR_CORE), *program.argv, "bench", "-c", str(count),
        "-d", str(depth), "-s", "4096", "-t", "none", "--image-opts", target,
    ]  # fmt: skip
    return subprocess.Popen(
        argv, env=program.env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _took_s(process: subprocess.Popen[str]) -> float:
    output, _ = process.communicate(timeout=60)
    found = re.search(r"Run completed in ([\d.]+) seconds", output)
    if not found:
        raise RuntimeError(f"qemu-img bench: {output.strip()}")
    return float(found[1])
