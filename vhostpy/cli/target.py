"""For verbs that talk to a running process: which one, and how the answer is shown."""

import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vhostpy import control
from vhostpy.cli import output
from vhostpy.errors import ConfigError
from vhostpy.lines import printable

if TYPE_CHECKING:
    from rich.table import Table


def ask(options: argparse.Namespace, verb: str, **arguments: Any) -> Any:
    """The answer of the process that `options` means to the request `verb`."""
    with control.Client(_target(options)) as client:
        return client.ask(verb, **arguments)


def _target(options: argparse.Namespace) -> Path:
    if options.control is not None:
        return Path(options.control)
    running = control.running()
    if options.name is not None:
        if options.name in running:
            return running[options.name]
        hint = f"running: {', '.join(running)}" if running else "nothing runs; see vhostpy --help"
        raise ConfigError(f"no vhostpy process is called {options.name!r}", hint)
    if len(running) == 1:
        return next(iter(running.values()))
    if not running:
        raise ConfigError("no vhostpy process runs", "start one; vhostpy --help has an example")
    raise ConfigError(f"{len(running)} processes run", f"name one: {', '.join(running)}")


def print_json(data: Any) -> None:
    """Data for programs, on standard output."""
    output.write(json.dumps(data, indent=2) + "\n")


def table(*columns: str, title: str | None = None, numbers: tuple[str, ...] = ()) -> "Table":
    """An empty table; the columns in `numbers` align to the right."""
    from rich import box
    from rich.table import Table

    class Listing(Table):
        """Whatever is put into it is shown as it is, as `cell` does."""

        def add_row(self, *cells: Any, **settings: Any) -> None:
            super().add_row(*map(cell, cells), **settings)

    shown = None if title is None else cell(title)
    empty = Listing(title=shown, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in columns:
        side: Literal["left", "right"] = "right" if name in numbers else "left"
        empty.add_column(cell(name), justify=side, overflow="fold")
    return empty


def show(*tables: Any) -> None:
    """Prints tables and lines for people; not cut to 80 columns where nobody looks."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    width = None if terminal else int(os.environ.get("COLUMNS", 160))
    # Not to standard output itself, whose errors rich would treat in its own way.
    shown = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding, "backslashreplace")
    console = Console(
        file=shown, force_terminal=terminal, width=width,
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip
    for item in tables:
        console.print(cell(item) if isinstance(item, str) else item)
    shown.seek(0)
    output.write(shown.read())


def cell(text: Any) -> Any:
    """Table text that is taken as it is: brackets are no markup, control characters no control."""
    from rich.text import Text

    return Text(printable(text))


def duration(seconds: float) -> str:
    """'1d 2h', '3m 4s', '5s'."""
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size}{unit}")
            left %= size
    return " ".join(parts[:2])


def percent(share: Any) -> str:
    """0.123 -> '12.3 %'."""
    return f"{share * 100:.1f} %" if isinstance(share, int | float) else "-"
