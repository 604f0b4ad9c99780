"""The control socket: msgpack requests to a running process, over a Unix socket.

    request    {"id": 1, "do": "fdb", "port": "vu0"}
    answer     {"id": 1, "ok": true, "result": [...]}
               {"id": 1, "ok": false, "error": "no port vu7", "hint": "one of: vu0, vu1"}

Knows encoding, limits and where the sockets lie; what can be asked, and the answers, come
with the handlers. Before each message stands its length: 4 bytes, highest first.

The other side is not trusted to be sane: a request, the clients, what waits to be sent to
each and every wait are bounded, so that no client costs the process more than its own
connection.
"""

import asyncio
import contextlib
import errno
import fcntl
import glob
import logging
import os
import pwd
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Any, Self

import msgpack

from vhostpy.errors import ConfigError, VhostpyError
from vhostpy.system import unixsocket
from vhostpy.system.fds import SOCKET_PATH_MAX

log = logging.getLogger("vhostpy")

LENGTH = Struct("!I")  # before each message
REQUEST_MAX = 64 << 10  # bytes; the longest real request has about 100
REQUEST_ITEMS_MAX = 32  # in one map or array: a header cannot make us reserve more
ANSWER_MAX = 256 << 20  # bytes; 65,536 forwarding entries are about 5 MB
CLIENTS_MAX = 32
NAME_MIN, NAME_MAX = 8, 40  # characters of a process's name
READ_SIZE = 16 << 10
HALF_REQUEST_S = 5.0  # for the rest of a request that has begun
IDLE_S = 600.0  # between two requests
SEND_S = 10.0  # for an answer to be taken
CLIENT_S = 5.0  # how long our own client waits
# Where other users' sockets are, and which part of the path names the user.
OTHER_USERS = (("/run/user/*/vhostpy", -2), ("/tmp/vhostpy-*", -1))

Handler = Callable[[Mapping[str, Any]], Any]


class ControlError(VhostpyError):
    """What the other side of a control socket did or said wrong."""


# Requests and answers, without a socket ------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for."""

    id: int
    do: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, message: Any) -> Self:
        """Raises ControlError unless `message` is a request."""
        if not isinstance(message, dict):
            raise ControlError(f"a request is a map, not {_kind(message)}")
        arguments = dict(message)
        number, verb = arguments.pop("id", 0), arguments.pop("do", None)
        if type(number) is not int:
            raise ControlError(f"'id' is a whole number, not {_kind(number)}")
        if not isinstance(verb, str):
            raise ControlError(f"'do' names what to do, it is not {_kind(verb)}")
        if not all(isinstance(key, str) for key in arguments):
            raise ControlError("names of arguments are text")
        return cls(number, verb, arguments)


