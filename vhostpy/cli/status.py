"""`vhostpy status`: what runs; of each socket, where the handshake stands and what it waits for."""

from pathlib import Path
from typing import Any

from vhostpy.cli.options import Parser, add_target_flags
from vhostpy.cli.target import (
    LIST_TIMEOUT_S,
    ask,
    ask_at,
    cell,
    duration,
    percent,
    print_json,
    show,
    table,
)
from vhostpy.errors import VhostpyError
from vhostpy.site import control

EXAMPLE = """
what runs; then one process, socket by socket
  vhostpy status
  vhostpy status vu0
  vhostpy status vu0 --json
"""


def main(arguments: list[str], program: str) -> int:
    """Lists all processes, or shows one; returns the exit status."""
    parser = Parser(program, "Shows what runs and what it waits for.", EXAMPLE)
    add_target_flags(parser)
    options = parser.parse_args(arguments)
    if options.name is None and options.control is None:
        return _list(options.json)
    status = ask(options, "status")
    if options.json:
        print_json(status)
    else:
        _show_process(status)
    return 0


def _list(as_json: bool) -> int:
    rows = [_summary(name, path) for name, path in control.running().items()]
    if as_json:
        print_json({"processes": rows})
    elif not rows:
        show("no vhostpy process runs; 'vhostpy --help' has an example")
    else:
        listing = table(
            "name", "kind", "pid", "up", "sockets", "connected", "busy", "waits for",
            numbers=("pid", "up", "sockets", "connected", "busy"),
        )  # fmt: skip
        for row in rows:
            listing.add_row(*_summary_cells(row))
        show(listing)
    return 0


def _summary(name: str, path: Path) -> dict[str, Any]:
    """One process in the list, for people and for programs."""
    try:
        status = ask_at(path, "status", LIST_TIMEOUT_S)
    except VhostpyError as error:
        return {"name": name, "control": str(path), "error": str(error.args[0])}
    sockets = status["sockets"]
    return {
        # As the other commands take it: with a process number if the plain name was taken.
        "name": name,
        "control": str(path),
        "kind": status["kind"],
        "pid": status["pid"],
        "uptime_s": status["uptime_s"],
        "sockets": len(sockets),
        "connected": sum(bool(socket["connected"]) for socket in sockets),
        "busy_share": max((worker["busy_share"] for worker in status["workers"]), default=0.0),
        "waits_for": sorted({s["waits_for"] for s in sockets if s.get("waits_for")}),
    }


def _summary_cells(row: dict[str, Any]) -> list[Any]:
    if "error" in row:
        return [cell(row["name"]), *["-"] * 6, cell(row["error"])]
    return [
        cell(row["name"]),
        cell(row["kind"]),
        str(row["pid"]),
        duration(row["uptime_s"]),
        str(row["sockets"]),
        str(row["connected"]),
        percent(row["busy_share"]),
        cell("; ".join(row["waits_for"]) or "nothing"),
    ]


def _show_process(status: dict[str, Any]) -> None:
    show(
        cell(
            f"{status['name']}: vhostpy {status['kind']} {status['version']}, "
            f"process {status['pid']}, up {duration(status['uptime_s'])}, "
            f"{status['memory_bytes'] / 1e6:.0f} MB"
        ),
        _sockets(status["sockets"]),
        _devices(status["sockets"]),
        _accounts(status["sockets"]),
        _workers(status["workers"]),
    )
    if "switch" in status:
        show(_facts("switch", status["switch"]))


def _sockets(sockets: list[dict[str, Any]]) -> Any:
    rows = table(
        "name", "socket", "handshake", "waits for", "rings", "sessions", numbers=("sessions",)
    )
    for socket in sockets:
        rows.add_row(
            cell(socket["name"]),
            cell(socket["socket"]),
            cell(socket["handshake"]),
            cell(socket["waits_for"] or "nothing"),
            cell(_rings(socket.get("rings", []))),
            str(socket["sessions"]),
        )
    return rows


def _rings(rings: list[dict[str, Any]]) -> str:
    """'4 started, 2 enabled'."""
    if not rings:
        return "none"
    started = [ring for ring in rings if ring["state"] == "started"]
    return f"{len(started)} started, {sum(ring['enabled'] for ring in started)} enabled"


def _devices(sockets: list[dict[str, Any]]) -> Any:
    """The plain facts of every device; its counters are `stats`'s."""
    names = list(
        dict.fromkeys(
            name
            for socket in sockets
            for name, value in socket["device"].items()
            if _plain(value) and name not in ("name", "kind")
        )
    )
    rows = table("device", *(name.replace("_", " ") for name in names))
    for socket in sockets:
        values = (socket["device"].get(name) for name in names)
        rows.add_row(cell(socket["name"]), *(cell(_fact(value)) for value in values))
    return rows


def _accounts(sockets: list[dict[str, Any]]) -> Any:
    """What of each socket's share of the process is used."""
    rows = table(
        "share used", "fds", "mappings", "addresses", "closing",
        numbers=("fds", "mappings", "addresses", "closing"),
    )  # fmt: skip
    for socket in sockets:
        account = socket.get("account")
        if account is None:  # a process of an earlier version
            continue
        mapped, share = (account[f"mapped_bytes{end}"] / (1 << 30) for end in ("", "_share"))
        rows.add_row(
            cell(socket["name"]),
            f"{account['fds']} of {account['fds_share']}",
            f"{account['mappings']} of {account['mappings_share']}",
            f"{mapped:.1f} of {share:.0f} GiB",
            str(account["closing"]),
        )
    return rows


def _workers(workers: list[dict[str, Any]]) -> Any:
    rows = table("worker", "busy", "turns", "sleeps", numbers=("worker", "busy", "turns", "sleeps"))
    for worker in workers:
        rows.add_row(
            str(worker["index"]),
            percent(worker["busy_share"]),
            str(worker["turns"]),
            str(worker["sleeps"]),
        )
    return rows


def _facts(title: str, facts: dict[str, Any]) -> Any:
    rows = table(title, "", numbers=("",))
    for name, value in facts.items():
        if _plain(value) and name != "name":
            rows.add_row(name.replace("_", " "), cell(_fact(value)))
    return rows


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
