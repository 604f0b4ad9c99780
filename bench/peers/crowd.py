"""Many ports, many disks: what those cost that rest, and whether all are served alike."""

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.peers.devices import Device, Vhostpy
from bench.peers.generators import GENERATOR_CORE, WARMUP_S, Watch, idle
from vhostpy._ring import DriverVirtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.load.blk_loop import CONTROL_BYTES, BlkGenerator, BlkPhase
from vhostpy.load.runner import thread_time_s
from vhostpy.load.target import connect, memory_layout
from vhostpy.site.site import raise_fd_limit

PORTS = 1000
DISKS = 64
QUEUE_SIZE = 256
DEPTH = 16
BLOCK_BYTES = 4096


class Crowd(Vhostpy):
    """A switch with many ports, all but two of them connected to drivers that rest."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, PORTS, "net", poll="adaptive")
        self.all_sockets = self.sockets
        self.resting: list[FrontEnd] = []

    def start(self) -> None:
        # Nine file descriptors a port, here and there.
        raise_fd_limit()
        self.sockets = self.all_sockets
        super().start()
        for path in self.all_sockets[2:]:
            front_end = FrontEnd(path, timeout_s=30, layout=((0x10_0000, 256 << 10),))
            self.resting.append(front_end)
            front_end.negotiate(1 << Feature.VERSION_1 | 1 << Feature.NET_MRG_RXBUF, 0)
            front_end.set_mem_table()
            for index in (0, 1):
                front_end.start_queue(index, QUEUE_SIZE)
        self.sockets = self.all_sockets[:2]

    def mark(self) -> Any:
        """Nothing: the status of so many takes a tenth of a second of the generator's core."""

    def load(self, mark: Any) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.resume()
        for front_end in self.resting:
            front_end.close()
        super().close()


class Disks(Device):
    """Many disks in one process, which no command of vhostpy's makes: see `main`."""

    name = "vhostpy"
    polls = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, DISKS)

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "bench.peers.crowd", *self.sockets])
        self.wait_for_sockets()


def all_disks(device: Device, seconds: int) -> dict[str, Any]:
    """All disks at once: `value` is how far the slowest lies below the fastest, in percent."""
    with ExitStack() as stack:
        front_ends = [stack.enter_context(connect(path)) for path in device.sockets]
        generator = BlkGenerator(
            [_start_disk(front_end) for front_end in front_ends], depth=DEPTH,
            block_bytes=BLOCK_BYTES, blocks=1 << 20, read_share=1.0, random=True,
        )  # fmt: skip

        def generate() -> None:
            os.sched_setaffinity(0, {GENERATOR_CORE})
            generator.run()

        thread = threading.Thread(target=generate, name="load")
        thread.start()
        try:
            generator.enter(BlkPhase.RUN)
            time.sleep(WARMUP_S)
            watch = Watch(device)
            watch.show()
            before, since_s, ran_s = generator.counters(), time.monotonic(), thread_time_s(thread)
            time.sleep(seconds)
            passed_s = time.monotonic() - since_s
            share = (thread_time_s(thread) - ran_s) / passed_s
            after = generator.counters()
            watch.show()
            generator.enter(BlkPhase.REST)
        finally:
            generator.stop()
            thread.join()
    rates = [
        (now["reads"] - then["reads"]) / passed_s for now, then in zip(after, before, strict=True)
    ]
    failed = sum(counter["failed"] for counter in after)
    if failed or not max(rates):
        raise RuntimeError(f"{failed} requests failed; {max(rates):.0f} a second")
    return {
        "value": 100 * (1 - min(rates) / max(rates)),
        "kiops": sum(rates) / 1e3,
        "generator_cpu_share": share,
        **watch.load,
    }


def resting_disks(device: Device, seconds: int) -> dict[str, Any]:
    """All disks with a driver that rests: `value` is the percentage of a core that it takes."""
    with ExitStack() as stack:
        for path in device.sockets:
            _start_disk(stack.enter_context(connect(path)))
        return idle(device, seconds)


def _start_disk(front_end: FrontEnd) -> tuple[Any, int, int]:
    front_end.negotiate(1 << Feature.VERSION_1, 1 << ProtocolFeature.CONFIG)
    control, data = DEPTH * CONTROL_BYTES, DEPTH * BLOCK_BYTES
    rings = sum(DriverVirtqueue.ring_bytes(QUEUE_SIZE)) + 3 * 4096
    front_end.layout = memory_layout(control + data + rings + 2 * 4096)
    front_end.set_mem_table()
    queue = front_end.start_queue(0, QUEUE_SIZE)
    return queue, front_end.allocate(control), front_end.allocate(data)


def main(sockets: list[str]) -> None:
    """Serves a null disk at each socket until SIGTERM, with one worker that may sleep."""
    import asyncio

    from bench.peers.devices import DEVICE_CORE
    from vhostpy.backends.blk.device import Disk
    from vhostpy.backends.storage.null import NullStorage
    from vhostpy.runtime.pool import Workers
    from vhostpy.server.listen import Server
    from vhostpy.site.site import App

    raise_fd_limit()
    workers = Workers(1, poll="adaptive", cpus=[DEVICE_CORE])
    storages = [NullStorage(1 << 32, 512) for _ in sockets]
    servers = [
        Server(Disk(Path(path).name, storage, workers, queues=1), path=path)
        for path, storage in zip(sockets, storages, strict=True)
    ]
    control = sockets[0] + ".control"
    app = App("blk", workers=workers, servers=servers, storages=storages, control_path=control)
    asyncio.run(app.run())


if __name__ == "__main__":
    main(sys.argv[1:])