class Decoder:
    """Bytes in, messages out; holds at most `limit` bytes. Of no more use after an error."""

    def __init__(self, limit: int = REQUEST_MAX, items: int = REQUEST_ITEMS_MAX) -> None:
        self._limit = limit
        self._items = items
        self._pending = bytearray()

    @property
    def half(self) -> bool:
        """A message has begun and is not complete."""
        return bool(self._pending)

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes. Raises ControlError where it makes no sense."""
        pending = self._pending
        pending += data
        while len(pending) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(pending)
            if length > self._limit:
                raise ControlError(f"a message of {length} bytes, at most {self._limit} will do")
            end = LENGTH.size + length
            if len(pending) < end:
                return
            body = bytes(pending[LENGTH.size : end])
            del pending[:end]
            yield self._unpack(body)

    def _unpack(self, body: bytes) -> Any:
        try:
            return msgpack.unpackb(
                body,
                max_array_len=self._items,
                max_map_len=self._items,
                unicode_errors="surrogateescape",  # file names need not be UTF-8
            )
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            # msgpack's own errors are ValueErrors.
            raise ControlError(f"not a message: {str(error) or type(error).__name__}") from None


def encode(message: Mapping[str, Any]) -> bytes:
    """The inverse of Decoder."""
    body = msgpack.packb(message, unicode_errors="surrogateescape")
    return LENGTH.pack(len(body)) + body


def answer(message: Any, handlers: Mapping[str, Handler]) -> bytes:
    """Carries the request `message` out; whatever goes wrong with it becomes the answer."""
    request = Request.of(message)
    try:
        handler = handlers.get(request.do)
        if handler is None:
            raise ControlError(f"cannot do {request.do[:100]!r}", f"one of: {', '.join(handlers)}")
        result = handler(request.arguments)
        return encode({"id": request.id, "ok": True, "result": result})
    except VhostpyError as error:
        return refusal(request.id, error)
    except Exception as error:
        # A defect of ours must not end the process that guests hang on.
        log.exception("control: %s failed", request.do)
        return refusal(request.id, ControlError(f"internal error: {error!r}", "see the log"))


def refusal(number: int, error: VhostpyError) -> bytes:
    """The answer to a request that was not carried out."""
    text = str(error.args[0])
    return encode({"id": number, "ok": False, "error": text, "hint": error.hint})


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


# The server ----------------------------------------------------------------------------


class ControlServer:
    """Serves `handlers` on the Unix socket `path`, private to the user."""

    def __init__(self, path: str | Path, handlers: Mapping[str, Handler]) -> None:
        self.path = Path(path)
        self._handlers = handlers
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._identity = (0, 0)

    async def start(self) -> None:
        """Raises ConfigError where `path` can't be bound or another process serves there."""
        listener = bind(self.path)
        self._identity = unixsocket.identity(self.path)
        self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=READ_SIZE)

    async def close(self) -> None:
        """Ends every client's connection and removes the socket file, if it is still ours."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        with contextlib.suppress(OSError):
            unixsocket.remove_own(self.path, self._identity)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = asyncio.ensure_future(self._serve(reader, writer))
        self._clients.add(client)
        client.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._clients) > CLIENTS_MAX:
                raise ControlError(f"{CLIENTS_MAX} clients are connected", "close one of them")
            await self._converse(reader, writer)
        except ControlError as error:
            with contextlib.suppress(OSError, TimeoutError):
                await _send(writer, refusal(0, error))
        except (OSError, TimeoutError):
            pass  # it left, or takes nothing
        finally:
            # Not close(): that would wait for a client that never reads.
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request at a time: the next is not looked at before the answer was taken."""
        decoder = Decoder()
        half_until = 0.0
        while True:
            now = time.monotonic()
            if not decoder.half:
                half_until = now + HALF_REQUEST_S
            limit_s = half_until - now if decoder.half else IDLE_S
            async with asyncio.timeout(limit_s):
                data = await reader.read(READ_SIZE)
            if not data:
                return
            for message in decoder.feed(data):
                await _send(writer, answer(message, self._handlers))


