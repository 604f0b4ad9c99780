"""One process: workers, an optional switch, a server per device, the control socket.

Starts them, ticks, answers the control socket's questions, and ends them at a signal.
Knows no command line; what the devices are is decided by whoever builds it.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhostpy.cli import AGAIN_S
from vhostpy.errors import ConfigError
from vhostpy.site import control
from vhostpy.system.lines import Talk

if TYPE_CHECKING:
    from vhostpy.backends.storage.storage import Storage
    from vhostpy.ring.positions import Keeper
    from vhostpy.runtime.pool import Workers
    from vhostpy.server.listen import Server
    from vhostpy.vswitch.switch import Switch

log = logging.getLogger("vhostpy")

TICK_S = 1.0  # ageing of the forwarding table, load figures
ANSWER_S = 0.5  # that a question to a storage may hold up everybody's messages
FDS_PER_QUEUE = 3  # kick, call, error
CLOSE_S = 8.0  # longer than a ring may take to drain; then we end all the same


class App:
    """Everything that one `vhostpy net` or `vhostpy blk` runs."""

    def __init__(
        self,
        kind: str,
        *,
        workers: "Workers",
        servers: Sequence["Server"],
        switch: "Switch | None" = None,
        control_path: str | None = None,
        storages: "Sequence[Storage]" = (),
    ) -> None:
        self.kind = kind
        self.workers = workers
        self.servers = list(servers)
        self.switch = switch
        self.storages = storages
        self.name = self.servers[0].device.name if self.servers else kind
        self.control: control.ControlServer | None = None
        self._control_path = control_path
        self._link: Path | None = None
        self._keeper: Keeper | None = None
        self._loads: list[dict[str, Any]] = []
        self._started_s = time.monotonic()
        self._signalled_s: float | None = None
        self._stop = asyncio.Event()

    async def run(self, listening: Callable[[], None] = lambda: None) -> None:
        """Serves until SIGTERM, SIGINT or SIGHUP; calls `listening` when every socket is there."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        # A terminal that goes away sends more than one, and none of them is in a hurry.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            loop.add_signal_handler(signal.SIGHUP, self.stop)
        try:
            self.workers.start()
            for server in self.servers:
                await server.start()
            self._keep_positions()
            await self._start_control()
            # Said once all is well: an error then stands alone.
            for server in self.servers:
                log.info("%s", _where(server))
            self._advise()
            listening()
            await self._tick()
        finally:
            await self._close()

    def stop(self) -> None:
        """Lets run() end; more than once does no harm."""
        self._stop.set()

    def summary(self) -> dict[str, Any]:
        """What a program has to know to use us; printed by --json once we listen."""
        return {
            "event": "listening",
            "kind": self.kind,
            "pid": os.getpid(),
            "sockets": [server.status()["socket"] for server in self.servers],
            "control": self._control_text(),
        }

    # Answers to the control socket ---------------------------------------------------

    def handlers(self) -> dict[str, control.Handler]:
        """What the control socket can be asked."""
        answers: dict[str, control.Handler] = {
            "status": self._status,
            "stats": self._stats,
            "workers": self._workers,
        }
        if self.switch is not None:
            answers |= {"fdb": self._fdb, "fdb_flush": self._fdb_flush}
        if self.kind == "blk":
            answers |= {"limit": self._limit, "resize": self._resize}
        return answers

    def _status(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        _take(arguments)
        from vhostpy.cli import version

        status: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "pid": os.getpid(),
            "version": version(),
            "uptime_s": round(time.monotonic() - self._started_s, 1),
            "memory_bytes": resident_bytes(),
            "control": self._control_text(),
            "workers": self._workers({}),
            "sockets": [{"name": server.device.name, **server.status()} for server in self.servers],
        }
        if self.switch is not None:
            status["switch"] = self.switch.status()
        return status

    def _stats(self, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        (wanted,) = _take(arguments, "port")
        servers = self.servers if wanted is None else [self._server(wanted)]
        return [
            {
                "port": server.device.name,
                "kind": server.device.kind,
                "socket": server.path if server.path is not None else f"fd {server.fd}",
                "queues": server.device.status()["queues"],
                **_latency(server.device),
            }
            for server in servers
        ]

    def _workers(self, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        _take(arguments)
        return self._loads or self.workers.loads()

    def _limit(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Sets what is given (0: no limit), and says what holds then."""
        wanted, iops, bandwidth, burst_us = _take(
            arguments, "port", "iops", "bandwidth", "burst_us"
        )
        disk: Any = self._only_server(wanted).device
        settings = disk.limits
        if iops is not None:
            settings = replace(settings, requests_per_s=_number("iops", iops) or None)
        if bandwidth is not None:
            settings = replace(settings, bytes_per_s=_number("bandwidth", bandwidth) or None)
        if burst_us is not None:
            settings = replace(settings, burst_s=_number("burst_us", burst_us) / 1e6)
        if settings != disk.limits:
            disk.set_limits(settings)
        return {"port": disk.name, **asdict(settings)}

    def _fdb(self, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        (wanted,) = _take(arguments, "port")
        assert self.switch is not None
        names = {index: str(port.name) for index, port in self.switch.attached.items()}
        chosen = None if wanted is None else self._port_index(wanted)
        return [
            {"vlan": vlan, "mac": mac.hex(":"), "port": names.get(port, f"#{port}"), "age_s": age_s}
            for vlan, mac, port, age_s in sorted(self.switch.fdb.entries())
            if chosen is None or port == chosen
        ]

    def _fdb_flush(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        (wanted,) = _take(arguments, "port")
        assert self.switch is not None
        port = None if wanted is None else self._port_index(wanted)
        return {"flushed": self.switch.fdb.flush(port)}

    def _resize(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Looks whether a disk has grown; its guest is told then."""
        (wanted,) = _take(arguments, "port")
        server = self._only_server(wanted)
        disk: Any = server.device
        before = disk.storage.size_bytes
        actual = _bounded(disk.storage.actual_bytes)
        if actual is None:
            raise ConfigError(f"{disk.storage.name} does not answer", "see whether it hangs")
        if actual < before:
            raise ConfigError(
                f"{disk.storage.name} has {actual} bytes, and the guest knows of {before}",
                "disks only grow; give it back what it had, or I/O past its end fails",
            )
        grown = disk.grow(actual)
        return {
            "port": disk.name,
            "size_before_bytes": before,
            "size_bytes": disk.storage.size_bytes,
            "guest_told": grown and server.tell_config_changed(),
        }

    def _only_server(self, wanted: str | None) -> "Server":
        if wanted is not None:
            return self._server(wanted)
        if len(self.servers) != 1:
            raise ConfigError(f"{self.name} has {len(self.servers)} disks", "name one with --port")
        return self.servers[0]

    def _server(self, wanted: str) -> "Server":
        for server in self.servers:
            if wanted in (server.device.name, server.path):
                return server
        raise self._no_port(wanted)

    def _port_index(self, wanted: str) -> int:
        assert self.switch is not None
        name = next((s.device.name for s in self.servers if s.path == wanted), wanted)
        for index, port in self.switch.attached.items():
            if str(port.name) == name:
                return int(index)
        raise self._no_port(wanted)

    def _no_port(self, wanted: str) -> ConfigError:
        names = ", ".join(server.device.name for server in self.servers[:16])
        what = "port" if self.switch is not None else "disk"
        return ConfigError(f"{self.name} has no {what} {wanted[:200]!r}", f"one of: {names}")

    # Private -------------------------------------------------------------------------

    def _keep_positions(self) -> None:
        """Of packed rings, whose memory does not tell them, for our next life."""
        owners = {_identity(s): s for s in self.servers if s.device.lossy}
        if not owners:
            return
        from vhostpy.ring.positions import Keeper

        first = next(iter(owners))
        name = f"{control.file_name(self.name)}-{zlib.crc32(os.fsencode(first)):08x}.rings"
        limits = {name: server.device.queue_limit for name, server in owners.items()}
        try:
            self._keeper = keeper = Keeper(str(control.writable_directory()), name, limits)
        except ConfigError as error:
            log.warning("guests with packed rings will not outlive a restart of ours: %s", error)
            return
        for owner, server in owners.items():
            server.device.positions = keeper.owners[owner]

    async def _start_control(self) -> None:
        """A default place that fails is no reason not to serve; one that was asked for is."""
        if self._control_path is not None:
            path = Path(self._control_path)
        else:
            try:
                path = control.default_path(self.name)
            except ConfigError as error:
                log.warning("no control socket, 'vhostpy status' will not see this: %s", error)
                return
        server = control.ControlServer(path, self.handlers())
        try:
            await server.start()
        except ConfigError as error:
            if self._control_path is not None:
                raise
            log.warning("no control socket, 'vhostpy status' will not see this: %s", error)
            return
        self.control = server
        if self._control_path is not None:
            self._link = control.advertise(self.name, path)
        self.name = (self._link or path).stem
        log.debug("control socket: %s", path)

    def _advise(self) -> None:
        for server in self.servers:
            share, queues = server.account.fds_share, server.device.queue_limit
            if share < FDS_PER_QUEUE * queues:
                log.warning(
                    "each of %d sockets may have %d file descriptors, and a guest that uses all "
                    "%d queues needs %d\n"
                    "  next: raise the limit of open files (ulimit -Hn), or give fewer --queues",
                    len(self.servers),
                    share,
                    queues,
                    FDS_PER_QUEUE * queues,
                )
                break
        if self.switch is None or len(self.servers) != 1:
            return
        path = self.servers[0].path or "/tmp/vu0"
        log.info(
            "one port has nobody to talk to; for a second one:\n"
            "  vhostpy net --socket %s --socket %s",
            path,
            _next_path(path),
        )

    def _control_text(self) -> str | None:
        return str(self.control.path) if self.control is not None else None

    async def _tick(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._stop.wait()
            self._loads = self.workers.loads()
            if self.switch is not None:
                self.switch.tick()
            for handler in log.handlers:
                if isinstance(handler, Talk):
                    handler.tell_left_out()

    def _signalled(self) -> None:
        now_s = time.monotonic()
        if self._signalled_s is None:
            self._signalled_s = now_s
            self.stop()
        elif now_s - self._signalled_s > AGAIN_S:
            # The second one: whoever sent it does not want to wait for anything.
            os._exit(1)

    async def _close(self) -> None:
        """Sessions first, as they need the workers to stand still; all of them at once."""
        try:
            async with asyncio.timeout(CLOSE_S):
                if self.control is not None:
                    await self.control.close()
                ended = await asyncio.gather(
                    *(server.close() for server in self.servers), return_exceptions=True
                )
            for error in ended:
                if isinstance(error, BaseException):
                    log.error("while ending: %s", error, exc_info=error)
        except TimeoutError:
            log.error("sessions did not end within %g s", CLOSE_S)
        finally:
            if self._link is not None:
                self._link.unlink(missing_ok=True)
            self.workers.stop()
            for storage in self.storages:
                storage.close()
            if self._keeper is not None:
                self._keeper.close()


# The process -------------------------------------------------------------------------


def log_to_stderr(program: str, level: str) -> None:
    """Talk goes to standard error; standard output is for data."""
    handler = Talk(sys.stderr, program)
    log.addHandler(handler)
    log.setLevel(level.upper())
    log.propagate = False
    # What asyncio has to say is a defect of ours; it must not be lost.
    asyncio_log = logging.getLogger("asyncio")
    asyncio_log.addHandler(handler)
    asyncio_log.setLevel(logging.WARNING)


def raise_fd_limit() -> None:
    """A queue needs a few fds, and 1,024 are too few for many guests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def resident_bytes() -> int:
    """Resident memory without what is shared, as guest memory is."""
    size = 0
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith((b"RssAnon:", b"RssFile:")):
                size += int(line.split()[1]) << 10
    return size


def _identity(server: "Server") -> str:
    """What a server is in another life too."""
    return os.path.abspath(server.path) if server.path is not None else f"fd {server.fd}"


def _where(server: "Server") -> str:
    name = server.device.name
    if server.fd is not None:
        return f"{name}: serving fd {server.fd}"
    verb = "connecting to" if server.client else "listening on"
    return f"{name}: {verb} {server.path}"


def _take(arguments: Mapping[str, Any], *names: str) -> list[str | None]:
    """The named arguments: text, or None where one is not given."""
    for name, value in arguments.items():
        if name not in names:
            raise ConfigError(f"unknown argument {name[:100]!r}", f"known: {', '.join(names)}")
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{name!r} is text, not {type(value).__name__}")
    return [arguments.get(name) for name in names]


def _bounded(ask: Callable[[], int]) -> int | None:
    """What `ask` returns; None where that takes too long: a file system may hang."""
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return answers[0] if answers else None


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ConfigError(f"{name!r} is a whole number, not {text[:100]!r}")
    return int(text)


def _latency(device: Any) -> dict[str, Any]:
    """Of devices that know how long their requests take."""
    return {"latency": device.latency()} if hasattr(device, "latency") else {}


def _next_path(path: str) -> str:
    """/tmp/vu0 -> /tmp/vu1."""
    stem, suffix = (path.removesuffix(".sock"), ".sock" if path.endswith(".sock") else "")
    head = stem.rstrip("0123456789")
    number = stem[len(head) :]
    return f"{head}{int(number) + 1 if number else 2}{suffix}"
