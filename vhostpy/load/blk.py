"""I/O on any vhost-user-blk back-end: handshake, memory, phases, figures.

The loop itself is `blk_loop`; this is what happens before, around and after it.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from vhostpy._ring import DriverVirtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.errors import ConfigError, ProtocolError
from vhostpy.frontend.frontend import FrontEnd, Queue
from vhostpy.load import report
from vhostpy.load.blk_loop import (
    BLOCKS_MAX,
    CONTROL_BYTES,
    VERIFY_BLOCKS_MAX,
    BlkGenerator,
    BlkPhase,
)
from vhostpy.load.runner import Runner, Sample, seconds_between, shares
from vhostpy.load.target import asked, connect, handshake, memory_layout, want_offered

SECTOR = 512
PIECES = 3  # header, data, status
STALL_S = 10.0
PROTOCOL_FEATURES = (
    1 << ProtocolFeature.MQ | 1 << ProtocolFeature.REPLY_ACK | 1 << ProtocolFeature.CONFIG
)
# What to do where one of these is not offered.
HINTS = {
    Feature.RING_PACKED: "--layout split",
    Feature.IN_ORDER: "leave --in-order",
    Feature.INDIRECT_DESC: "leave --indirect",
    Feature.BLK_MQ: "--queues 1",
}


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


def run(plan: BlkPlan, progress: report.Progress | None = None) -> dict[str, Any]:
    """Runs the plan; returns its figures. Raises ConfigError, ProtocolError."""
    with ExitStack() as stack:
        generator, front_end, config, blocks = prepare(plan, stack)
        with DiskRunner(
            generator, (plan.socket,), (front_end,), cpu=plan.cpu, progress=progress
        ) as runner:
            return _phases(plan, runner, config, blocks)


def prepare(plan: BlkPlan, stack: ExitStack) -> tuple[Any, FrontEnd, DiskConfig, int]:
    """A generator that is ready, the front-end that it stands on, which `stack` closes, and
    what the disk is: its configuration, and how many blocks of it are used."""
    front_end = stack.enter_context(connect(plan.socket))
    with handshake(plan.socket):
        config, queues = _start(plan, front_end)
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
    return generator, front_end, config, blocks


# Handshake -----------------------------------------------------------------------------


def _start(plan: BlkPlan, front_end: FrontEnd) -> tuple[DiskConfig, list[tuple[Queue, int, int]]]:
    """Starts the queues: (queue, GPA of headers and the like, GPA of the data) of each."""
    offered, _ = asked(front_end, plan.socket)
    wanted = _wanted(plan)
    want_offered(plan.socket, wanted, offered, HINTS)
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
    block = config.block_bytes
    if block < SECTOR or block & (block - 1):
        raise ProtocolError(
            f"the back-end says blk_size {block}, expected a power of two from {SECTOR} on"
        )
    if config.capacity_bytes >= 1 << 64:
        raise ProtocolError(
            f"the back-end says {config.capacity_bytes // SECTOR} sectors, "
            "more than 64 bits can address"
        )
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


class DiskRunner(Runner):
    """A run on a disk, which has to answer every request."""

    def want_alive(self) -> None:
        """Raises where the back-end or the loop has ended, or requests are not answered."""
        super().want_alive()
        under_way = self.generator.under_way
        if under_way and self.generator.silent_s > STALL_S:
            raise ProtocolError(
                f"{self.sockets[0]}: {under_way} requests are not answered, for {STALL_S:g} s",
                "is its storage alive? 'vhostpy status' shows a disk of vhostpy",
            )

    def rest(self) -> None:
        """Until every request is answered; no new one is made."""
        self.generator.enter(BlkPhase.REST)
        self.wait(0.01)
        while not self.wait(STALL_S, lambda: not self.generator.under_way):
            pass

    def whole_pass(self, phase: int, verb: str) -> None:
        """Until the phase has been over all blocks."""
        generator = self.generator
        generator.enter(phase)
        # The loop begins anew when it sees the phase.
        self.wait(0.01)
        while not self.wait(1.0, lambda: generator.progress >= 1):
            self.progress.show(lambda: f"{100 * generator.progress:.0f} % {verb}")
        self.rest()


def _phases(plan: BlkPlan, runner: DiskRunner, config: DiskConfig, blocks: int) -> dict[str, Any]:
    """Fills where reads are to be verified, runs, reads back what was written."""
    generator = runner.generator
    if plan.verify and plan.reads == 1:
        runner.whole_pass(BlkPhase.FILL, "written")
    generator.enter(BlkPhase.RUN)
    first, last = runner.measure(plan.warmup_s, plan.seconds, partial(_line, plan))
    latencies = generator.latencies(False), generator.latencies(True)
    runner.rest()
    verified = plan.verify and (plan.reads == 1 or not runner.interrupted)
    if verified and plan.reads < 1:
        runner.whole_pass(BlkPhase.CHECK, "read back")
    end = runner.sample()
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
        "hugepages": runner.hugepages,
        **_figures(plan, first, last),
        # These count from the first request to the last, verification included.
        "reads": end.total("reads"),
        "writes": end.total("writes"),
        "failed_requests": end.total("failed"),
        "corrupt_requests": end.total("corrupt"),
        "verified": verified,
        "interrupted": runner.interrupted,
        "kicks": end.total("kicks"),
        "read_latency_us": report.spread(latencies[0], per_us),
        "write_latency_us": report.spread(latencies[1], per_us),
    }


def _line(plan: BlkPlan, a: Sample, b: Sample, elapsed_s: float) -> str:
    return report.blk_line(_figures(plan, a, b), elapsed_s)


def _figures(plan: BlkPlan, a: Sample, b: Sample) -> dict[str, Any]:
    """Rates between two moments."""
    seconds = seconds_between(a, b)
    reads = b.total("reads") - a.total("reads")
    writes = b.total("writes") - a.total("writes")
    busy = b.ticks["busy"] - a.ticks["busy"]
    requests = reads + writes
    return {
        "kiops": requests / seconds / 1e3,
        "read_kiops": reads / seconds / 1e3,
        "write_kiops": writes / seconds / 1e3,
        "mb_s": requests / seconds * plan.block_bytes / 1e6,
        **shares(a, b),
        "generator_cycles_per_request": busy / requests if requests else None,
    }
