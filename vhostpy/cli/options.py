"""What the verbs' command lines share: the parser, its value types, the common flags."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from vhostpy.cli import output
from vhostpy.errors import ConfigError
from vhostpy.system.fds import SOCKET_PATH_MAX
from vhostpy.system.lines import printable

SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
TIME_UNITS_US = {"us": 1, "ms": 1_000, "s": 1_000_000}
LOG_LEVELS = ("debug", "info", "warning", "error")
POLL_WAYS = ("adaptive", "busy", "interrupt")
WORKERS_MAX = 256


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and a next step, and whose help ends in an example."""

    def __init__(self, program: str, description: str, example: str) -> None:
        super().__init__(
            prog=program,
            description=description,
            epilog=f"example: {example.strip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
        commands = (line.strip() for line in example.splitlines())
        self._example = next(line for line in commands if line.startswith("vhostpy"))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also names a misspelt flag first, not the one that is missing because of it."""
        for word in args:
            if word == "--":
                break
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                from difflib import get_close_matches  # 5 ms that only a mistake has to pay

                near = get_close_matches(flag, self._option_string_actions, 1)
                self.error(f"unknown flag {flag}" + (f"\ndid you mean {near[0]}?" if near else ""))
        return super().parse_args(args, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        (output.write if file is sys.stdout else output.talk)(message)

    def error(self, message: str) -> NoReturn:
        """Exit status 2, without the usage that would hide the line that matters."""
        text, _, hint = message.partition("\n")
        if not hint and "required" in text:
            hint = f"e.g. {self._example}"
        hint = printable(hint) or f"see {self.prog} --help"
        self.exit(2, f"{self.prog}: error: {printable(text)}\n  next: {hint}\n")


def bad(message: str, hint: str = "") -> argparse.ArgumentTypeError:
    """An unusable value; Parser.error() finds the hint after the line break."""
    return argparse.ArgumentTypeError(f"{message}\n{hint}" if hint else message)


class Once(argparse.Action):
    """A flag that means nothing twice: silently using the last would hide a mistake."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        seen = namespace.__dict__.setdefault("_seen", set())
        if self.dest in seen:
            parser.error(f"{option_string} is given twice\ngive it once")
        seen.add(self.dest)
        setattr(namespace, self.dest, values)


class _Version(argparse.Action):
    """Looks it up only when it is asked for."""

    def __call__(self, parser: Any, *_: Any) -> None:
        from vhostpy.cli import version

        output.write(f"{parser.prog} {version()}\n")
        parser.exit()


# Values ------------------------------------------------------------------------------


def size_bytes(text: str) -> int:
    """'4K', '1G', '512': binary units."""
    match = re.fullmatch(r"(\d{1,20})([KMGTP]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise bad(f"{text!r} is not a size", "a number with K, M, G or T, e.g. 512M")
    size = int(match[1]) * SIZE_UNITS[match[2].upper()]
    if not 0 < size < 1 << 63:
        raise bad(f"size {text} is out of range", "more than 0 and less than 8192P")
    return size


def disk_size(text: str) -> int:
    """A size that virtio-blk's capacity, counted in sectors of 512 bytes, can express."""
    size = size_bytes(text)
    if size % 512:
        raise bad(
            f"a disk of {size} bytes is not a whole number of 512-byte sectors",
            f"round it, e.g. to {-(-size // 512) * 512}",
        )
    return size


def format_size(size: int) -> str:
    """The shortest exact spelling that size_bytes() reads: 1073741824 is '1G'."""
    for unit in reversed(SIZE_UNITS):
        if unit and size and size % SIZE_UNITS[unit] == 0:
            return f"{size // SIZE_UNITS[unit]}{unit}"
    return str(size)


def microseconds(text: str) -> int:
    """'100us', '1ms', '0'; a bare number is microseconds."""
    match = re.fullmatch(r"(\d{1,9})(us|ms|s)?", text.strip())
    if not match:
        raise bad(f"{text!r} is not a time", "microseconds or with a unit, e.g. 100us or 1ms")
    time_us = int(match[1]) * TIME_UNITS_US[match[2] or "us"]
    if time_us > 1_000_000:
        raise bad(f"{text} is too long", "at most 1s")
    return time_us


def seconds(text: str) -> float:
    """'2', '0.5', '500ms'; a bare number is seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)(us|ms|s)?", text.strip())
    time_s = float(match[1]) * TIME_UNITS_US[match[2] or "s"] / 1e6 if match else 0.0
    if not 0 < time_s <= 1e6:
        raise bad(f"{text!r} is not a time", "seconds or with a unit, e.g. 2, 0.5 or 500ms")
    return time_s


def rate_per_s(text: str) -> float:
    """'500K', '1.5M', '2000': things a second, in decimal units."""
    match = re.fullmatch(r"(\d{1,10}(?:\.\d{1,6})?)([KMG]?)", text, re.IGNORECASE)
    if not match:
        raise bad(f"{text!r} is no rate", "a number a second, e.g. 2000, 500K or 1.5M")
    rate = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2].upper()]
    if not 0 < rate <= 1e9:
        raise bad(f"{text} is out of range", "more than 0 and at most 1G")
    return rate


def requests_per_s(text: str) -> int:
    """'5000', '5K'; 'none' is 0."""
    return 0 if text == "none" else max(round(rate_per_s(text)), 1)


def bytes_per_s(text: str) -> int:
    """'100M', in binary units; 'none' is 0."""
    return 0 if text == "none" else size_bytes(text)


def cpu_list(text: str) -> list[int]:
    """'0-3,6': processors to pin workers to, in the order given."""
    cpus: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if not match:
            raise bad(f"{text!r} is not a list of processors", "e.g. 0-3,6")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise bad(f"{part.strip()}: the range runs backwards", f"write {last}-{first}")
        cpus += range(first, last + 1)
    if len(set(cpus)) != len(cpus):
        raise bad(f"{text}: a processor is named twice", "name each once")
    allowed = os.sched_getaffinity(0)
    for cpu in cpus:
        if cpu not in allowed:
            raise bad(
                f"processor {cpu} is not one that this process may use",
                f"choose from {format_cpus(allowed)}",
            )
    return cpus


def format_cpus(cpus: Iterable[int]) -> str:
    """The list as cpu_list() reads it: '0-3,6'."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in [low, high]."""

    def number(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,30}", text):
            raise bad(f"{text!r} is no number", f"a whole number from {low} to {high}")
        if not low <= int(text) <= high:
            raise bad(f"{text} is out of range", f"a whole number from {low} to {high}")
        return int(text)

    return number


def file_mode(text: str) -> int:
    """'0660', always octal."""
    if not re.fullmatch(r"(0o?)?[0-7]{3}", text):
        raise bad(f"{text!r} is not a file mode", "three octal digits, e.g. 0660")
    return int(text, 8)


def group_name(text: str) -> str:
    """A group that exists."""
    import grp

    try:
        grp.getgrnam(text)
    except KeyError:
        raise bad(
            f"there is no group {text!r}", "see 'getent group'; QEMU's is often kvm"
        ) from None
    return text


def socket_path(text: str) -> str:
    """A path that fits a Unix socket address."""
    length = len(os.fsencode(text))
    if not length:
        raise bad("the path is empty", "e.g. /tmp/vu0")
    if length > SOCKET_PATH_MAX:
        raise bad(
            f"the path has {length} bytes, and a Unix socket takes at most {SOCKET_PATH_MAX}",
            "choose a shorter directory, e.g. /tmp",
        )
    return text


# Flags -------------------------------------------------------------------------------


def add_process_flags(parser: Parser, *, queues: int, queues_limit: int, many: bool) -> None:
    """The flags that `net` and `blk` share. `many`: --socket and --fd may be repeated."""
    action: Any = "append" if many else Once
    again = "; repeat it for more" if many else ""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--socket", "--socket-path", dest="sockets", metavar="PATH", type=socket_path,
        action=action, help=f"Unix socket to listen on{again}",
    )  # fmt: skip
    where.add_argument(
        "--fd", dest="fds", metavar="N", type=whole(0, 1 << 20), action=action,
        help=f"inherited socket, listening or connected{again}",
    )  # fmt: skip
    parser.add_argument(
        "--client", action="store_true",
        help="connect to the front-end's socket instead of listening, again whenever it returns",
    )  # fmt: skip
    parser.add_argument(
        "--mode", type=file_mode, action=Once, help="the socket file's permissions, e.g. 0660"
    )
    parser.add_argument(
        "--group", type=group_name, action=Once, help="the socket file's group, e.g. kvm"
    )
    parser.add_argument(
        "--allow-file-memory", action="store_true",
        help="guest memory may be in a file on a disk: a read of it that the disk serves late "
        "holds up other guests",
    )  # fmt: skip
    parser.add_argument(
        "--queues", metavar="N", type=whole(1, queues_limit), default=queues, action=Once,
        help=f"queue{' pairs' if many else 's'} shown to the guest, at most (default: {queues})",
    )  # fmt: skip
    parser.add_argument(
        "--workers", metavar="N", type=whole(1, WORKERS_MAX), action=Once,
        help="threads that move the data (default: 1, or one for each of --cpus)",
    )  # fmt: skip
    parser.add_argument(
        "--cpus", metavar="LIST", type=cpu_list, action=Once,
        help="processors to pin the workers to, e.g. 2-3 (default: not pinned)",
    )  # fmt: skip
    parser.add_argument(
        "--poll", choices=POLL_WAYS, default="adaptive", action=Once,
        help="adaptive: spin briefly, then sleep; busy: never sleep; interrupt: sleep at once",
    )  # fmt: skip
    parser.add_argument(
        "--control", metavar="PATH", type=socket_path, action=Once,
        help="control socket (default: NAME.sock below $XDG_RUNTIME_DIR/vhostpy, /run/vhostpy "
        "or /tmp/vhostpy-UID, the first that can be)",
    )  # fmt: skip
    parser.add_argument(
        "--print-capabilities", action="store_true",
        help="print what this program can do, as vhost-user.json describes it, and exit",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="once it listens, say so in JSON on standard output"
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", action=Once)


def add_limit_flags(parser: Parser) -> None:
    """The flags that `blk` and `limit` share."""
    parser.add_argument(
        "--iops", metavar="N", type=requests_per_s, action=Once,
        help="requests a second, at most, e.g. 5K; none: as many as it can",
    )  # fmt: skip
    parser.add_argument(
        "--bandwidth", metavar="SIZE", type=bytes_per_s, action=Once,
        help="bytes a second that are read and written, at most, e.g. 100M; none: no limit",
    )  # fmt: skip
    parser.add_argument(
        "--burst", metavar="TIME", type=microseconds, action=Once,
        help="what an idle disk may save up of its limits, as a time (default: 100ms)",
    )  # fmt: skip


def add_target_flags(parser: Parser) -> None:
    """The flags of verbs that talk to a running process."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME",
        help="the process, as 'vhostpy status' lists it, or one of its ports",
    )  # fmt: skip
    parser.add_argument(
        "--control", metavar="PATH", type=socket_path, action=Once,
        help="its control socket, instead of NAME",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same data as JSON")


def check_process_flags(parser: Parser, options: argparse.Namespace) -> None:
    """What single values cannot tell; fills in what follows from other flags."""
    for name in ("sockets", "fds"):
        value = getattr(options, name)
        if not isinstance(value, list):
            setattr(options, name, [] if value is None else [value])
    if options.fds and options.client:
        parser.error("--client needs --socket\nan inherited --fd is connected already, or listens")
    if (options.client or options.fds) and (options.mode is not None or options.group is not None):
        parser.error("--mode and --group are for a socket file that we make\nleave them out")
    for path in _repeated([os.path.realpath(path) for path in options.sockets]):
        parser.error(f"--socket {path} is given twice\neach port needs a socket of its own")
    for fd in _repeated(options.fds):
        parser.error(f"--fd {fd} is given twice\neach port needs a socket of its own")
    if options.workers is None:
        options.workers = len(options.cpus) if options.cpus else 1
    if options.cpus and options.workers > len(options.cpus):
        parser.error(
            f"{options.workers} workers and {len(options.cpus)} processors to pin them to\n"
            "name a processor for each worker in --cpus"
        )


def device_names(sockets: Sequence[str], fds: Sequence[int]) -> list[str]:
    """What messages and `status` call each socket's device: short, and no two alike."""
    stems = [os.path.basename(path).removesuffix(".sock") or path for path in sockets]
    names = [
        stem if stems.count(stem) == 1 else path for stem, path in zip(stems, sockets, strict=True)
    ]
    return names + [f"fd{fd}" for fd in fds]


def check_fd(fd: int) -> None:
    """Raises ConfigError unless `fd` is an inherited Unix stream socket."""
    import socket

    hint = f"the parent has to pass it on, e.g. systemd's Sockets= or a shell's {fd}<>"
    try:
        # A duplicate: the object closes what it holds, and the number is the server's.
        with socket.socket(fileno=os.dup(fd)) as inherited:
            family, kind = inherited.family, inherited.type
    except OSError as error:
        raise ConfigError(f"--fd {fd} is not an open socket: {error.strerror}", hint) from None
    if family != socket.AF_UNIX or kind != socket.SOCK_STREAM:
        raise ConfigError(f"--fd {fd} is not a Unix stream socket", hint)


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value in values[:index]]
