"""Packets through any vhost-user-net back-end: handshake, memory, phases, figures.

The loop itself is `_net`; this is what happens before, around and after it.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vhostpy._ring import DriverVirtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.errors import ConfigError, ProtocolError, VhostpyError
from vhostpy.frontend import FrontEnd, Queue
from vhostpy.load import report
from vhostpy.load._net import FRAME_MAX, FRAME_MIN, NetGenerator, Phase, Touch
from vhostpy.load.report import Sample, sample
from vhostpy.load.target import asked, connect, first_line, hung_up, memory_layout

# The Internet mix: 7 : 4 : 1 of what is 64, 570 and 1518 bytes with its checksum.
IMIX = (60, 566, 60, 566, 60, 60, 1514, 60, 566, 60, 566, 60)
HEADER = 12  # the virtio-net header of VERSION_1
GAP = 256  # from a buffer's end to the next: at a stride of 2048 they would share cache sets
TEACH_S = 10.0
DRAIN_S = 0.1
FULL_SHARE = 0.9  # of all bursts: from here on the generator is the limit
PROTOCOL_FEATURES = 1 << ProtocolFeature.MQ | 1 << ProtocolFeature.REPLY_ACK


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


@dataclass(slots=True)
class _Ends:
    """The started generator and what it stands on."""

    front_ends: list[FrontEnd] = field(default_factory=list)
    generator: Any = None
    hugepages: bool = True


def run(plan: NetPlan, progress: "report.Progress | None" = None) -> dict[str, Any]:
    """Runs the plan; returns its figures. Raises ConfigError, ProtocolError."""
    _check(plan)
    with ExitStack() as stack:
        ends = _open(plan, stack)
        generator = ends.generator
        failure: list[BaseException] = []
        thread = threading.Thread(target=_loop, args=(generator, plan.cpu, failure), name="load")
        thread.start()
        try:
            return _phases(plan, ends, thread, progress or report.Progress())
        finally:
            generator.stop()
            thread.join()
            if failure:
                raise failure[0]


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


def _loop(generator: Any, cpu: int | None, failure: list[BaseException]) -> None:
    try:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        generator.run()
    except BaseException as error:
        failure.append(error)


# Handshake -----------------------------------------------------------------------------


def _open(plan: NetPlan, stack: ExitStack) -> _Ends:
    ends = _Ends()
    pairs = []
    for port, path in enumerate(plan.sockets):
        front_end = stack.enter_context(connect(path))
        ends.front_ends.append(front_end)
        try:
            queues = _start(plan, front_end, path)
        except (OSError, ProtocolError) as error:
            if isinstance(error, TimeoutError):
                error = ConfigError("no answer in time")  # type: ignore[assignment]
            raise ConfigError(
                f"{path}: the handshake failed: {first_line(error)}", getattr(error, "hint", "")
            ) from error
        ends.hugepages &= front_end.shared.page_bytes > 4096
        if plan.active(port):
            sends = port < plan.sending
            pairs += [(*queue, port, plan.peer(port), sends) for queue in queues]
        else:
            stack.callback(lambda kept: None, queues)
    ends.generator = NetGenerator(
        pairs,
        sizes=plan.sizes,
        touch=plan.touch,
        fifo=plan.fifo,
        dirty=plan.dirty and plan.touch != Touch.NONE,
        verify=plan.verify,
        stamps=plan.latency,
        broadcast=plan.broadcast,
        mergeable=plan.mergeable,
        room=plan.buffer_bytes,
        stride=plan.buffer_bytes + GAP,
        macs=plan.macs,
        window=plan.window,
        rate_pps=plan.rate_pps,
        ports=len(plan.sockets),
    )
    return ends


def _start(plan: NetPlan, front_end: FrontEnd, path: str) -> list[tuple[Queue, Queue, int, int]]:
    """Starts a socket's queues: (rx, tx, rx buffers' GPA, tx buffers' GPA) of each pair."""
    offered, _ = asked(front_end, path)
    wanted = _wanted(plan)
    for bit, flag in ((Feature.RING_PACKED, "--layout split"), (Feature.IN_ORDER, "no in-order")):
        if wanted >> bit & 1 and not offered >> bit & 1:
            raise ConfigError(f"{path}: the back-end does not offer {bit.name}", f"use {flag}")
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
    from vhostpy.protocol import FrontEndRequest

    most = 1
    if front_end.negotiated(ProtocolFeature.MQ):
        most = int(front_end.request(FrontEndRequest.GET_QUEUE_NUM).value)
    if plan.queues > most:
        raise ConfigError(
            f"{path}: the back-end serves {most} queue pairs", f"--queues {most} or less"
        )


