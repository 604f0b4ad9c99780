"""`vhostpy net` and `vhostpy blk` as processes under test, and what they hold of the system."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.peers import peers

START_S = 40.0  # longer than it waits for the lock on an image
STOP_S = 10.0

ANONYMOUS_SLACK_KIB = 2048  # Python's heap breathes
# Stacks and arenas of threads that have ended, which the C library keeps; a leak has one each time.
MAPPINGS_SLACK = 6


@dataclass(frozen=True, slots=True)
class Footprint:
    """What leaks would show in. RSS counts our own memory only, not mapped guest memory."""

    fds: int
    threads: int
    mappings: int
    anonymous_kib: int


class Backend:
    """A running `vhostpy VERB`; returns from the constructor once it listens."""

    def __init__(self, verb: str, *arguments: str | Path, directory: Path) -> None:
        self.control = directory / f"{verb}-control.sock"
        self._log = directory / f"{verb}.log"
        program = peers.vhostpy()
        self.arguments = [*program.argv, verb, *map(str, arguments)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.arguments, "--control", str(self.control), "--json"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_listening()
        except BaseException:
            self.kill()
            raise

    def _wait_listening(self) -> None:
        """It prints one line of JSON once every socket listens."""
        assert self.process.stdout is not None
        line = b""
        deadline = time.monotonic() + START_S
        while not line.endswith(b"\n"):
            remaining = max(deadline - time.monotonic(), 0)
            if not select.select([self.process.stdout], [], [], remaining)[0]:
                raise TimeoutError(f"vhostpy did not listen within {START_S:.0f} s\n{self.log()}")
            data = os.read(self.process.stdout.fileno(), 4096)
            if not data:
                status = self.process.wait(STOP_S)
                raise RuntimeError(f"vhostpy ended with status {status}\n{self.log()}")
            line += data

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def status(self) -> Any:
        """What `vhostpy status --json` says of this process."""
        return json.loads(self.ask("status", "--json"))

    def ask(self, verb: str, *arguments: str) -> str:
        program = peers.vhostpy()
        done = subprocess.run(
            [*program.argv, verb, *arguments, "--control", str(self.control)],
            capture_output=True, text=True, timeout=10, check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"vhostpy {verb} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def footprint(self) -> Footprint:
        process = Path("/proc") / str(self.process.pid)
        rollup = (process / "smaps_rollup").read_text()
        anonymous = re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.MULTILINE)
        assert anonymous is not None
        return Footprint(
            fds=len(list((process / "fd").iterdir())),
            threads=len(list((process / "task").iterdir())),
            mappings=(process / "maps").read_text().count("\n"),
            anonymous_kib=int(anonymous[1]),
        )

    def check(self) -> None:
        """Raises where the process has ended or has complained of itself."""
        status = self.process.poll()
        if status is not None:
            raise RuntimeError(f"vhostpy ended with status {status}\n{self.log()}")
        if "Traceback" in self.log():
            raise RuntimeError(f"vhostpy printed a traceback\n{self.log()}")

    def stop(self) -> int:
        """SIGTERM and its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        finally:
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None or self.process.poll() is not None:
            self.kill()
            return
        self.check()
        status = self.stop()
        assert status == 0, f"SIGTERM: vhostpy ended with status {status}\n{self.log()}"


def assert_flat(before: Footprint, after: Footprint) -> None:
    assert (after.fds, after.threads) == (before.fds, before.threads)
    assert after.mappings <= before.mappings + MAPPINGS_SLACK
    assert after.anonymous_kib <= before.anonymous_kib + ANONYMOUS_SLACK_KIB
