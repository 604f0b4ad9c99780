"""Packets through any vhost-user-net back-end: handshake, memory, phases, figures.

The loop itself is `net_loop`; this is what happens before, around and after it.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from vhostpy._ring import DriverVirtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.errors import ConfigError
from vhostpy.frontend.frontend import FrontEnd, Queue
from vhostpy.load import report
from vhostpy.load.net_loop import FRAME_MAX, FRAME_MIN, NetGenerator, Phase, Touch
from vhostpy.load.runner import Runner, Sample, seconds_between, shares
from vhostpy.load.target import asked, connect, handshake, memory_layout, want_offered

# The Internet mix: 7 : 4 : 1 of what is 64, 570 and 1518 bytes with its checksum.
IMIX = (60, 566, 60, 566, 60, 60, 1514, 60, 566, 60, 566, 60)
HEADER = 12  # the virtio-net header of VERSION_1
GAP = 256  # from a buffer's end to the next: at a stride of 2048 they would share cache sets
TEACH_S = 10.0
DRAIN_S = 0.1
SETTLE_S = 5.0
FULL_SHARE = 0.9  # of all bursts: from here on the generator is the limit
PROTOCOL_FEATURES = 1 << ProtocolFeature.MQ | 1 << ProtocolFeature.REPLY_ACK
# What to do where one of these is not offered.
HINTS = {Feature.RING_PACKED: "--layout split", Feature.IN_ORDER: "leave --in-order"}


@dataclass(frozen=True, slots=True)
class NetPlan:
    """What to send, and how."""

    sockets: tuple[str, ...]
    sizes: tuple[int, ...] = (64,)  # bytes of a frame, checksum excluded; sent in turn
    seconds: float = 5.0
    warmup_s: float = 0.5
    queues: int = 1
    queue_size: int = 1024
    layout: str = "split"
    touch: int = Touch.HEADER
    fifo: bool = False
    dirty: bool = True
    in_order: bool = False
    event_idx: bool = False
    mergeable: bool = True
    verify: bool = False
    latency: bool = False
    window: int = 0
    rate_pps: float = 0.0
    macs: int = 1
    senders: int = 0  # the first so many sockets send; 0: all
    broadcast: bool = False
    buffer_bytes: int = 2048
    cpu: int | None = None

    def peer(self, port: int) -> int:
        """Where a port's frames go."""
        other = port ^ 1
        return other if other < len(self.sockets) else 0

    @property
    def sending(self) -> int:
        """How many ports send."""
        return self.senders or len(self.sockets)

    def active(self, port: int) -> bool:
        """Whether a port sends or is to receive."""
        return (
            self.broadcast
            or port < self.sending
            or any(self.peer(sender) == port for sender in range(self.sending))
        )


def run(plan: NetPlan, progress: report.Progress | None = None) -> dict[str, Any]:
    """Runs the plan; returns its figures. Raises ConfigError, ProtocolError."""
    _check(plan)
    with ExitStack() as stack:
        generator, front_ends = prepare(plan, stack)
        with Runner(generator, plan.sockets, front_ends, cpu=plan.cpu, progress=progress) as runner:
            return _phases(plan, runner)


def _check(plan: NetPlan) -> None:
    smallest, largest = min(plan.sizes), max(plan.sizes)
    if not FRAME_MIN <= smallest <= largest <= FRAME_MAX:
        raise ConfigError(
            f"frames of {smallest} to {largest} bytes", f"from {FRAME_MIN} to {FRAME_MAX}"
        )
    if plan.touch == Touch.NONE and (plan.latency or plan.window):
        raise ConfigError("latency needs frames that are looked at", "--touch header or frame")
    if plan.touch != Touch.FRAME and plan.verify:
        raise ConfigError("--verify needs frames that are read", "leave --touch, or --touch frame")
    if HEADER + largest > plan.buffer_bytes and not plan.mergeable:
        raise ConfigError(
            f"frames of {largest} bytes do not fit buffers of {plan.buffer_bytes}",
            f"--buffer {HEADER + largest} or more, or without --no-mergeable",
        )


