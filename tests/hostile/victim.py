"""The process under attack: ports of one switch and disks, each on a real socket.

`python -m tests.hostile.victim DIRECTORY PORTS` is the process; `Victim` starts it and
looks at it from outside: its counters, its log, what it holds open.
"""

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vhostpy.backends.blk.device import Disk
from vhostpy.backends.net.device import NetDevice
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.site.control import Client
from vhostpy.vswitch.switch import Switch

DISK_SIZE = 4 << 20
DEADLINE_S = 20


def eventually(condition: Callable[[], Any], what: str = "it", deadline_s: float = DEADLINE_S):
    """Waits for it, and returns what it was."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} never came about"
        time.sleep(0.002)
    return value


def serve(directory: Path, ports: int) -> None:
    """Until SIGTERM: ports good0, good1 and canary, disk gooddisk, and their bad neighbours."""
    from vhostpy.runtime.pool import Workers
    from vhostpy.server import listen
    from vhostpy.server.listen import Server
    from vhostpy.site.site import App, log_to_stderr, raise_fd_limit
    from vhostpy.system import lines

    # Every session's error is looked for.
    listen.REPEATS = listen.CAUSES_MAX = lines.BURST = 1 << 30
    gc.disable()  # what only a collection would free, counts as lost
    raise_fd_limit()
    log_to_stderr("victim", "info")
    workers = Workers(1)
    switch = Switch(workers)
    names = ["good0", "good1", "canary", *(f"bad{i}" for i in range(ports))]
    devices: list[Any] = [NetDevice(name, switch, pairs=2) for name in names]
    for name in ("gooddisk", "badfile"):
        (directory / f"{name}.img").write_bytes(bytes(DISK_SIZE))
    storages = {
        "gooddisk": FileStorage(str(directory / "gooddisk.img")),
        "badfile": FileStorage(str(directory / "badfile.img")),
        "badram": RamStorage(DISK_SIZE),
    }
    devices += [Disk(name, storage, workers, queues=4) for name, storage in storages.items()]

    async def run() -> None:
        app = App(
            "net",
            workers=workers,
            servers=[Server(device, path=str(directory / device.name)) for device in devices],
            switch=switch,
            control_path=str(directory / "control"),
            storages=list(storages.values()),
        )
        await app.run(lambda: print("listening", flush=True))

    asyncio.run(run())


class Victim:
    """That process, from outside."""

    def __init__(self, directory: Path, ports: int = 3) -> None:
        self.directory = directory
        self.log_path = directory / "log"
        environment = os.environ | {"XDG_RUNTIME_DIR": str(directory)}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.victim", str(directory), str(ports)],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"listening\n", self.log()
        self.client = Client(directory / "control")

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def log(self) -> str:
        return self.log_path.read_text()

    def ends(self) -> list[str]:
        """All errors that ended a session so far."""
        return [line for line in self.log().splitlines() if "session ended" in line]

    def counters(self, name: str, index: int = 0) -> Counter:
        """Of a port's queue pair or a disk's queue, flat."""
        (port,) = self.client.ask("stats", port=name)
        flat: Counter = Counter()
        for queue in port["queues"]:
            if queue["index"] == index:
                for key, value in queue.items():
                    if isinstance(value, dict):
                        flat.update({f"{key}.{inner}": n for inner, n in value.items()})
                    elif key not in ("index", "worker"):
                        flat[key] = value
        return flat

    def status(self, name: str) -> dict[str, Any]:
        sockets = self.client.ask("status")["sockets"]
        return next(socket for socket in sockets if socket["name"] == name)

    def is_quiet(self) -> bool:
        """Nobody but the innocent is connected."""
        sockets = self.client.ask("status")["sockets"]
        return not any(s["connected"] for s in sockets if s["name"].startswith("bad"))

    def footprint(self) -> dict[str, int]:
        """What it holds while only the innocent are there."""
        eventually(self.is_quiet, "the end of all attackers' sessions")
        process = Path(f"/proc/{self.process.pid}")
        maps = process.joinpath("maps").read_text()
        names = []
        for task in process.joinpath("task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                names.append(task.joinpath("comm").read_text())
        # The worker for those who block others stays, with its three fds.
        apart = names.count("vhostpy-w1\n")
        return {
            "fds": len(os.listdir(process / "fd")) - 3 * apart,
            "threads": len(names) - apart,
            "guest mappings": maps.count("/memfd:") + maps.count("(deleted)"),
        }

    def close(self) -> None:
        """Ends it; it must still know how."""
        self.client._socket.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(DEADLINE_S) == 0, self.log()
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


@contextlib.contextmanager
def victim(directory: Path, ports: int = 3) -> Iterator[Victim]:
    """A victim for the block's time; it must have lived through it without a traceback."""
    target = Victim(directory, ports)
    try:
        yield target
        assert target.process.poll() is None, target.log()
    finally:
        target.close()
    assert "Traceback" not in target.log(), target.log()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
