"""`vhostpy load`: traffic or I/O for any vhost-user back-end, with our own front-end."""

import argparse
import re
import signal
import time
from typing import Any

from vhostpy.cli import AGAIN_S, Signalled
from vhostpy.cli.options import (
    Once,
    Parser,
    bad,
    cpu_list,
    rate_per_s,
    seconds,
    size_bytes,
    socket_path,
    whole,
)

EXAMPLE = """
packets between two ports of a switch, as fast as they go; then the same for a program
  vhostpy load /tmp/vu0 /tmp/vu1
  vhostpy load /tmp/vu0 /tmp/vu1 --size imix --macs 1000 --seconds 10 --json
every byte checked; then the latency of one frame at a time, woken from sleep
  vhostpy load /tmp/vu0 /tmp/vu1 --size 1500 --verify
  vhostpy load /tmp/vu0 /tmp/vu1 --latency --in-flight 1 --rate 1K
a disk; then one whose contents may be overwritten
  vhostpy load /tmp/vb0 --depth 64
  vhostpy load /tmp/vb0 --pattern mix --block-size 128K --depth 16 --verify
"""

DESCRIPTION = """\
Traffic for any vhost-user-net back-end, I/O for any vhost-user-blk back-end: we are the
front-end and the driver. Two sockets send to each other, then the next two, and so on.
"""

# What the generator does with its memory decides what can be seen of a device: one that
# finds its lines as it left them looks faster than it is. (touch, ids, rx headers)
UNKIND = {
    0: ("none", "fifo", "clean"),
    1: ("header", "fifo", "clean"),
    2: ("header", "lifo", "dirty"),
    3: ("frame", "lifo", "dirty"),
}
DEFAULT_UNKIND = 2
PATTERNS = ("randread", "randwrite", "read", "write", "mix")
FRAME_RANGE = (60, 65557)  # an Ethernet header, two VLAN tags, an IP packet of 65,535 bytes

# Flags that mean something for one type only; their defaults are filled in by _plan_*.
NET_FLAGS = (
    "size", "macs", "rate", "unkind", "touch", "ids", "rx_headers", "in_flight", "senders",
    "broadcast", "buffer", "no_mergeable",
)  # fmt: skip
BLK_FLAGS = ("pattern", "block_size", "depth", "span", "read_share", "indirect")


def main(arguments: list[str], program: str) -> int:
    """Runs the load and shows what came of it; returns the exit status."""
    parser = _parser(program)
    options = parser.parse_args(arguments)
    from vhostpy.load.target import kind_of

    kind = options.type or kind_of(options.sockets[0])
    _check_flags(parser, options, kind)
    from vhostpy.load import report

    signals = _heed_signals()
    progress = report.Progress(False if options.json else None)
    if kind == "net":
        from vhostpy.load import net

        result = net.run(_net_plan(parser, options), progress)
    else:
        from vhostpy.load import blk

        result = blk.run(_blk_plan(parser, options), progress)
    if options.json:
        from vhostpy.cli.target import print_json

        print_json(result)
    else:
        _show(result)
    if report.wrong(result):
        return 1
    if signals:
        raise Signalled(signals[0])
    return 0


