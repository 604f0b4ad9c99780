"""A real NBD server for tests: nbdkit, to be stopped, killed, started again."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from tests.backends.guest import eventually
from tests.ports import free_port


class Nbdkit:
    """`words`: flags, plugin and its parameters, as nbdkit's command line takes them."""

    def __init__(self, directory: Path, *words: str, tcp: bool = False) -> None:
        program = shutil.which("nbdkit", path=os.environ.get("PATH", "") + ":/usr/sbin")
        assert program is not None, "nbdkit is missing: run tests/peers/install.sh test"
        directory.mkdir(parents=True, exist_ok=True)
        self.socket = directory / "nbd"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        where = ["--unix", str(self.socket)]
        if tcp:
            port = free_port()
            self.uri = f"nbd://127.0.0.1:{port}"
            where = ["--ipaddr", "127.0.0.1", "--port", str(port)]
        self._pid_file = directory / "pid"
        self._argv = [
            program, "--foreground", "--exit-with-parent", *where,
            "--pidfile", str(self._pid_file), *words,
        ]  # fmt: skip
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        for path in (self.socket, self._pid_file):
            path.unlink(missing_ok=True)
        process = subprocess.Popen(self._argv, stderr=subprocess.DEVNULL)
        # The last thing that it does before it serves.
        eventually(self._pid_file.exists, "nbdkit")
        return process

    def pause(self) -> None:
        """It answers nothing from now on, and keeps its connections."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.process = self._start()

    def __enter__(self) -> "Nbdkit":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.kill()
