"""Sockets: listening, connecting, one front-end at a time for each device.

The only module that waits for a front-end. Bytes go to the codec, messages to the
session, effects to the data plane; what comes back is sent.
"""

import asyncio
import contextlib
import errno
import grp
import logging
import os
import socket
import stat
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from vhostpy.device.device import Device
from vhostpy.errors import ConfigError, ProtocolError, Refused, VhostpyError
from vhostpy.memory.mapping import poison_fd
from vhostpy.protocol.codec import Decoder, Message, encode_reply
from vhostpy.runtime.pool import Workers
from vhostpy.server.plane import DataPlane
from vhostpy.session.effects import Effect, MakeInflight, Reply, StartRing, StopRing
from vhostpy.session.peername import peer_name
from vhostpy.session.session import Session
from vhostpy.system import fds, unixsocket
from vhostpy.system.account import Account
from vhostpy.system.notify import bell_fd

log = logging.getLogger("vhostpy")

# A front-end that takes none of our replies for so long has hung.
SEND_TIMEOUT_S = 10.0
# A new front-end waits so long for the old one's session to be cleared away.
HANDOVER_S = 2.0
RECONNECT_MS = 50
# What ended sessions does so no more, once one has lasted for so long.
SETTLED_S = 1.0
# Until then each error is said so often, and so many different ones: a front-end can make up
# as many as it likes.
REPEATS = 1
CAUSES_MAX = 16
HANGING = Refused(
    "refused a front-end: files that one before it sent cannot be closed yet",
    "see what hangs, a lingering socket or a file whose server does not answer; a sound "
    "front-end sends eventfds and memory",
)
# How long to wait when the process has no file descriptors left.
SHORTAGE_S = 0.1