def _heed_signals() -> list[int]:
    """Has those that end us do so as Ctrl-C does: with the figures so far. Which have come."""
    seen: list[int] = []
    last_s = -AGAIN_S

    def end(number: int, _: Any) -> None:
        nonlocal last_s
        if time.monotonic() - last_s < AGAIN_S:
            return
        last_s = time.monotonic()
        seen.append(number)
        raise Signalled(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
    return seen


def _parser(program: str) -> Parser:
    parser = Parser(program, DESCRIPTION, EXAMPLE)
    parser.add_argument("sockets", nargs="+", metavar="SOCKET", type=socket_path)
    parser.add_argument(
        "--type", choices=("net", "blk"), action=Once,
        help="default: as the back-end's features say",
    )  # fmt: skip
    parser.add_argument("--seconds", type=seconds, default=5.0, action=Once,
                        help="measured time (default: 5)")  # fmt: skip
    parser.add_argument("--warmup", metavar="SECONDS", type=seconds, default=0.5, action=Once,
                        help="load before that (default: 0.5)")  # fmt: skip
    parser.add_argument("--queues", metavar="N", type=whole(1, 128), default=1, action=Once,
                        help="queue pairs, or a disk's queues (default: 1)")  # fmt: skip
    parser.add_argument("--queue-size", metavar="N", type=_queue_size, default=1024, action=Once,
                        help="descriptors of a queue (default: 1024)")  # fmt: skip
    parser.add_argument("--layout", choices=("split", "packed"), default="split", action=Once)
    parser.add_argument("--in-order", action="store_true", help="negotiate IN_ORDER")
    parser.add_argument("--event-idx", action="store_true", help="negotiate EVENT_IDX")
    parser.add_argument("--verify", action="store_true",
                        help="check content, order and count; on a disk this writes")  # fmt: skip
    parser.add_argument("--cpu", metavar="N", type=_cpu, action=Once,
                        help="processor to pin the generator to")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same data as JSON")
    _net_flags(parser.add_argument_group("packets"))
    _blk_flags(parser.add_argument_group("disks"))
    return parser


def _net_flags(group: Any) -> None:
    group.add_argument("--size", metavar="BYTES", type=_sizes, action=Once,
                       help="frames without checksum: 64, a list such as 64,1500, or imix "
                       "(default: 64)")  # fmt: skip
    group.add_argument("--macs", metavar="N", type=whole(1, 65536), action=Once,
                       help="pairs of MAC addresses, used in turn (default: 1)")  # fmt: skip
    group.add_argument("--rate", metavar="PPS", type=rate_per_s, action=Once,
                       help="packets a second of all ports together, e.g. 1M "
                       "(default: as fast as possible)")  # fmt: skip
    group.add_argument("--latency", action="store_true",
                       help="time one frame of each burst")  # fmt: skip
    group.add_argument("--in-flight", metavar="N", type=whole(1, 65536), action=Once,
                       help="wait for answers: at most N frames under way each way")  # fmt: skip
    group.add_argument("--unkind", metavar="0..3", type=whole(0, 3), action=Once,
                       help="how much the device is spared: 0 frames never touched; 1 headers "
                       "written and read; 2 also ids LIFO and rx headers dirty (default); "
                       "3 also all of the frame written and read")  # fmt: skip
    group.add_argument("--touch", choices=("none", "header", "frame"), action=Once)
    group.add_argument("--ids", choices=("fifo", "lifo"), action=Once)
    group.add_argument("--rx-headers", choices=("clean", "dirty"), action=Once)
    group.add_argument("--senders", metavar="N", type=whole(1, 65536), action=Once,
                       help="only the first N sockets send (default: all)")  # fmt: skip
    group.add_argument("--broadcast", action="store_true", help="send to all other ports")
    group.add_argument("--buffer", metavar="BYTES", type=size_bytes, action=Once,
                       help="size of a buffer (default: 2K)")  # fmt: skip
    group.add_argument("--no-mergeable", action="store_true", help="without MRG_RXBUF")


def _blk_flags(group: Any) -> None:
    group.add_argument("--pattern", choices=PATTERNS, action=Once,
                       help="default: randread; all but the reads overwrite the disk")  # fmt: skip
    group.add_argument("--block-size", metavar="SIZE", type=size_bytes, action=Once,
                       help="bytes of a request (default: 4K)")  # fmt: skip
    group.add_argument("--depth", metavar="N", type=whole(1, 32768), action=Once,
                       help="requests under way in each queue (default: 32)")  # fmt: skip
    group.add_argument("--span", metavar="SIZE", type=size_bytes, action=Once,
                       help="use only the disk's beginning")  # fmt: skip
    group.add_argument("--read-share", metavar="PERCENT", type=whole(0, 100), action=Once,
                       help="reads in a mix (default: 70)")  # fmt: skip
    group.add_argument("--indirect", action="store_true", help="indirect descriptor tables")


def _check_flags(parser: Parser, options: argparse.Namespace, kind: str) -> None:
    others, other = (BLK_FLAGS, "disks") if kind == "net" else ((*NET_FLAGS, "latency"), "packets")
    for name in others:
        if getattr(options, name):
            what = "a net device" if kind == "net" else "a disk"
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is for {other}, and {options.sockets[0]} is {what}\n"
                         f"leave {flag} out")  # fmt: skip
    if kind == "blk" and len(options.sockets) > 1:
        parser.error("a disk has one socket\nstart a load for each")
    if len(set(options.sockets)) < len(options.sockets):
        parser.error("a socket is given twice\neach serves one front-end")


