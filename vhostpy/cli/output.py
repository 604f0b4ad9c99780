"""Standard streams: closed, full and broken ones end no command in a traceback."""

import contextlib
import os
import sys

from vhostpy.errors import ConfigError


class OutputError(ConfigError):
    """Standard output takes no more. `broken`: its reader left, as in `vhostpy status | head`."""

    def __init__(self, error: OSError) -> None:
        reason = (error.strerror or str(error)).lower()
        super().__init__(f"cannot write to standard output: {reason}", "see where it leads")
        self.broken = isinstance(error, BrokenPipeError)


def prepare() -> None:
    """Gives streams that were closed when we started something to fail on.

    Otherwise the next file or socket would get such a number, and whatever is printed.
    """
    for number, way in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, way)  # gets the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a test's own stream
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def write(text: str) -> None:
    """Writes to standard output, at once. Raises OutputError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _drop(1)
        raise OutputError(error) from None


def talk(text: str) -> None:
    """Writes to standard error, as well as it can."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _drop(2)


def _drop(number: int) -> None:
    """Lets what a stream still holds vanish: the interpreter would fail on it once more."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, number)
    os.close(null)