# Phases --------------------------------------------------------------------------------


def _phases(
    plan: NetPlan, ends: _Ends, thread: threading.Thread, progress: "report.Progress"
) -> dict[str, Any]:
    generator = ends.generator

    def wait(seconds: float, done: Callable[[], bool] = lambda: False, step: float = 0.01) -> bool:
        """Until `done`, at most `seconds`; raises where the back-end or the loop has ended."""
        end = time.monotonic() + seconds
        while not done():
            _want_alive(plan, ends, thread)
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, step))
        return True

    # A learning switch has to know all addresses before the load starts.
    generator.enter(Phase.TEACH)
    wait(0.02)
    wait(TEACH_S, lambda: not generator.teaching)
    _settle(generator, thread, wait)
    start = sample(generator, thread)
    generator.enter(Phase.SEND)
    wait(plan.warmup_s)
    generator.forget_latencies()
    first = previous = sample(generator, thread)
    while (left := first.at_s + plan.seconds - time.monotonic()) > 0:
        wait(min(left, 1.0), step=1.0)
        now = sample(generator, thread)
        progress.show(partial(_line, previous, now, now.at_s - first.at_s))
        previous = now
    last = sample(generator, thread)
    latencies = generator.latencies() if plan.latency else None
    generator.enter(Phase.LISTEN)
    _settle(generator, thread, wait)
    end = sample(generator, thread)
    progress.done()
    return _result(plan, ends, first, last, start, end, latencies)


def _line(a: Sample, b: Sample, elapsed_s: float) -> str:
    return report.net_line(figures(a, b), elapsed_s)


def _settle(generator: Any, thread: threading.Thread, wait: Callable[..., bool]) -> None:
    """Until nothing arrives any more."""
    before = -1
    while (count := sample(generator, thread).total("received")) != before:
        before = count
        wait(DRAIN_S)


def _want_alive(plan: NetPlan, ends: _Ends, thread: threading.Thread) -> None:
    broken = ends.generator.broken_pair
    if broken is not None:
        port = ends.generator.counters()[broken]["port"]
        raise ProtocolError(
            f"{plan.sockets[port]}: the back-end gave back a chain that it does not have",
            "the back-end is at fault: its log, and vhostpy check, may tell more",
        )
    if not thread.is_alive():
        raise VhostpyError("the generator ended early")
    gone = hung_up(ends.front_ends)
    if gone is not None:
        raise ProtocolError(
            f"{plan.sockets[gone]}: the back-end closed the connection", "see what it says itself"
        )


def figures(a: Sample, b: Sample) -> dict[str, Any]:
    """Rates between two moments."""
    seconds = max(b.at_s - a.at_s, 1e-9)

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
        # Below 1 something else ran on its processor.
        "generator_cpu_share": (b.ran_s - a.ran_s) / seconds,
        "generator_busy_share": busy / max(b.ticks["total"] - a.ticks["total"], 1),
        # Of what bursts could have moved. Near 1 there was always more to do.
        "generator_full_share": packets / room if room else 0.0,
        # A packet is sent and received: both halves of its way together.
        "generator_cycles_per_packet": busy / sent if sent else None,
    }


def _result(
    plan: NetPlan,
    ends: _Ends,
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
        "hugepages": ends.hugepages,
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
    seconds = max(last.at_s - first.at_s, 1e-9)

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