# Handshake -----------------------------------------------------------------------------


def prepare(plan: NetPlan, stack: ExitStack) -> tuple[Any, list[FrontEnd]]:
    """A generator that is ready, and the front-ends that it stands on, which `stack` closes."""
    front_ends, pairs = [], []
    for port, path in enumerate(plan.sockets):
        front_end = stack.enter_context(connect(path))
        front_ends.append(front_end)
        with handshake(path):
            queues = _start(plan, front_end, path)
        if plan.active(port):
            sends = port < plan.sending
            pairs += [(*queue, port, plan.peer(port), sends) for queue in queues]
    generator = NetGenerator(
        pairs,
        sizes=plan.sizes,
        touch=plan.touch,
        dirty=plan.dirty and plan.touch != Touch.NONE,
        verify=plan.verify,
        stamps=plan.latency,
        broadcast=plan.broadcast,
        room=plan.buffer_bytes,
        stride=plan.buffer_bytes + GAP,
        macs=plan.macs,
        window=plan.window,
        rate_pps=plan.rate_pps,
        ports=len(plan.sockets),
    )
    return generator, front_ends


def _start(plan: NetPlan, front_end: FrontEnd, path: str) -> list[tuple[Queue, Queue, int, int]]:
    """Starts a socket's queues: (rx, tx, rx buffers' GPA, tx buffers' GPA) of each pair."""
    offered, _ = asked(front_end, path)
    wanted = _wanted(plan)
    want_offered(path, wanted, offered, HINTS)
    needed = HEADER + max(plan.sizes)
    if needed > plan.buffer_bytes and not offered >> Feature.NET_MRG_RXBUF & 1:
        raise ConfigError(
            f"{path}: the back-end does not offer NET_MRG_RXBUF", f"--buffer {needed}"
        )
    front_end.negotiate(wanted, PROTOCOL_FEATURES)
    if plan.queues > 1:
        _want_queues(plan, front_end, path)
    buffers = plan.queue_size * (plan.buffer_bytes + GAP)
    rings = sum(DriverVirtqueue.ring_bytes(plan.queue_size)) + 3 * 4096
    front_end.layout = memory_layout(2 * plan.queues * (buffers + rings + 4096))
    front_end.set_mem_table()
    queues = []
    for index in range(plan.queues):
        rx = front_end.start_queue(2 * index, plan.queue_size, fifo=plan.fifo)
        tx = front_end.start_queue(2 * index + 1, plan.queue_size, fifo=plan.fifo)
        queues.append((rx, tx, front_end.allocate(buffers), front_end.allocate(buffers)))
    return queues


def _wanted(plan: NetPlan) -> int:
    bits = [Feature.VERSION_1]
    if plan.mergeable:
        bits.append(Feature.NET_MRG_RXBUF)
    if plan.queues > 1:
        bits.append(Feature.NET_MQ)
    if plan.event_idx:
        bits.append(Feature.EVENT_IDX)
    if plan.layout == "packed":
        bits.append(Feature.RING_PACKED)
    if plan.in_order:
        bits.append(Feature.IN_ORDER)
    return sum(1 << bit for bit in bits)


def _want_queues(plan: NetPlan, front_end: FrontEnd, path: str) -> None:
    from vhostpy.protocol.codec import FrontEndRequest

    most = 1
    if front_end.negotiated(ProtocolFeature.MQ):
        most = int(front_end.request(FrontEndRequest.GET_QUEUE_NUM).value)
    if plan.queues > most:
        raise ConfigError(
            f"{path}: the back-end serves {most} queue pairs", f"--queues {most} or less"
        )


# Phases --------------------------------------------------------------------------------


def teach(runner: Runner) -> None:
    """A learning switch has to know all addresses before the load starts."""
    generator = runner.generator
    generator.enter(Phase.TEACH)
    runner.wait(0.02)
    runner.wait(TEACH_S, lambda: not generator.teaching)
    _settle(runner)


