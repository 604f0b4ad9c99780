"""Sockets: listening, connecting, one front-end at a time for each device.

Knows no message: a front-end that is accepted is its `Connection`'s.
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
from typing import Any

from vhostpy.device.device import Device
from vhostpy.errors import ConfigError, Refused, VhostpyError
from vhostpy.memory.mapping import poison_fd
from vhostpy.runtime.pool import Workers
from vhostpy.server.connection import Connection
from vhostpy.system import fds, unixsocket
from vhostpy.system.account import Account
from vhostpy.system.notify import bell_fd

log = logging.getLogger("vhostpy")

# A new front-end waits so long for the old one's session to be cleared away.
HANDOVER_S = 2.0
RECONNECT_MS = 50
# Until a session lasts (SETTLED_S) each error is said so often, and so many different ones: a
# front-end can make up as many as it likes.
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
        """How far the handshake is, and the rest, for people and programs."""
        connection = self.connection
        where = self.path if self.path is not None else f"fd {self.fd}"
        if connection is None:
            waits = "a front-end to listen" if self.client else "a front-end to connect"
            if self.account.closing.left:
                waits = f"{self.account.closing.left} files of earlier ones to be closed"
            session: dict[str, Any] = {"handshake": "not connected", "waits_for": waits}
        else:
            session = connection.session.status()
        if pause_s := self.account.calls.pause_s:
            dear = f"{self.account.calls.dear_ms:.1f} ms of a worker's time"
            paused = f"calls, each of which takes {dear}: none is made for {pause_s:.1f} s"
            session["waits_for"] = "; ".join(filter(None, [session["waits_for"], paused]))
        return {
            "socket": where,
            "connected": connection is not None,
            "sessions": self.sessions,
            **session,
            "account": self.account.status(),
            "device": self.device.status(),
        }

    def tell_config_changed(self) -> bool:
        """Has the front-end read the device's config space anew; False: it cannot be told."""
        return self.connection is not None and self.connection.tell_config_changed()

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
        """`text` has a %s for our name, and one for `what`: an error, or words."""
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


# Faults and workers ------------------------------------------------------------------


def _watch_workers(device: Device) -> None:
    """Has the running loop look at all sessions when a worker or a fault sounds a bell."""
    loop = asyncio.get_running_loop()
    for fd in (poison_fd(), bell_fd(), device.workers.bell_fd):
        loop.add_reader(fd, _on_bell, fd, device.workers)


def _on_bell(fd: int, workers: Workers) -> None:
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
