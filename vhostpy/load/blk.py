"""I/O on any vhost-user-blk back-end: handshake, memory, phases, figures.

The loop itself is `_blk`; this is what happens before, around and after it.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from vhostpy._ring import DriverVirtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.errors import ConfigError, ProtocolError, VhostpyError
from vhostpy.frontend import FrontEnd, Queue
from vhostpy.load import report
from vhostpy.load._blk import (
    BLOCKS_MAX,
    CONTROL_BYTES,
    VERIFY_BLOCKS_MAX,
    BlkGenerator,
    BlkPhase,
)
from vhostpy.load.report import Sample, sample
from vhostpy.load.target import asked, connect, first_line, hung_up, memory_layout

SECTOR = 512
PIECES = 3  # header, data, status
STALL_S = 10.0
PROTOCOL_FEATURES = (
    1 << ProtocolFeature.MQ | 1 << ProtocolFeature.REPLY_ACK | 1 << ProtocolFeature.CONFIG
)


@dataclass(frozen=True, slots=True)
class BlkPlan:
    """What to read and write, and how."""

    socket: str
    pattern: str = "randread"  # randwrite, read, write, mix
    block_bytes: int = 4096
    depth: int = 32
    queues: int = 1
    queue_size: int = 1024
    layout: str = "split"
    in_order: bool = False
    event_idx: bool = False
    indirect: bool = False
    seconds: float = 5.0
    warmup_s: float = 0.5
    span_bytes: int | None = None
    read_share: float = 0.7  # of a mix
    verify: bool = False
    cpu: int | None = None

    @property
    def reads(self) -> float:
        """The share of reads in the pattern."""
        shares = {"randread": 1.0, "read": 1.0, "randwrite": 0.0, "write": 0.0}
        return shares.get(self.pattern, self.read_share)

    @property
    def writes(self) -> bool:
        """Whether anything is written."""
        return self.reads < 1 or self.verify


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """Of the disk's config space (virtio 1.3, "Block Device / Device configuration layout")."""

    capacity_bytes: int
    block_bytes: int
    queues: int

    # All up to num_queues. Some back-ends refuse more than their own struct, others
    # answer any length.
    SIZE = 36

    @classmethod
    def unpack(cls, data: bytes, features: int) -> "DiskConfig":
        def has(bit: Feature) -> bool:
            return bool(features >> bit & 1)

        return cls(
            int.from_bytes(data[0:8], "little") * SECTOR,
            int.from_bytes(data[20:24], "little") if has(Feature.BLK_BLK_SIZE) else SECTOR,
            int.from_bytes(data[34:36], "little") if has(Feature.BLK_MQ) else 1,
        )


def run(plan: BlkPlan, progress: "report.Progress | None" = None) -> dict[str, Any]:
    """Runs the plan; returns its figures. Raises ConfigError, ProtocolError."""
    with ExitStack() as stack:
        front_end = stack.enter_context(connect(plan.socket))
        try:
            config, queues = _start(plan, front_end)
        except ConfigError:
            raise
        except (OSError, ProtocolError) as error:
            raise ConfigError(
                f"{plan.socket}: the handshake failed: {first_line(error)}",
                getattr(error, "hint", ""),
            ) from error
        blocks = _blocks(plan, config)
        generator = BlkGenerator(
            queues,
            depth=plan.depth,
            block_bytes=plan.block_bytes,
            blocks=blocks,
            read_share=plan.reads,
            random=plan.pattern in ("randread", "randwrite", "mix"),
            verify=plan.verify,
            indirect=plan.indirect,
        )
        failure: list[BaseException] = []
        thread = threading.Thread(target=_loop, args=(generator, plan.cpu, failure), name="load")
        thread.start()
        try:
            runner = _Runner(plan, front_end, generator, thread, progress or report.Progress())
            return runner.phases(config, blocks)
        finally:
            generator.stop()
            thread.join()
            if failure:
                raise failure[0]


def _loop(generator: Any, cpu: int | None, failure: list[BaseException]) -> None:
    try:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        generator.run()
    except BaseException as error:
        failure.append(error)


# Handshake -----------------------------------------------------------------------------


