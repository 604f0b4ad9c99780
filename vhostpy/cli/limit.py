"""`vhostpy limit`: shows or changes what a running disk may do in a second."""

from typing import Any

from vhostpy.cli.options import Once, Parser, add_limit_flags, add_target_flags, format_size
from vhostpy.cli.target import ask, cell, print_json, show, table

EXAMPLE = """
a disk gets 5000 requests and 100 MiB a second; then only the latter; then as it is
  vhostpy limit vb0 --iops 5000 --bandwidth 100M
  vhostpy limit vb0 --iops none
  vhostpy limit vb0
"""


def main(arguments: list[str], program: str) -> int:
    """Changes what is given, and shows the limits; returns the exit status."""
    parser = Parser(program, "I/O limits of a running disk.", EXAMPLE)
    add_target_flags(parser)
    parser.add_argument("--port", metavar="P", action=Once, help="this disk, where there are many")
    add_limit_flags(parser)
    options = parser.parse_args(arguments)
    given = {"iops": options.iops, "bandwidth": options.bandwidth, "burst_us": options.burst}
    wanted = {name: str(value) for name, value in given.items() if value is not None}
    limits = ask(options, "limit", kind="blk", port=options.port, **wanted)
    if options.json:
        print_json(limits)
    else:
        show(_table(limits))
    return 0


def _table(limits: dict[str, Any]) -> Any:
    requests, size = limits["requests_per_s"], limits["bytes_per_s"]
    rows = table("disk", "requests a second", "bytes a second", "burst")
    rows.add_row(
        cell(limits["port"]),
        "no limit" if requests is None else str(requests),
        "no limit" if size is None else format_size(size),
        f"{limits['burst_s'] * 1000:g} ms",
    )
    return rows
