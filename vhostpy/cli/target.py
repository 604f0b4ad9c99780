"""For verbs that talk to a running process: which one, and how the answer is shown."""

import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vhostpy.cli import answers, output
from vhostpy.errors import ConfigError, VhostpyError
from vhostpy.site import control
from vhostpy.system.lines import printable

if TYPE_CHECKING:
    from rich.table import Table


# A process that hangs must not hold up what is asked of the others.
LIST_TIMEOUT_S = 2.0
KINDS = {"net": ("switch", "switches"), "blk": ("disk", "disks")}


def ask(
    options: argparse.Namespace, verb: str, *, kind: str | None = None, **arguments: Any
) -> Any:
    """The answer of the process that `options` means to the request `verb`.

    `kind`: only a process of this kind can be meant.
    """
    return ask_at(_target(options, verb, kind), verb, **arguments)


def ask_at(path: Path, verb: str, timeout_s: float = control.CLIENT_S, **arguments: Any) -> Any:
    """The same of the process at `path`. Raises ControlError for what cannot be shown."""
    with control.Client(path, timeout_s) as client:
        return answers.check(path, verb, client.ask(verb, **arguments))


def _target(options: argparse.Namespace, verb: str, kind: str | None) -> Path:
    """The one that has the name, the port and the kind. Raises ConfigError for none and many."""
    named, running = _named(options)
    if kind is None and len(running) == 1 and (named or options.name is None):
        return next(iter(running.values()))
    known = _known(running)
    if options.name is not None and not named:
        known = {name: facts for name, facts in known.items() if _has_port(facts, options.name)}
        if not known:
            raise _nobody_called(options.name, running)
    fits = {name: facts for name, facts in known.items() if kind in (None, facts["kind"])}
    port = getattr(options, "port", None)
    if len(fits) > 1 and port is not None:
        fits = {name: f for name, f in fits.items() if _has_port(f, port)} or fits
    if not fits:
        assert kind is not None
        raise _wrong_kind(verb.partition("_")[0], kind, known)
    if len(fits) > 1:
        what = "processes" if kind is None else KINDS[kind][1]
        raise ConfigError(f"{len(fits)} {what} run", f"name one: {', '.join(fits)}")
    return running[next(iter(fits))]


def _named(options: argparse.Namespace) -> tuple[bool, dict[str, Path]]:
    """Whether NAME or --control says which; that one, or all that run."""
    if options.control is not None:
        return True, {options.control: Path(options.control)}
    running = control.running()
    if options.name in running:
        return True, {options.name: running[options.name]}
    if not running:
        if options.name is not None:
            raise _nobody_called(options.name, running)
        raise ConfigError("no vhostpy process runs", "start one; vhostpy --help has an example")
    return False, running


def _known(running: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What each says of itself. Raises what is wrong where none of them answers."""
    known: dict[str, dict[str, Any]] = {}
    failure: VhostpyError | None = None
    for name, path in running.items():
        try:
            known[name] = ask_at(path, "status", LIST_TIMEOUT_S)
        except VhostpyError as error:
            failure = error
    if not known and failure is not None:
        raise failure
    return known


def _has_port(facts: dict[str, Any], port: str) -> bool:
    return any(port in (socket["name"], socket["socket"]) for socket in facts["sockets"])


def _nobody_called(name: str, running: dict[str, Path]) -> ConfigError:
    hint = f"running: {', '.join(running)}" if running else "nothing runs; see vhostpy --help"
    return ConfigError(f"no process, port or disk is called {name!r}", hint)


def _wrong_kind(verb: str, kind: str, known: dict[str, dict[str, Any]]) -> ConfigError:
    wanted = KINDS[kind]
    if len(known) == 1:
        ((name, facts),) = known.items()
        found = KINDS.get(facts["kind"], ("process",))[0]
        text = f"{name} is a {found}, and {verb!r} is for {wanted[1]}"
    else:
        text = f"no {wanted[0]} runs, and {verb!r} is for {wanted[1]}"
    hint = f"'vhostpy status' lists what runs; 'vhostpy {kind}' makes a {wanted[0]}"
    return ConfigError(text, hint)


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
    from rich.table import Table

    terminal = sys.stdout.isatty()
    width = None if terminal else int(os.environ.get("COLUMNS", 160))
    # Not to standard output itself, whose errors rich would treat in its own way.
    shown = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding, "backslashreplace")
    console = Console(
        file=shown, force_terminal=terminal, width=width,
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip
    for item in tables:
        item = cell(item) if isinstance(item, str) else item
        needed = console.measure(item, options=console.options.update(max_width=10_000)).minimum
        console.print(_tall(item) if isinstance(item, Table) and needed > console.width else item)
    shown.seek(0)
    output.write(shown.read())


def _tall(wide: Any) -> "Table":
    """A table as one block a row, a line for each column: words stay whole so."""
    lines = table("", "", title=wide.title)
    lines.show_header = False
    for cells in zip(*(column.cells for column in wide.columns), strict=True):
        for column, value in zip(wide.columns, cells, strict=True):
            lines.add_row(str(column.header), value)
        lines.add_section()
    return lines


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