def _start(plan: BlkPlan, front_end: FrontEnd) -> tuple[DiskConfig, list[tuple[Queue, int, int]]]:
    """Starts the queues: (queue, GPA of headers and the like, GPA of the data) of each."""
    offered, _ = asked(front_end, plan.socket)
    wanted = _wanted(plan)
    for bit in (Feature.RING_PACKED, Feature.IN_ORDER, Feature.INDIRECT_DESC, Feature.BLK_MQ):
        if wanted >> bit & 1 and not offered >> bit & 1:
            hint = {
                Feature.RING_PACKED: "--layout split",
                Feature.IN_ORDER: "leave --in-order",
                Feature.INDIRECT_DESC: "leave --indirect",
                Feature.BLK_MQ: "--queues 1",
            }[bit]
            raise ConfigError(f"{plan.socket}: the back-end does not offer {bit.name}", hint)
    if plan.writes and offered >> Feature.BLK_RO & 1:
        raise ConfigError(f"{plan.socket}: the disk is read-only", "--pattern randread or read")
    needed = plan.depth * (1 if plan.indirect else PIECES)
    if needed > plan.queue_size:
        raise ConfigError(
            f"{plan.depth} requests need {needed} descriptors, a queue has {plan.queue_size}",
            f"--depth {plan.queue_size // PIECES}, a larger --queue-size, or --indirect",
        )
    front_end.negotiate(wanted, PROTOCOL_FEATURES)
    config = DiskConfig.unpack(front_end.get_config(0, DiskConfig.SIZE), offered)
    _check_config(plan, config)
    control, data = plan.depth * CONTROL_BYTES, plan.depth * plan.block_bytes
    rings = sum(DriverVirtqueue.ring_bytes(plan.queue_size)) + 3 * 4096
    front_end.layout = memory_layout(plan.queues * (control + data + rings + 2 * 4096))
    front_end.set_mem_table()
    return config, [
        (
            front_end.start_queue(index, plan.queue_size),
            front_end.allocate(control),
            front_end.allocate(data),
        )
        for index in range(plan.queues)
    ]


def _wanted(plan: BlkPlan) -> int:
    # FLUSH as every guest has it: a disk without it has to write through.
    bits = [Feature.VERSION_1, Feature.BLK_RO, Feature.BLK_FLUSH]
    flags = {
        Feature.BLK_MQ: plan.queues > 1,
        Feature.INDIRECT_DESC: plan.indirect,
        Feature.EVENT_IDX: plan.event_idx,
        Feature.RING_PACKED: plan.layout == "packed",
        Feature.IN_ORDER: plan.in_order,
    }
    return sum(1 << bit for bit in (*bits, *(bit for bit, wanted in flags.items() if wanted)))


def _check_config(plan: BlkPlan, config: DiskConfig) -> None:
    if plan.block_bytes % config.block_bytes or plan.block_bytes % SECTOR:
        raise ConfigError(
            f"{plan.socket}: requests of {plan.block_bytes} bytes on a disk with blocks of "
            f"{config.block_bytes}",
            f"--block-size {max(config.block_bytes, SECTOR)}, or a multiple of it",
        )
    if plan.queues > max(config.queues, 1):
        raise ConfigError(
            f"{plan.socket}: the disk has {config.queues} queues",
            f"--queues {max(config.queues, 1)} or less",
        )
    if config.capacity_bytes < plan.block_bytes:
        raise ConfigError(
            f"{plan.socket}: the disk has {config.capacity_bytes} bytes", "a smaller --block-size"
        )


def _blocks(plan: BlkPlan, config: DiskConfig) -> int:
    span = config.capacity_bytes
    if plan.span_bytes is not None:
        if plan.span_bytes > span:
            raise ConfigError(
                f"a span of {plan.span_bytes} bytes on a disk of {span}", "a smaller --span"
            )
        span = plan.span_bytes
    blocks = span // plan.block_bytes
    if blocks == 0:
        raise ConfigError("a span smaller than a block", "a larger --span")
    most = VERIFY_BLOCKS_MAX if plan.verify else BLOCKS_MAX
    if plan.verify and blocks > most:
        hint = f"--span {most * plan.block_bytes >> 30}G or less"
        raise ConfigError(f"{blocks} blocks are too many to verify", hint)
    return min(blocks, most)


# Phases --------------------------------------------------------------------------------