def _net_plan(parser: Parser, options: argparse.Namespace) -> Any:
    from vhostpy.load.net import IMIX, NetPlan
    from vhostpy.load.net_loop import Touch

    unkind = DEFAULT_UNKIND if options.unkind is None else options.unkind
    touch, ids, rx_headers = UNKIND[unkind]
    if options.verify:
        touch = "frame"
    elif (options.latency or options.in_flight) and touch == "none":
        parser.error("latency needs frames that are looked at\n--unkind 1 or more")
    if (options.senders or 0) > len(options.sockets):
        parser.error(f"{options.senders} senders of {len(options.sockets)} sockets")
    return NetPlan(
        tuple(options.sockets),
        sizes=IMIX if options.size == "imix" else options.size or (64,),
        seconds=options.seconds,
        warmup_s=options.warmup,
        queues=options.queues,
        queue_size=options.queue_size,
        layout=options.layout,
        touch=Touch[(options.touch or touch).upper()],
        fifo=(options.ids or ids) == "fifo",
        dirty=(options.rx_headers or rx_headers) == "dirty",
        in_order=options.in_order,
        event_idx=options.event_idx,
        mergeable=not options.no_mergeable,
        verify=options.verify,
        latency=options.latency,
        window=options.in_flight or 0,
        rate_pps=options.rate or 0.0,
        macs=options.macs or 1,
        senders=options.senders or 0,
        broadcast=options.broadcast,
        buffer_bytes=options.buffer or 2048,
        cpu=options.cpu,
    )


def _blk_plan(parser: Parser, options: argparse.Namespace) -> Any:
    from vhostpy.load.blk import BlkPlan

    return BlkPlan(
        options.sockets[0],
        pattern=options.pattern or "randread",
        block_bytes=options.block_size or 4096,
        depth=options.depth or 32,
        queues=options.queues,
        queue_size=options.queue_size,
        layout=options.layout,
        in_order=options.in_order,
        event_idx=options.event_idx,
        indirect=options.indirect,
        seconds=options.seconds,
        warmup_s=options.warmup,
        span_bytes=options.span,
        read_share=(70 if options.read_share is None else options.read_share) / 100,
        verify=options.verify,
        cpu=options.cpu,
    )


def _show(result: dict[str, Any]) -> None:
    from vhostpy.cli.target import cell, show, table
    from vhostpy.load import report

    if result["kind"] == "net":
        ports = table("port", "sent Mpps", "received Mpps", numbers=("sent Mpps", "received Mpps"))
        for port in result["ports"]:
            if port["sent_mpps"] or port["received_mpps"] or len(result["ports"]) < 10:
                cells = f"{port['sent_mpps']:.3f}", f"{port['received_mpps']:.3f}"
                ports.add_row(cell(port["socket"]), *cells)
        show(ports)
    lines = table("", "")
    lines.show_header = False
    for name, text in report.lines(result):
        lines.add_row(name, text)
    show(lines)


# Values ------------------------------------------------------------------------------


def _sizes(text: str) -> tuple[int, ...] | str:
    if text == "imix":
        return text
    low, high = FRAME_RANGE
    try:
        sizes = tuple(map(size_bytes, text.split(","))) if len(text) < 10_000 else ()
    except argparse.ArgumentTypeError:
        sizes = ()
    if not sizes or not all(low <= size <= high for size in sizes):
        raise bad(
            f"{text!r} is not a size of frames",
            f"{low} to {high} bytes, e.g. 64 or 64,1500, or imix",
        )
    return sizes


def _queue_size(text: str) -> int:
    size = int(text) if re.fullmatch(r"\d{1,5}", text) else 0
    if not 2 <= size <= 32768 or size & (size - 1):
        raise bad(f"a queue of {text} descriptors", "a power of two from 2 to 32768")
    return size


def _cpu(text: str) -> int:
    cpus = cpu_list(text)
    if len(cpus) != 1:
        raise bad(f"{text}: the generator is one thread", "name one processor")
    return cpus[0]
