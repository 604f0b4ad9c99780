"""Lines for people, in the log and on a terminal: who is talked about has no say in them.

Names of files, texts of servers, whatever others made up is shown in one line of printable
characters. Line breaks are ours: those of a record's own text, of a traceback, and the one
before an error's hint.

A budget for each socket and kind of line keeps a log from being filled; what was left out is
counted, and told.
"""

import logging
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from vhostpy.errors import VhostpyError

# So many lines of a kind at once, then one in so long.
BURST = 10
REFILL_S = 60.0
# Kinds that are remembered; a record's first argument may be anybody's.
KINDS_MAX = 4096


def printable(text: object) -> str:
    """Text as it is, without what could steer a terminal or begin a line."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def _told(value: Any) -> Any:
    """A record's argument, harmless."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, VhostpyError):
        text = printable(value.args[0])
        return f"{text}\n  next: {printable(value.hint)}" if value.hint else text
    return printable(value)


class Lines(logging.Formatter):
    """'vhostpy net: vu0: …' for talk, 'vhostpy net: warning: …' for what needs a look."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        first, *rest = self._message(record).split("\n")
        if more := getattr(record, "left_out", 0):
            first += f" … {more:,} more like this"
        if record.exc_info and record.exc_info[1] is not None:
            rest += _exception(record.exc_info[1])
        return "\n".join([f"{self._program}: {level}{first}", *rest])

    @staticmethod
    def _message(record: logging.LogRecord) -> str:
        # What was put together elsewhere, as asyncio's is, has its line breaks and no more.
        text = "\n".join(map(printable, str(record.msg).split("\n")))
        if isinstance(record.args, dict):
            return text % {key: _told(value) for key, value in record.args.items()}
        return text % tuple(map(_told, record.args)) if record.args else text


def _exception(error: BaseException) -> Iterator[str]:
    """As Python shows it; but an exception's text is one line."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _exception(before)
        yield "which led to:"
    yield "Traceback (most recent call last):"
    for frame in traceback.format_tb(error.__traceback__):
        yield from frame.rstrip("\n").split("\n")
    for text in traceback.format_exception_only(error):
        yield printable(text.removesuffix("\n"))
    for part in getattr(error, "exceptions", ()):
        yield from _exception(part)


@dataclass(slots=True)
class _Kind:
    """What one socket may still say of one kind."""

    tokens: float
    at_s: float
    left_out: int = 0
    last: logging.LogRecord | None = None  # of those that were left out

    def refill(self, now: float) -> None:
        self.tokens = min(BURST, self.tokens + (now - self.at_s) / REFILL_S)
        self.at_s = now


class Budget:
    """Lets lines through while their socket has not said too much of their kind.

    A kind is a record's own text; its first argument names the socket.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._lock = threading.Lock()  # storages talk from threads of their own

    def take(self, record: logging.LogRecord, now: float) -> bool:
        """Whether the record may be said. It then tells how many before were not."""
        socket = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        ours = record.name == "vhostpy"
        key = socket, str(record.msg) if ours else record.name
        with self._lock:
            if key not in self._kinds and len(self._kinds) >= KINDS_MAX:
                key = "", ""
            kind = self._kinds.setdefault(key, _Kind(BURST, now))
            kind.refill(now)
            if kind.tokens < 1:
                kind.left_out += 1
                kind.last = record
                return False
            kind.tokens -= 1
            record.left_out, kind.left_out, kind.last = kind.left_out, 0, None
            return True

    def due(self, now: float, all_of_them: bool = False) -> list[logging.LogRecord]:
        """The last of each kind that was left out, where one may be said again."""
        records = []
        with self._lock:
            for key, kind in list(self._kinds.items()):
                kind.refill(now)
                if kind.last is not None and (kind.tokens >= 1 or all_of_them):
                    kind.tokens -= 1
                    kind.last.left_out = kind.left_out - 1
                    records.append(kind.last)
                    kind.left_out, kind.last = 0, None
                elif kind.tokens >= BURST:
                    del self._kinds[key]
        return records


class Talk(logging.StreamHandler[TextIO]):
    """Says it all on one stream, within its budget."""

    def __init__(self, stream: TextIO, program: str) -> None:
        super().__init__(stream)
        self.setFormatter(Lines(program))
        self._budget = Budget()

    def filter(self, record: logging.LogRecord) -> bool:
        return self._budget.take(record, time.monotonic()) and bool(super().filter(record))

    def tell_left_out(self, all_of_them: bool = False) -> None:
        """Says how many lines were left out, of kinds that may be said again."""
        for record in self._budget.due(time.monotonic(), all_of_them):
            self.acquire()
            try:
                self.emit(record)
            finally:
                self.release()

    def close(self) -> None:
        self.tell_left_out(all_of_them=True)
        super().close()
