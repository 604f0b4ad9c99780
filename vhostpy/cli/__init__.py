"""The commands: picks the verb and turns errors into one line and an exit status.

Each verb is a module of its own, imported only when it is asked for: what `status` needs
to draw a table must not cost `net` its start.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from vhostpy.errors import VhostpyError
from vhostpy.lines import printable

VERBS = {
    "net": "a learning switch; each vhost-user socket is a port",
    "blk": "a disk behind a vhost-user socket",
    "status": "what runs, where each handshake stands and what it waits for",
    "fdb": "shows or flushes the switch's forwarding table",
    "stats": "counters per port and queue, and the reason of each drop",
    "limit": "what a disk may do in a second, changed while it runs",
    "resize": "shows a guest that its disk has grown",
    "load": "packets or I/O for any vhost-user back-end",
}

USAGE = "usage: vhostpy [--version] VERB ..."

HELP = """
vhost-user back-ends for virtual machines: networking and disks.

verbs ("vhostpy VERB --help" tells more):
{verbs}

example: a switch with two ports, and what it is doing
  vhostpy net --socket /tmp/vu0 --socket /tmp/vu1
  vhostpy status
"""

DONE, FAILED, BAD_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The program `vhostpy`; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(_help(), file=sys.stderr)
        return BAD_USAGE
    verb, *rest = words
    if verb in ("-h", "--help", "help"):
        print(_help())
        return DONE
    if verb == "--version":
        print("vhostpy", version())
        return DONE
    if verb not in VERBS:
        return report("vhostpy", f"no verb {verb!r}", _nearest_verb(verb), BAD_USAGE)
    return _run(verb, rest, f"vhostpy {verb}")


def main_net(arguments: Sequence[str] | None = None) -> int:
    """The program `vhostpy-net`, for vhost-user description files."""
    return _run("net", sys.argv[1:] if arguments is None else arguments, "vhostpy-net")


def main_blk(arguments: Sequence[str] | None = None) -> int:
    """The program `vhostpy-blk`, for vhost-user description files."""
    return _run("blk", sys.argv[1:] if arguments is None else arguments, "vhostpy-blk")


def version() -> str:
    """What is installed. Not at import: looking it up takes 20 ms."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vhostpy")
    except PackageNotFoundError:  # run from a tree that was never installed
        return "unknown"


def report(program: str, message: str, hint: str, status: int) -> int:
    """An error for the operator: what it is, what to do. Returns `status`."""
    next_step = f"\n  next: {printable(hint)}" if hint else ""
    print(f"{program}: error: {printable(message)}{next_step}", file=sys.stderr)
    return status


def _run(verb: str, arguments: Sequence[str], program: str) -> int:
    try:
        module = import_module(f"vhostpy.cli.{verb}")
        status: int = module.main(list(arguments), program)
        sys.stdout.flush()
        return status
    except VhostpyError as error:
        return report(program, error.args[0], error.hint, FAILED)
    except BrokenPipeError:
        # The reader of our output left (`vhostpy status | head`); the interpreter would
        # complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except KeyboardInterrupt:
        return FAILED


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return USAGE + "\n" + HELP.format(verbs=verbs).rstrip()


def _nearest_verb(verb: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(verb, VERBS, 1)
    return f"did you mean 'vhostpy {near[0]}'?" if near else f"one of: {', '.join(VERBS)}"