class _Runner:
    """One run of a started generator."""

    def __init__(
        self,
        plan: BlkPlan,
        front_end: FrontEnd,
        generator: Any,
        thread: threading.Thread,
        progress: "report.Progress",
    ) -> None:
        self.plan = plan
        self.front_end = front_end
        self.generator = generator
        self.thread = thread
        self.progress = progress

    def phases(self, config: DiskConfig, blocks: int) -> dict[str, Any]:
        """Fills where reads are to be verified, runs, reads back what was written."""
        plan, generator = self.plan, self.generator
        if plan.verify and plan.reads == 1:
            self._whole_pass(BlkPhase.FILL, "written")
        generator.enter(BlkPhase.RUN)
        self._wait(plan.warmup_s)
        generator.forget_latencies()
        first = previous = sample(self.generator, self.thread)
        while (left := first.at_s + plan.seconds - time.monotonic()) > 0:
            self._wait(min(left, 1.0), step=1.0)
            now = sample(self.generator, self.thread)
            self.progress.show(partial(self._line, previous, now, now.at_s - first.at_s))
            previous = now
        last = sample(self.generator, self.thread)
        latencies = generator.latencies(False), generator.latencies(True)
        self._rest()
        if plan.verify and plan.reads < 1:
            self._whole_pass(BlkPhase.CHECK, "read back")
        end = sample(self.generator, self.thread)
        self.progress.done()
        per_us = first.ticks["per_us"]
        return {
            "kind": "blk",
            "socket": plan.socket,
            "seconds": last.at_s - first.at_s,
            "layout": plan.layout,
            "queues": plan.queues,
            "queue_size": plan.queue_size,
            "pattern": plan.pattern,
            "block_bytes": plan.block_bytes,
            "depth": plan.depth,
            "indirect": plan.indirect,
            "capacity_bytes": config.capacity_bytes,
            "span_bytes": blocks * plan.block_bytes,
            "hugepages": self.front_end.shared.page_bytes > 4096,
            **self._figures(first, last),
            # These count from the first request to the last, verification included.
            "reads": end.total("reads"),
            "writes": end.total("writes"),
            "failed_requests": end.total("failed"),
            "corrupt_requests": end.total("corrupt"),
            "verified": plan.verify,
            "kicks": end.total("kicks"),
            "read_latency_us": report.spread(latencies[0], per_us),
            "write_latency_us": report.spread(latencies[1], per_us),
        }

    def _whole_pass(self, phase: int, verb: str) -> None:
        generator = self.generator
        generator.enter(phase)
        # The loop begins anew when it sees the phase.
        self._wait(0.01)
        while not self._wait(1.0, lambda: generator.progress >= 1):
            self.progress.show(lambda: f"{100 * generator.progress:.0f} % {verb}")
        self._rest()

    def _rest(self) -> None:
        self.generator.enter(BlkPhase.REST)
        self._wait(0.01)
        while not self._wait(STALL_S, lambda: not self.generator.under_way):
            pass

    def _wait(
        self, seconds: float, done: Callable[[], bool] = lambda: False, step: float = 0.01
    ) -> bool:
        """Until `done`, at most `seconds`; raises where the back-end or the loop has ended."""
        end = time.monotonic() + seconds
        while not done():
            self._want_alive()
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, step))
        return True

    def _want_alive(self) -> None:
        where = self.plan.socket
        if self.generator.broken_pair is not None:
            raise ProtocolError(
                f"{where}: the back-end gave back a chain that it does not have",
                "the back-end is at fault: see what it says itself",
            )
        if not self.thread.is_alive():
            raise VhostpyError("the generator ended early")
        if hung_up([self.front_end]) is not None:
            raise ProtocolError(
                f"{where}: the back-end closed the connection", "see what it says itself"
            )
        under_way = self.generator.under_way
        if under_way and self.generator.silent_s > STALL_S:
            raise ProtocolError(
                f"{where}: {under_way} requests are not answered, for {STALL_S:g} s",
                "is its storage alive? 'vhostpy status' shows a disk of vhostpy",
            )

    def _line(self, a: Sample, b: Sample, elapsed_s: float) -> str:
        return report.blk_line(self._figures(a, b), elapsed_s)

    def _figures(self, a: Sample, b: Sample) -> dict[str, Any]:
        seconds = max(b.at_s - a.at_s, 1e-9)
        reads = (b.total("reads") - a.total("reads")) / seconds
        writes = (b.total("writes") - a.total("writes")) / seconds
        busy = b.ticks["busy"] - a.ticks["busy"]
        requests = (reads + writes) * seconds
        return {
            "kiops": (reads + writes) / 1e3,
            "read_kiops": reads / 1e3,
            "write_kiops": writes / 1e3,
            "mb_s": (reads + writes) * self.plan.block_bytes / 1e6,
            # Below 1 something else ran on its processor.
            "generator_cpu_share": (b.ran_s - a.ran_s) / seconds,
            "generator_busy_share": busy / max(b.ticks["total"] - a.ticks["total"], 1),
            "generator_cycles_per_request": busy / requests if requests else None,
        }
