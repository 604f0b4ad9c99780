"""Connecting to a socket that somebody else serves, and finding out what is behind it."""

import errno
import os
import select
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.errors import ConfigError, ProtocolError, VhostpyError
from vhostpy.frontend.frontend import FrontEnd

HUGE_PAGE = 2 << 20
GUEST_BASE = 0x4000_0000  # where the generator's memory begins, as a guest sees it

CONNECTED = b"03"  # proc(5), /proc/net/unix

# A virtio-blk device has no meaning for these bits, each of which some net back-end offers.
NET_ONLY = 1 << Feature.NET_MRG_RXBUF | 1 << Feature.NET_MQ | 1 << Feature.NET_MTU


def connect(path: str, timeout_s: float = 5.0) -> FrontEnd:
    """A front-end at the socket. Raises ConfigError that says what to do."""
    try:
        return FrontEnd(path, timeout_s=timeout_s, hugepages=True)
    except TimeoutError:
        hint = "a back-end serves one front-end at a time: end the other one"
        raise ConfigError(f"{path}: not accepted in {timeout_s:g} s", hint) from None
    except OSError as error:
        hints = {
            errno.ENOENT: "start the back-end first; the help of vhostpy net and blk shows how",
            errno.ECONNREFUSED: "the file is there and nobody listens: start the back-end again",
            errno.EACCES: "run it as a user or group that may use the socket",
        }
        text = os.strerror(error.errno or 0)
        raise ConfigError(f"{path}: {text}", hints.get(error.errno or 0, "")) from None


def asked(front_end: FrontEnd, path: str) -> tuple[int, int]:
    """(features, protocol features) that the back-end offers."""
    try:
        features = front_end.get_features()
        if not features >> Feature.PROTOCOL_FEATURES & 1:
            return features, 0
        return features, front_end.get_protocol_features()
    except TimeoutError:
        hint = "a back-end serves one front-end at a time: end the other one"
        raise ConfigError(f"{path}: GET_FEATURES is not answered", hint) from None
    except ConnectionError as error:
        if _another_is_connected(front_end, path):
            raise ConfigError(
                f"{path}: another front-end is connected, and a back-end serves one at a time",
                "end the other one, or give the load a socket of its own",
            ) from None
        hint = "see what the back-end says itself"
        raise ConfigError(f"{path}: the handshake failed: {first_line(error)}", hint) from None
    except (OSError, ProtocolError) as error:
        hint = "is it a vhost-user socket on which the back-end listens?"
        raise ConfigError(f"{path}: the handshake failed: {first_line(error)}", hint) from None


def _another_is_connected(front_end: FrontEnd, path: str) -> bool:
    """Whether the back-end, which has just hung up on us, talks to somebody else.

    Sockets that it has accepted bear its path.
    """
    front_end.close()
    names = {os.fsencode(text) for text in (path, os.path.abspath(path), os.path.basename(path))}
    with open("/proc/net/unix", "rb") as file:
        for line in file:
            fields = line.rstrip(b"\n").split(None, 7)
            if len(fields) == 8 and fields[5] == CONNECTED and fields[7] in names:
                return True
    return False


@contextmanager
def handshake(path: str) -> Iterator[None]:
    """Raises ConfigError where what is done within fails at the other end."""
    try:
        yield
    except (OSError, ProtocolError) as error:
        text = "no answer in time" if isinstance(error, TimeoutError) else first_line(error)
        hint = getattr(error, "hint", "")
        raise ConfigError(f"{path}: the handshake failed: {text}", hint) from error


def want_offered(path: str, wanted: int, offered: int, hints: dict[Feature, str]) -> None:
    """Raises ConfigError with its hint for the first feature that is wanted in vain."""
    for bit, hint in hints.items():
        if wanted >> bit & 1 and not offered >> bit & 1:
            raise ConfigError(f"{path}: the back-end does not offer {bit.name}", hint)


def kind_of(path: str) -> str:
    """'net' or 'blk'. Raises ConfigError where the back-end's features do not tell."""
    with connect(path) as front_end:
        features, protocol_features = asked(front_end, path)
    if features & NET_ONLY:
        return "net"
    if protocol_features >> ProtocolFeature.CONFIG & 1:
        return "blk"
    raise ConfigError(f"{path}: features {features:#x} do not tell its type", "give --type")


def hung_up(front_ends: Sequence[FrontEnd]) -> int | None:
    """The first whose back-end has closed the connection."""
    poll = select.poll()
    for front_end in front_ends:
        poll.register(front_end.sock, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(0)}
    for index, front_end in enumerate(front_ends):
        # It may have said something instead: that is read and dropped.
        if front_end.sock.fileno() in ready and front_end.hung_up(0.01):
            return index
    return None


def memory_layout(size: int) -> list[tuple[int, int]]:
    """One region of at least `size` bytes, in whole hugepages."""
    return [(GUEST_BASE, -(-size // HUGE_PAGE) * HUGE_PAGE)]


def first_line(error: BaseException) -> str:
    """What an error says, without its hint."""
    if isinstance(error, VhostpyError):
        return str(error.args[0])
    return str(error) or type(error).__name__
