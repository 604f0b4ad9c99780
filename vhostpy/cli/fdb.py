"""`vhostpy fdb`: shows or flushes the forwarding table of a running switch."""

from typing import Any

from vhostpy.cli.options import Once, Parser, add_target_flags
from vhostpy.cli.target import ask, cell, print_json, show, table

EXAMPLE = """
what the switch has learned; then have it forget one port's addresses
  vhostpy fdb show
  vhostpy fdb flush --port vu0
"""


def main(arguments: list[str], program: str) -> int:
    """Shows or flushes; returns the exit status."""
    parser = Parser(program, "The switch's forwarding table.", EXAMPLE)
    parser.add_argument("action", choices=("show", "flush"), metavar="show|flush")
    add_target_flags(parser)
    parser.add_argument("--port", metavar="P", action=Once, help="only this port's entries")
    options = parser.parse_args(arguments)
    if options.action == "flush":
        result = ask(options, "fdb_flush", kind="net", port=options.port)
        if options.json:
            print_json(result)
        else:
            show(f"{result['flushed']} entries flushed")
        return 0
    entries = ask(options, "fdb", kind="net", port=options.port)
    if options.json:
        print_json({"entries": entries})
    else:
        show(_table(entries))
    return 0


def _table(entries: list[dict[str, Any]]) -> Any:
    rows = table("vlan", "mac", "port", "age", numbers=("vlan", "age"))
    for entry in entries:
        rows.add_row(
            str(entry["vlan"]), cell(entry["mac"]), cell(entry["port"]), f"{entry['age_s']} s"
        )
    return rows if entries else "the table is empty"
