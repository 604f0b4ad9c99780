"""`vhostpy stats`: counters per port and queue, each drop's reason, what workers do."""

from collections.abc import Iterator
from typing import Any

from vhostpy.cli.options import Once, Parser, add_target_flags
from vhostpy.cli.target import ask, cell, percent, print_json, show, table

EXAMPLE = """
the counters of the process that runs; then of one port, for a program
  vhostpy stats
  vhostpy stats vu0 --port vu1 --json
"""

# Numbers of a queue that do not add up.
NO_COUNTERS = {"index", "worker"}


def main(arguments: list[str], program: str) -> int:
    """Shows the counters; returns the exit status."""
    parser = Parser(program, "Counters per port and queue, and of each worker.", EXAMPLE)
    add_target_flags(parser)
    parser.add_argument("--port", metavar="P", action=Once, help="only this port or disk")
    options = parser.parse_args(arguments)
    ports = ask(options, "stats", port=options.port)
    workers = ask(options, "workers")
    if options.json:
        print_json({"ports": ports, "workers": workers})
    else:
        items = "requests" if ports and ports[0]["kind"] == "blk" else "packets"
        parts = (part for port in ports for part in (_table(port), *_latency(port)))
        show(*parts, _workers(workers, items))
    return 0


def _workers(workers: list[dict[str, Any]], items: str) -> Any:
    """A row each: shares and ratios of the last second, then totals."""
    headings = (
        *("busy", f"{items} a poll", "cycles each"),
        *(items, "polls with work", "busy cycles", "idle cycles"),
    )
    rows = table("worker", "cpu", *headings, title="workers", numbers=("worker", *headings))
    for worker in workers:
        cpu = worker["cpu"]
        rows.add_row(
            str(worker["index"]),
            "any" if cpu is None else str(cpu),
            percent(worker["busy_share"]),
            _ratio(worker["items_per_poll"]),
            _ratio(worker["cycles_per_item"]),
            *(str(worker[name]) for name in ("items", "busy_polls", "busy_ticks", "idle_ticks")),
        )
    return rows


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _latency(port: dict[str, Any]) -> Iterator[Any]:
    """How long a disk's requests took, by operation; nothing where there were none."""
    if latency := port.get("latency"):
        times = ("p50_us", "p99_us", "p99_9_us", "max_us")
        headings = ("requests", "median us", "99 % us", "99.9 % us", "longest us")
        rows = table("latency", *headings, numbers=headings)
        for op, row in latency.items():
            rows.add_row(
                cell(op.replace("_", " ")), str(row["count"]), *(f"{row[t]:g}" for t in times)
            )
        yield rows


def _table(port: dict[str, Any]) -> Any:
    """Counters of a port: a row each, a column for each queue that ever did something."""
    queues = {f"queue {queue['index']}": dict(_counters(queue)) for queue in port["queues"]}
    totals: dict[str, int] = {}
    for counters in queues.values():
        for name, count in counters.items():
            totals[name] = totals.get(name, 0) + count
    columns = [(name, counters) for name, counters in queues.items() if any(counters.values())]
    title = f"{port['port']} ({port['socket']})"
    headings = ["total", *(name for name, _ in columns)] if len(columns) > 1 else ["total"]
    rows = table("counter", *headings, title=title, numbers=tuple(headings))
    for name in totals:
        # Reasons that never happened would hide the one that did.
        if totals[name] or "." not in name:
            cells = [totals[name], *(c.get(name, 0) for _, c in columns)][: len(headings)]
            rows.add_row(cell(name.replace(".", ": ")), *map(str, cells))
    return rows


def _counters(part: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Names and counts; what lies in a map below, such as drops, as 'drops.name'."""
    for name, value in part.items():
        if isinstance(value, dict):
            for below, count in value.items():
                if type(count) is int:
                    yield f"{name}.{below}", count
        elif type(value) is int and name not in NO_COUNTERS:
            yield name, value