def _phases(plan: NetPlan, runner: Runner) -> dict[str, Any]:
    generator = runner.generator
    teach(runner)
    start = runner.sample()
    generator.enter(Phase.SEND)
    first, last = runner.measure(plan.warmup_s, plan.seconds, _line)
    latencies = generator.latencies() if plan.latency else None
    generator.enter(Phase.LISTEN)
    _settle(runner)
    end = runner.sample()
    result = _result(plan, runner.hugepages, first, last, start, end, latencies)
    return result | {"interrupted": runner.interrupted}


def _line(a: Sample, b: Sample, elapsed_s: float) -> str:
    return report.net_line(figures(a, b), elapsed_s)


def _settle(runner: Runner) -> None:
    """Until nothing arrives any more, or something always does."""
    before, end = -1, time.monotonic() + SETTLE_S
    while (count := runner.sample().total("received")) != before and time.monotonic() < end:
        before = count
        runner.wait(DRAIN_S)


def figures(a: Sample, b: Sample) -> dict[str, Any]:
    """Rates between two moments."""
    seconds = seconds_between(a, b)

    def per_second(name: str) -> float:
        return (b.total(name) - a.total(name)) / seconds

    sent = b.total("sent") - a.total("sent")
    packets = sent + b.total("received") - a.total("received")
    busy = b.ticks["busy"] - a.ticks["busy"]
    room = b.ticks["room"] - a.ticks["room"]
    return {
        "sent_mpps": per_second("sent") / 1e6,
        "received_mpps": per_second("received") / 1e6,
        "received_gbit_s": per_second("received_bytes") * 8 / 1e9,
        **shares(a, b),
        # Of what bursts could have moved. Near 1 there was always more to do.
        "generator_full_share": packets / room if room else 0.0,
        # A packet is sent and received: both halves of its way together.
        "generator_cycles_per_packet": busy / sent if sent else None,
    }


def _result(
    plan: NetPlan,
    hugepages: bool,
    first: Sample,
    last: Sample,
    start: Sample,
    end: Sample,
    latencies: Sequence[tuple[int, int]] | None,
) -> dict[str, Any]:
    def over_all(name: str) -> int:
        return end.total(name) - start.total(name)

    fanout = len(plan.sockets) - 1 if plan.broadcast else 1
    expected = over_all("sent") * fanout
    lost = expected - over_all("received")
    names = ("corrupt", "disordered", "stray", "foreign")
    return {
        "kind": "net",
        "sockets": list(plan.sockets),
        "seconds": last.at_s - first.at_s,
        "layout": plan.layout,
        "queues": plan.queues,
        "queue_size": plan.queue_size,
        "frame_bytes": list(plan.sizes),
        "mac_pairs": plan.macs,
        "touch": Touch(plan.touch).name.lower(),
        "ids": "in-order" if plan.in_order else "fifo" if plan.fifo else "lifo",
        "rx_headers": "dirty" if plan.dirty and plan.touch else "clean",
        "hugepages": hugepages,
        **(rates := figures(first, last)),
        "generator_limited": rates["generator_full_share"] > FULL_SHARE,
        # These count from the first frame to the last, the time before the measured one included.
        "sent_packets": over_all("sent"),
        "received_packets": over_all("received"),
        "lost_packets": lost,
        "lost_share": lost / expected if expected else 0.0,
        **{f"{name}_packets": over_all(name) for name in names},
        "verified": plan.verify,
        "kicks": over_all("kicks"),
        "latency_us": (
            None if latencies is None else report.spread(latencies, first.ticks["per_us"])
        ),
        "ports": [_port(plan, port, first, last) for port in range(len(plan.sockets))],
    }


def _port(plan: NetPlan, port: int, first: Sample, last: Sample) -> dict[str, Any]:
    seconds = seconds_between(first, last)

    def rate(name: str) -> float:
        count = sum(
            b[name] - a[name] for a, b in zip(first.counts, last.counts, strict=True)
            if b["port"] == port
        )  # fmt: skip
        return count / seconds / 1e6

    return {
        "socket": plan.sockets[port],
        "sent_mpps": rate("sent"),
        "received_mpps": rate("received"),
    }
