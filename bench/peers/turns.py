"""Two workers on a machine of two cores: the generator works while they sleep.

Both cores are the workers', so a generator beside them would only measure the scheduler.
Here it has the rest: one thread of class SCHED_IDLE on the second core that fills all rings
and never kicks. Each millisecond all ports are kicked at once: both workers wake, run at the
same time until the rings are empty, in full bursts, and sleep; a worker that is awake puts
the generator aside. The figure is busy cycles a packet of the first worker, whose frames
come from the other core, as a guest's do; the second one's are its own core's.

What is compared with it is the same, of two processes with one worker each.
"""

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.peers.devices import DEVICE_CORE, Device, Vhostpy
from bench.peers.generators import GENERATOR_CORE, Calm
from vhostpy._ring import DriverVirtqueue
from vhostpy._spec import Feature
from vhostpy.errors import VhostpyError
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.load.net_loop import NetGenerator, Phase, Touch
from vhostpy.load.target import connect, memory_layout

CPUS = (DEVICE_CORE, GENERATOR_CORE)
PORTS = 4  # they go to the workers by turns: 0 and 2 to the first one
APART = (2, 3, 0, 1)  # each port's peer is of the same worker
CROSSING = (1, 0, 3, 2)
FIRST_WORKERS = (0, 2)

PERIOD_S = 0.001
REST_S = 1.2  # a device's figures may be a second old
TEACH_S = 10.0
QUEUE_SIZE = 1024
ROOM, STRIDE = 2048, 2304


class TwoWorkers(Vhostpy):
    """One process, which sleeps as soon as there is nothing to do."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, PORTS, "net", poll="interrupt", cpus=CPUS)

    @property
    def pids(self) -> list[int]:
        """Of all its processes."""
        return [self.process.pid] if self.process else []


class WorkerEach(Device):
    """Two processes with a worker and a pair of ports each: they share nothing."""

    name = "a process each"
    polls = False
    plan = {"peers": APART}  # noqa: RUF012 a ClassVar by its base

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 0)
        self.processes = [
            Vhostpy(folder, PORTS // 2, "net", poll="interrupt", name=f"single{cpu}", cpus=(cpu,))
            for cpu in CPUS
        ]

    @property
    def pids(self) -> list[int]:
        """Of all its processes."""
        return [each.process.pid for each in self.processes if each.process]

    def start(self) -> None:
        for each in self.processes:
            each.start()
        first, second = (each.sockets for each in self.processes)
        self.sockets = [first[0], second[0], first[1], second[1]]

    def pause(self) -> None:
        for each in self.processes:
            each.pause()

    def resume(self) -> None:
        for each in self.processes:
            each.resume()

    def close(self) -> None:
        for each in self.processes:
            each.close()

    def mark(self) -> Any:
        return self.processes[0].mark()


def by_turns(
    device: Any, seconds: int, *, peers: tuple[int, ...] = APART, size: int = 64
) -> dict[str, Any]:
    """One run: `value` is busy cycles a packet of the first worker."""
    with ExitStack() as stack:
        front_ends = [stack.enter_context(connect(path)) for path in device.sockets]
        pairs = [
            (*_start(front_end), port, peers[port], True)
            for port, front_end in enumerate(front_ends)
        ]
        kicks = [front_end.queues[1].kick for front_end in front_ends]
        generator = NetGenerator(
            pairs, sizes=(size,), touch=Touch.HEADER, dirty=True, room=ROOM, stride=STRIDE,
            ports=PORTS,
        )  # fmt: skip
        thread = threading.Thread(target=_generate, args=(generator,), name="load")
        thread.start()

        def turns(for_s: float) -> None:
            end = time.monotonic() + for_s
            while time.monotonic() < end:
                for kick in kicks:
                    assert kick is not None
                    os.eventfd_write(kick.fileno(), 1)
                time.sleep(PERIOD_S)

        try:
            generator.enter(Phase.TEACH)
            deadline = time.monotonic() + TEACH_S
            while generator.teaching:
                turns(0.05)
                if time.monotonic() > deadline:
                    raise VhostpyError("the generator gets no time of its own")
            turns(0.1)
            time.sleep(REST_S)
            before, mark, calm = _sent(generator), device.mark(), Calm(*device.pids)
            generator.enter(Phase.SEND)
            turns(seconds)
            generator.enter(Phase.LISTEN)
            machine_share = calm.share()
            turns(0.1)
            time.sleep(REST_S)
            after, now = _sent(generator), device.mark()
            counters = generator.counters()
        finally:
            generator.stop()
            thread.join()
    packets = sum(after[port] - before[port] for port in FIRST_WORKERS)
    bursts = now["busy_turns"] - mark["busy_turns"]
    lost = sum(counter["sent"] - counter["received"] for counter in counters)
    if not packets or lost > packets // 100:
        raise VhostpyError(f"{packets} packets went, {lost} did not arrive")
    cycles = (now["busy_ticks"] - mark["busy_ticks"]) / packets
    return {
        "value": cycles,
        "cycles_per_packet": cycles,
        "packets_per_turn": packets / max(bursts, 1),
        "mpps": packets / seconds / 1e6,
        "machine_share": machine_share,
    }


def _start(front_end: FrontEnd) -> tuple[Any, Any, int, int]:
    """Queues of which the generator knows no kick, and their buffers."""
    features = 1 << Feature.VERSION_1 | 1 << Feature.NET_MRG_RXBUF
    front_end.negotiate(features, 0)
    buffers = QUEUE_SIZE * STRIDE
    rings = sum(DriverVirtqueue.ring_bytes(QUEUE_SIZE)) + 3 * 4096
    front_end.layout = memory_layout(2 * (buffers + rings + 4096))
    front_end.set_mem_table()
    rx, tx = (replace(front_end.start_queue(index, QUEUE_SIZE), kick=None) for index in (0, 1))
    return rx, tx, front_end.allocate(buffers), front_end.allocate(buffers)


def _generate(generator: Any) -> None:
    os.sched_setaffinity(0, {GENERATOR_CORE})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    generator.run()


def _sent(generator: Any) -> list[int]:
    return [counter["sent"] for counter in generator.counters()]
