"""The commands: picks the verb and turns errors into one line and an exit status.

Each verb is a module of its own, imported only when it is asked for: what `status` needs
to draw a table must not cost `net` its start.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from vhostpy.cli import output
from vhostpy.errors import VhostpyError
from vhostpy.system.lines import printable

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
# A signal that comes sooner after one is that one's copy: timeout(1) sends it to the process,
# and then to its group.
AGAIN_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """The program `vhostpy`; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = words[0] if words else ""
    if verb in VERBS:
        return _run_verb(verb, words[1:], f"vhostpy {verb}")
    return _guarded("vhostpy", lambda: _without_verb(words))


def main_net(arguments: Sequence[str] | None = None) -> int:
    """The program `vhostpy-net`, for vhost-user description files."""
    return _run_verb("net", sys.argv[1:] if arguments is None else arguments, "vhostpy-net")


def main_blk(arguments: Sequence[str] | None = None) -> int:
    """The program `vhostpy-blk`, for vhost-user description files."""
    return _run_verb("blk", sys.argv[1:] if arguments is None else arguments, "vhostpy-blk")


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
    output.talk(f"{program}: error: {printable(message)}{next_step}\n")
    return status


class Signalled(KeyboardInterrupt):
    """Another signal that ends a command as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _without_verb(words: Sequence[str]) -> int:
    verb = words[0] if words else ""
    if not verb:
        output.talk(_help() + "\n")
        return BAD_USAGE
    if verb == "help" and len(words) > 1:
        return main([words[1], "--help"])
    if verb in ("-h", "--help", "help"):
        output.write(_help() + "\n")
        return DONE
    if verb == "--version":
        output.write(f"vhostpy {version()}\n")
        return DONE
    return report("vhostpy", f"no verb {verb!r}", _nearest_verb(verb), BAD_USAGE)


def _run_verb(verb: str, arguments: Sequence[str], program: str) -> int:
    return _guarded(
        program, lambda: import_module(f"vhostpy.cli.{verb}").main(list(arguments), program)
    )


def _guarded(program: str, work: Callable[[], int]) -> int:
    """Does `work`; whatever ends it becomes an exit status."""
    try:
        output.prepare()
        return work()
    except output.OutputError as error:
        if error.broken:
            return FAILED
        return report(program, error.args[0], error.hint, FAILED)
    except VhostpyError as error:
        return report(program, error.args[0], error.hint, FAILED)
    except KeyboardInterrupt as error:
        # As a shell says it of a process that a signal ended.
        return 128 + (error.number if isinstance(error, Signalled) else signal.SIGINT)
    finally:
        output.talk("")  # what it holds back would make the interpreter's exit status 120


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return USAGE + "\n" + HELP.format(verbs=verbs).rstrip()


def _nearest_verb(verb: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(verb, VERBS, 1)
    return f"did you mean 'vhostpy {near[0]}'?" if near else f"one of: {', '.join(VERBS)}"