class Server:
    """One device behind one socket.

    Exactly one of `path` and `fd` is given. `client` connects to `path` instead of
    listening there, again and again. `fd` is a listening or a connected socket.
    `file_memory`: guest memory may be in a file on a disk.
    """

    def __init__(
        self,
        device: Device,
        *,
        path: str | None = None,
        fd: int | None = None,
        client: bool = False,
        mode: int | None = None,
        group: str | None = None,
        file_memory: bool = False,
    ) -> None:
        self.device = device
        self.account = Account(file_memory=file_memory)
        self.account.open()
        self.path = path
        self.fd = fd
        self.client = client
        self.mode = mode
        self.group = group
        self.connection: Connection | None = None
        self.sessions = 0
        self.failures = Failures(device.name)
        self._task: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._identity = (0, 0)  # of the socket file that we made

    async def start(self) -> None:
        """Listens, or starts to connect. Raises ConfigError where that can't be."""
        _watch_workers(self.device)
        loop = asyncio.get_running_loop()
        if self.fd is not None:
            sock = _adopt(self.fd)
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                self._listener = sock
                self._task = loop.create_task(self._accept(sock))
            else:
                self._task = loop.create_task(self._serve(sock))
        elif self.client:
            self._task = loop.create_task(self._connect())
        else:
            self._listener = _listen(self.path or "", self.mode, self.group)
            self._identity = unixsocket.identity(self.path or "")
            self._task = loop.create_task(self._accept(self._listener))

    async def close(self) -> None:
        """Ends the session, if any, and removes the socket."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.account.close()
        if self._listener is not None:
            fds.close_socket(self._listener, self.account)
            if self.path is not None:
                with contextlib.suppress(OSError):
                    unixsocket.remove_own(self.path, self._identity)

    def status(self) -> dict[str, Any]:
        """Where the handshake stands, for people and programs."""
        connection = self.connection
        where = self.path if self.path is not None else f"fd {self.fd}"
        if connection is None:
            waits = "a front-end to listen" if self.client else "a front-end to connect"
            if self.account.closing.left:
                waits = f"{self.account.closing.left} files of earlier ones to be closed"
            handshake: dict[str, Any] = {"handshake": "not connected", "waits_for": waits}
        else:
            handshake = connection.session.status()
        if pause_s := self.account.calls.pause_s:
            dear = f"{self.account.calls.dear_ms:.1f} ms of a worker's time"
            paused = f"calls, each of which takes {dear}: none is made for {pause_s:.1f} s"
            handshake["waits_for"] = "; ".join(filter(None, [handshake["waits_for"], paused]))
        return {
            "socket": where,
            "connected": connection is not None,
            "sessions": self.sessions,
            **handshake,
            "account": self.account.status(),
            "device": self.device.status(),
        }

    def tell_config_changed(self) -> bool:
        """Has the front-end read the device's config space anew; False: it cannot be told."""
        return self.connection is not None and self.connection.plane.tell_config_changed()

    # Private ------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        serving: asyncio.Task[None] | None = None
        shortage = False
        try:
            while True:
                if self.account.fds >= self.account.fds_share:
                    # Each that is refused costs one more until it is closed.
                    await self._all_closed(None)
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as error:  # EMFILE: others may soon give some back
                    if not shortage:
                        log.warning("%s: cannot accept a front-end: %s", self.device.name, error)
                    shortage = True
                    await asyncio.sleep(SHORTAGE_S)
                    continue
                shortage = False
                if serving is not None and not serving.done():
                    await asyncio.wait([serving], timeout=HANDOVER_S)
                if serving is not None and not serving.done():
                    log.warning(
                        "%s: refused a second front-end, one is connected\n"
                        "  next: stop the first one, or give each its own --socket",
                        self.device.name,
                    )
                    fds.close_socket(sock, self.account)
                    continue
                if not await self._all_closed(HANDOVER_S):
                    self.failures.add("%s: %s", HANGING)
                    fds.close_socket(sock, self.account)
                    continue
                serving = loop.create_task(self._serve(sock))
        finally:
            if serving is not None:
                serving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await serving

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        assert self.path is not None
        while True:
            sock: socket.socket | None = None
            if not await self._all_closed(HANDOVER_S):
                self.failures.add("%s: %s", HANGING)
                await self._all_closed(None)
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.setblocking(False)
                await loop.sock_connect(sock, self.path)
            except OSError as error:
                if sock is not None:
                    sock.close()
                # The front-end may come at any time; a wrong path is told when one looks.
                log.debug("%s: cannot connect yet: %s", self.device.name, error)
            else:
                await self._serve(sock)
            await asyncio.sleep(RECONNECT_MS / 1000)

    async def _all_closed(self, deadline_s: float | None) -> bool:
        """Waits until all that earlier front-ends sent is closed; False: past the deadline."""
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(closed.set)

        self.account.closing.when_idle(tell)
        try:
            async with asyncio.timeout(deadline_s):
                await closed.wait()
        except TimeoutError:
            return False
        return True

    async def _serve(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sessions += 1
        self.connection = connection = Connection(self.device, sock, self.account)
        if not self.failures:
            log.info("%s: front-end connected", self.device.name)
        try:
            await connection.run(self.failures.over)
            self.failures.over()
            log.info("%s: front-end disconnected", self.device.name)
        except (VhostpyError, OSError) as error:
            self.failures.add("%s: session ended: %s", error)
        except Exception:
            # A defect of ours costs one session, not the port.
            log.exception("%s: session ended by an internal error", self.device.name)
        finally:
            for what in connection.plane.hung:
                self.failures.add("%s: %s", what)
            self.connection = None


class Failures:
    """What ends sessions: a front-end that tries ten times a second hears it each time, the
    operator once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._said: Counter[str] = Counter()
        self._unsaid = 0

    def __bool__(self) -> bool:
        """Whether some were said that are not over."""
        return bool(self._said)

    def add(self, text: str, what: object) -> None:
        """`text` has a place for our name, and one for `what`: an error, or words."""
        said = text % (self.name, what)
        if self._said[said] >= REPEATS or len(self._said) > CAUSES_MAX:
            self._unsaid += 1
        else:
            self._said[said] += 1
            log.error(text, self.name, what)

    def over(self) -> None:
        """A session lasts, or ended well."""
        if self._said:
            more = f"; the errors before came {self._unsaid} more times" if self._unsaid else ""
            log.info("%s: works again%s", self.name, more)
        self._said.clear()
        self._unsaid = 0


class Connection:
    """One front-end's session on a connected socket."""

    # Those whose rings and memory have to be looked at when a worker or a fault calls.
    open: ClassVar[weakref.WeakSet["Connection"]] = weakref.WeakSet()

    def __init__(self, device: Device, sock: socket.socket, account: Account) -> None:
        self.device = device
        self.sock = sock
        self.account = account
        self.session = Session(device)
        self.session.front_end = peer_name(sock)
        self.plane = DataPlane(device, self.session, account.calls)
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, settled: Callable[[], None]) -> None:
        """Serves until the front-end goes; raises what ended the session otherwise.

        `settled` is called once it has lasted for a while.
        """
        self.device.opened()
        Connection.open.add(self)
        lasting = asyncio.get_running_loop().call_later(SETTLED_S, settled)
        reading = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait([reading, self._failure], return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            await reading
        finally:
            lasting.cancel()  # closing may take long
            try:
                await _whole(self._close(reading))
            finally:
                # The error's traceback refers to this frame: both would keep each other, and
                # the fds of an unfinished message, until the next garbage collection.
                del reading, self._failure

    async def _close(self, reading: asyncio.Future[None]) -> None:
        Connection.open.discard(self)
        self._failure.cancel()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        try:
            await self.plane.close()
        finally:
            # Not sooner: a front-end that is hung up on goes on from where the rings stand.
            fds.close_socket(self.sock, self.account)
            self.session.close()

    def on_bell(self) -> None:
        """Called when a worker or a contained fault sounds the bell."""
        self.device.on_bell()
        try:
            self.plane.on_bell()
        except VhostpyError as error:
            if not self._failure.done():
                self._failure.set_exception(error.with_traceback(None))

    async def _read(self) -> None:
        decoder = Decoder()
        while True:
            await _ready(self.sock, write=False)
            try:
                data, received = fds.receive(self.sock, decoder.wanted, self.account)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return
            if not data:
                for fd in received:
                    fd.close()
                decoder.close()
                return
            for message in decoder.feed(data, received):
                await self._handle(message)
                # One message a turn of the loop: a flood of them starves no other session.
                await asyncio.sleep(0)

    async def _handle(self, message: Message) -> None:
        error: VhostpyError | None = None
        try:
            for effect in self.session.handle(message):
                await self._do(effect)
                if isinstance(effect, StartRing | StopRing):
                    await asyncio.sleep(0)  # of 256 rings: not all in one turn of the loop
        except VhostpyError as caught:
            error = caught
        except OSError as caught:
            # EMFILE, ENOMEM: the front-end asked for more than this process may have.
            error = ProtocolError(f"{self.device.name}: {message.request!r}: {caught}")
        try:
            for effect in self.session.done(message, error):
                await self._do(effect)
        finally:
            # The error refers to this frame: a cycle that would keep unused fds open.
            del error

    async def _do(self, effect: Effect) -> None:
        if isinstance(effect, Reply):
            await self._send(encode_reply(effect.request, effect.payload), effect.fds)
        elif isinstance(effect, StopRing):
            base = await self.plane.stop_ring(effect.index)
            for follow_up in self.session.ring_stopped(effect.index, base):
                await self._do(follow_up)
        elif isinstance(effect, MakeInflight):
            with self.plane.make_inflight(effect) as fd:
                for follow_up in self.session.inflight_made(effect, fd):
                    await self._do(follow_up)
        else:
            await self.plane.carry_out(effect)

    async def _send(self, data: bytes, out_fds: Any) -> None:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            while data:
                try:
                    sent = fds.send(self.sock, data, out_fds)
                except BlockingIOError:
                    await _ready(self.sock, write=True)
                    continue
                data, out_fds = data[sent:], ()


# Faults and workers ------------------------------------------------------------------


def _watch_workers(device: Device) -> None:
    """Has the running loop look after all sessions when a worker or a fault calls."""
    loop = asyncio.get_running_loop()
    for fd in (poison_fd(), bell_fd(), device.workers.bell_fd):
        loop.add_reader(fd, _look_after_all, fd, device.workers)


def _look_after_all(fd: int, workers: Workers) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
    if workers.wants_isolation() and workers not in _isolating:
        _isolating.add(workers)
        threading.Thread(target=_isolate, args=[workers], daemon=True).start()
    for connection in list(Connection.open):
        connection.on_bell()


# Those that a thread isolates for just now: it waits for a worker, which may be stuck.
_isolating: "weakref.WeakSet[Workers]" = weakref.WeakSet()


def _isolate(workers: Workers) -> None:
    try:
        for name in workers.isolate():
            log.warning(
                "%s: it blocked a worker again and again, by slow memory or a call fd that blocks: "
                "a queue is polled apart",
                name,
            )
    finally:
        _isolating.discard(workers)
    if workers.wants_isolation():  # what came meanwhile was left to this thread
        os.eventfd_write(workers.bell_fd, 1)


# Sockets -----------------------------------------------------------------------------


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    """Does `work` to its end, however often the caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    task.result()


async def _ready(sock: socket.socket, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    number = sock.fileno()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    if write:
        loop.add_writer(number, wake)
    else:
        loop.add_reader(number, wake)
    try:
        await future
    finally:
        if write:
            loop.remove_writer(number)
        else:
            loop.remove_reader(number)


def _adopt(fd: int) -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConfigError(f"--fd {fd} is not a socket", "pass a Unix stream socket")
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(
            f"--fd {fd}: {os.strerror(error.errno or 0)}", "pass an open Unix stream socket"
        ) from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ConfigError(f"--fd {fd} is not a Unix stream socket", "pass a Unix stream socket")
    sock.setblocking(False)
    return sock


def _listen(path: str, mode: int | None, group: str | None) -> socket.socket:
    length, limit = len(os.fsencode(path)), fds.SOCKET_PATH_MAX
    if length > limit:
        raise ConfigError(
            f"socket path has {length} bytes, the system allows {limit}",
            "choose a shorter path",
        )
    gid = _gid(group)
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    # The socket gets its permissions before anybody can connect: bind, chmod, listen.
    try:
        sock.bind(path)
        if mode is not None or gid is not None:
            with unixsocket.just_bound(path) as name:
                if gid is not None:
                    os.chown(name, -1, gid)
                if mode is not None:
                    os.chmod(name, mode)
        sock.listen(16)
    except ConfigError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            hint = "stop the process that just took it, or choose another path"
        elif error.errno == errno.ENOENT:
            hint = f"create {os.path.dirname(path) or '.'} first"
        else:
            hint = "choose a path and a group that this user may use"
        raise ConfigError(
            f"cannot listen on {path}: {os.strerror(error.errno or 0)}", hint
        ) from None
    return sock


def _gid(group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"no group {group!r} on this system", "getent group lists them") from None


def _remove_stale(path: str) -> None:
    """Removes a dead socket; refuses to touch anything else."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"{path} exists and is not a socket", "choose another path")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"cannot look at {path}: {os.strerror(error.errno or 0)}", "choose another path"
        ) from None
    if unixsocket.is_served(path):
        raise ConfigError(
            f"{path} is in use by a running process",
            "stop that process, or choose another --socket",
        )
    unixsocket.remove_if(path, lambda status: stat.S_ISSOCK(status.st_mode))