async def _send(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(message)
    # Down to nothing, so that no client has more than one answer waiting here.
    writer.transport.set_write_buffer_limits(high=0)
    async with asyncio.timeout(SEND_S):
        await writer.drain()


def bind(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600; replaces one that nobody listens on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _directory_lock(path.parent):
            if unixsocket.is_served(path):
                raise ConfigError(
                    f"{path}: another process serves this control socket",
                    "stop it, or give this one another --control PATH",
                )
            remove_dead(path)
            # The umask, not a chmod after: private from the first moment.
            mask = os.umask(0o177)
            try:
                listener.bind(os.fspath(path))
            finally:
                os.umask(mask)
            listener.listen(CLIENTS_MAX)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            if path.is_dir():
                what, hint = "a directory", f"name a file in it, e.g. {path / 'vhostpy.sock'}"
            else:
                what, hint = "a file", "remove it, or give --control another path"
            raise ConfigError(f"{path}: {what} is in the way of the control socket", hint) from None
        raise ConfigError(
            f"{path}: cannot make the control socket: {error.strerror or error}",
            "give --control a path in a directory that exists and you may write to",
        ) from None
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


# The client ----------------------------------------------------------------------------


class Client:
    """Asks a running process; blocking, for the commands."""

    def __init__(self, path: str | Path, timeout_s: float = CLIENT_S) -> None:
        self.path = Path(path)
        self._number = 0
        self._timeout_s = timeout_s
        self._decoder = Decoder(ANSWER_MAX, ANSWER_MAX)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            reason = error.strerror or str(error)
            raise ControlError(
                f"{path}: cannot reach a vhostpy process: {reason}",
                "'vhostpy status' lists those that run",
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """The result of `do`. Raises ControlError if it can't be had."""
        self._number += 1
        try:
            return self._ask(self._number, do, arguments)
        except OSError as error:
            reason = "does not answer" if isinstance(error, TimeoutError) else error.strerror
            raise ControlError(f"{self.path}: {reason}", "see whether the process hangs") from None

    def _ask(self, number: int, do: str, arguments: Mapping[str, Any]) -> Any:
        deadline = time.monotonic() + self._timeout_s
        self._socket.settimeout(self._timeout_s)
        self._socket.sendall(encode({"id": number, "do": do, **arguments}))
        while True:
            # A process that drips an answer must not hold us for ever either.
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._socket.recv(1 << 20)
            if not data:
                raise ControlError(f"{self.path}: the process closed the connection")
            try:
                message = next(self._decoder.feed(data), None)
            except ControlError as error:
                raise ControlError(
                    f"{self.path}: {error.args[0]}", "see which process serves this socket"
                ) from None
            if message is not None:
                return self._result(message)

    def _result(self, message: Any) -> Any:
        if not isinstance(message, dict):
            raise ControlError(f"{self.path}: answers with {_kind(message)}, not a map")
        if not message.get("ok"):
            raise ControlError(str(message.get("error")), str(message.get("hint") or ""))
        return message.get("result")


# Where the sockets lie -----------------------------------------------------------------


def directories() -> list[Path]:
    """Where control sockets may lie, the preferred one first; none need exist.

    VHOSTPY_RUNTIME_DIR keeps processes apart from all others: only that directory then.
    """
    if own := os.environ.get("VHOSTPY_RUNTIME_DIR"):
        return [Path(own)]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    session = [Path(runtime, "vhostpy")] if runtime else []
    return [*session, Path("/run/vhostpy"), Path(f"/tmp/vhostpy-{os.geteuid()}")]


def default_path(name: str) -> Path:
    """A free path for a process called `name`; with the process number where it is taken."""
    directory = writable_directory()
    name = file_name(name, _room(directory))
    path = directory / f"{name}.sock"
    return directory / f"{name}-{os.getpid()}.sock" if unixsocket.is_served(path) else path


def file_name(name: str, length: int = NAME_MAX) -> str:
    """A process's name as a file's: at most `length` characters that no shell minds."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")
    return name[-min(NAME_MAX, length) :] or "vhostpy"


def running() -> dict[str, Path]:
    """Name and control socket of every process that lives; removes what dead ones left.

    Root is also told of other users' processes; where names meet, as 'vu0@alice'.
    """
    found: dict[str, Path] = {}
    for directory in directories():
        with contextlib.suppress(OSError), _directory_lock(directory):
            _check_owner(directory)
            for path in sorted(directory.glob("*.sock")):
                if unixsocket.is_served(path):
                    found.setdefault(path.stem, path)
                else:
                    with contextlib.suppress(OSError):
                        remove_dead(path)
    for directory, owner in _other_users_directories():
        for path in sorted(directory.glob("*.sock")):
            # Nothing is removed here, and no link followed to what others serve.
            with contextlib.suppress(OSError):
                if path.stat().st_uid == owner and unixsocket.is_served(path):
                    taken = path.stem in found
                    found[f"{path.stem}@{_user_name(owner)}" if taken else path.stem] = path
    return found


def _other_users_directories() -> Iterator[tuple[Path, int]]:
    """With the user that must own each; none for who may not look there."""
    if os.geteuid() != 0 or os.environ.get("VHOSTPY_RUNTIME_DIR"):
        return
    own = directories()
    for pattern, at in OTHER_USERS:
        for name in sorted(glob.glob(pattern)):
            path = Path(name)
            user = path.parts[at].removeprefix("vhostpy-")
            with contextlib.suppress(OSError):
                status = path.lstat()
                theirs = stat.S_ISDIR(status.st_mode) and str(status.st_uid) == user
                if theirs and path not in own:
                    yield path, status.st_uid


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def advertise(name: str, path: Path) -> Path | None:
    """Lets running() find a control socket elsewhere; the link to remove at the end."""
    with contextlib.suppress(OSError, ConfigError):
        link = default_path(name)
        with _directory_lock(link.parent):
            remove_dead(link)
            link.symlink_to(path.absolute())
        return link
    return None


def remove_dead(path: Path) -> None:
    """Removes a socket, or a link to one, that nobody listens on; nothing else."""
    unixsocket.remove_if(
        path, lambda status: stat.S_ISSOCK(status.st_mode) or stat.S_ISLNK(status.st_mode)
    )


def writable_directory() -> Path:
    """The first that is ours and may be written to, made if need be. Raises ConfigError."""
    for directory in directories():
        if _room(directory) < NAME_MIN or not directory.parent.is_dir():
            continue
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            _check_owner(directory)
        except OSError:
            continue
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
    raise ConfigError(
        "no directory for the control socket: " + ", ".join(map(str, directories())),
        "set XDG_RUNTIME_DIR, or give --control PATH",
    )


def _room(directory: Path) -> int:
    """Characters left for a name, if a path in `directory` shall fit a socket address."""
    return SOCKET_PATH_MAX - len(os.fsencode(directory)) - len("/-1234567.sock")


def _check_owner(directory: Path) -> None:
    """A directory that somebody else made in /tmp could hold sockets that lie to us."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.geteuid()):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))


@contextlib.contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    """No two processes probe, remove and bind in `directory` at once.

    Without this, one could remove what another has just bound in place of a dead socket.
    Bounded, as anybody can lock a directory that he can read.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)
