"""What a process must answer to be shown: who is of another version, or no vhostpy at all,
ends a command in one line."""

import math
from pathlib import Path
from typing import Any

from vhostpy.site.control import ControlError

DEPTH_MAX = 16  # of maps and lists in each other; ours have 5


class Either(tuple[Any, ...]):
    """One of these kinds."""


class Maybe:
    """Need not be there."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


# A type; a map of what must be in it; a list of such; {str: shape}: under any name.
ANY = object
NUMBER = Either((int, float))
NUMBER_OR_NONE = Either((int, float, type(None)))
COUNT_OR_NONE = Either((int, type(None)))
TEXT_OR_NONE = Either((str, type(None)))

WORKER = {"index": ANY, "busy_share": NUMBER, "turns": ANY, "sleeps": ANY}
ACCOUNT = {
    **dict.fromkeys(("fds", "fds_share", "mappings", "mappings_share", "closing"), ANY),
    **dict.fromkeys(("mapped_bytes", "mapped_bytes_share"), NUMBER),
}
SOCKET = {
    **dict.fromkeys(("name", "socket", "handshake", "connected", "sessions"), ANY),
    "waits_for": TEXT_OR_NONE,
    "device": dict,
    "rings": Maybe([{"state": ANY, "enabled": NUMBER}]),
    "account": Maybe(ACCOUNT),
}
LATENCY = {"count": ANY, **dict.fromkeys(("p50_us", "p99_us", "p99_9_us", "max_us"), NUMBER)}

SHAPES: dict[str, Any] = {
    "status": {
        **dict.fromkeys(("name", "version", "pid"), ANY),
        **dict.fromkeys(("uptime_s", "memory_bytes"), NUMBER),
        "kind": str,
        "sockets": [SOCKET],
        "workers": [WORKER],
        "switch": Maybe(dict),
    },
    "stats": [
        {
            **dict.fromkeys(("port", "kind", "socket"), ANY),
            "queues": [{"index": ANY}],
            "latency": Maybe({str: LATENCY}),
        }
    ],
    "workers": [
        {
            **dict.fromkeys(("index", "cpu", "busy_share", "items"), ANY),
            **dict.fromkeys(("busy_polls", "busy_ticks", "idle_ticks"), ANY),
            **dict.fromkeys(("items_per_poll", "cycles_per_item"), NUMBER_OR_NONE),
        }
    ],
    "fdb": [dict.fromkeys(("vlan", "mac", "port", "age_s"), ANY)],
    "fdb_flush": {"flushed": ANY},
    "limit": {
        **dict.fromkeys(("port", "requests_per_s"), ANY),
        "bytes_per_s": COUNT_OR_NONE,
        "burst_s": NUMBER,
    },
    "resize": {
        "port": str,
        **dict.fromkeys(("size_before_bytes", "size_bytes"), int),
        "guest_told": ANY,
    },
}


def check(path: Path, verb: str, answer: Any) -> Any:
    """The answer to `verb` of the process at `path`, which has what is shown of it.

    Raises ControlError where it has not.
    """
    wrong = _foreign(answer, "the answer", DEPTH_MAX) or _wrong(answer, SHAPES[verb], "the answer")
    if wrong:
        from vhostpy.cli import version

        raise ControlError(
            f"{path}: cannot understand the answer to {verb!r}: {wrong}",
            f"restart that process with this version, vhostpy {version()}",
        )
    return answer


def _foreign(value: Any, where: str, depth: int) -> str:
    """What JSON has no name for."""
    if depth == 0:
        return "too many maps and lists in each other"
    if isinstance(value, dict):
        for name, part in value.items():
            if not isinstance(name, str):
                return f"a name in {where} is {_kind(name)}, expected text"
            if wrong := _foreign(part, _at(where, name), depth - 1):
                return wrong
    elif isinstance(value, list):
        for index, part in enumerate(value):
            if wrong := _foreign(part, f"{where}[{index}]", depth - 1):
                return wrong
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{where} is {value}, expected a number"
    elif not isinstance(value, str | int | float | None):
        return f"{where} is {_kind(value)}"
    return ""


def _wrong(value: Any, shape: Any, where: str) -> str:
    """How the value differs from its shape; "" where it does not."""
    if isinstance(shape, type | Either):
        fits = isinstance(value, shape)
        return "" if fits else f"{where} is {_kind(value)}, expected {_kinds(shape)}"
    if not isinstance(value, type(shape)):
        return f"{where} is {_kind(value)}, expected {_kind(shape)}"
    if isinstance(shape, list):
        parts = ((part, shape[0], f"{where}[{index}]") for index, part in enumerate(value))
    elif str in shape:
        parts = ((part, shape[str], _at(where, name)) for name, part in value.items())
    else:
        missing = [n for n, s in shape.items() if n not in value and not isinstance(s, Maybe)]
        if missing:
            return f"{_at(where, missing[0])} is missing"
        parts = (
            (value[name], part.shape if isinstance(part, Maybe) else part, _at(where, name))
            for name, part in shape.items()
            if name in value
        )
    return next(filter(None, (_wrong(*part) for part in parts)), "")


def _at(where: str, name: str) -> str:
    return name if where == "the answer" else f"{where}.{name}"


def _kinds(shape: Any) -> str:
    return " or ".join(map(_name, shape if isinstance(shape, tuple) else (shape,)))


def _kind(value: Any) -> str:
    return _name(type(value))


def _name(kind: type) -> str:
    names = {dict: "a map", list: "a list", str: "text", int: "a whole number"}
    names |= {float: "a number", type(None): "nothing"}
    return names.get(kind, kind.__name__)
