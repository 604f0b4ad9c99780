"""A Linux guest that Python drives: commands in, status and output back.

    with Guest("a", directory, nics=[Nic(socket, mac)]) as guest:
        result = guest.run("ping -c 3 10.0.0.2", timeout_s=30)
        assert result.status == 0, result.output
"""

import base64
import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.peers.qemu import (
    Drive,
    Nic,
    Qemu,
    QemuDied,
    QemuProcess,
    guest_arguments,
    kvm_works,
    qemu10,
)

BOOT_S = 60.0
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Result:
    status: int
    output: str


class GuestFailed(Exception):
    """A command failed, or the guest did not answer in time; the text says what was seen."""


class Guest:
    """One guest. `start()` returns once QEMU runs, `wait_ready()` once the guest answers."""

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        qemu: Qemu | None = None,
        nics: list[Nic] | None = None,
        drives: list[Drive] | None = None,
        memory_mib: int = 256,
        cpus: int = 1,
        kvm: bool | None = None,
        tools: Path | None = None,
    ) -> None:
        """`tools`: see tools.py; its disk comes behind all others."""
        self.name = name
        self.directory = directory
        self.nics = nics or []
        self.tools_name = f"vd{'abcdefgh'[len(drives or [])]}"
        qemu = qemu or qemu10()
        self._env = qemu.program.env()
        self.arguments = guest_arguments(
            qemu, nics=self.nics, drives=drives or [], memory_mib=memory_mib, cpus=cpus,
            kvm=kvm_works() if kvm is None else kvm, tools=tools,
        )
        self.qemu: QemuProcess | None = None
        self._pending = bytearray()

    # --- life ---------------------------------------------------------------------------

    def start(self, *, incoming: bool = False) -> None:
        """Starts QEMU; `incoming`: it waits to receive a migrated guest."""
        arguments = self.arguments + (["-incoming", "defer"] if incoming else [])
        self._pending.clear()
        self.qemu = QemuProcess(self.name, self.directory, arguments, self._env)

    def wait_ready(self, timeout_s: float = BOOT_S) -> None:
        """Until the guest's agent says that the guest is up."""
        self._wait_line("READY", time.monotonic() + timeout_s)

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.qemu is not None:
            self.qemu.kill()

    @property
    def process(self) -> QemuProcess:
        assert self.qemu is not None, f"{self.name} was not started"
        return self.qemu

    # --- commands -----------------------------------------------------------------------

    def run(self, command: str, timeout_s: float = 20.0) -> Result:
        """Runs a shell command in the guest: its status, and stdout and stderr together."""
        number = self._send(command)
        deadline = time.monotonic() + timeout_s
        status, size = self._wait_line(f"RESULT {number} ", deadline, command).split()[2:4]
        while len(self._pending) < int(size):
            self._receive(deadline, command)
        output = bytes(self._pending[:int(size)])
        del self._pending[:int(size)]
        return Result(int(status), output.decode(errors="replace"))

    def check(self, command: str, timeout_s: float = 20.0) -> str:
        """Runs a command that must succeed; its output without the last newline."""
        result = self.run(command, timeout_s)
        if result.status != 0:
            raise GuestFailed(
                f"{self.name}: `{command}` ended with status {result.status}:\n{result.output}")
        return result.output.rstrip("\n")

    def background(self, command: str) -> "Job":
        """Starts a command beside those that `run` runs."""
        job = Job(self, f"/tmp/.job{next(_numbers)}", command)
        # The subshell keeps its status in a pipe, so whoever waits sleeps in the guest.
        self.check(
            f"mkfifo {job.path}; cat > {job.path}.sh <<'JOB'\n{command}\nJOB\n"
            f"(sh {job.path}.sh < /dev/null > {job.path}.out 2>&1; status=$?; "
            f"touch {job.path}.ended; echo $status > {job.path}) "
            "< /dev/null > /dev/null 2>&1 &")
        return job

    def reboot(self, timeout_s: float = BOOT_S) -> None:
        """Reboots from inside, as an operator does, and waits until the guest is up again."""
        self._send("sync; reboot -f")
        self.wait_ready(timeout_s)

    def reset(self, timeout_s: float = BOOT_S) -> None:
        """The reset button: the guest gets no word to say."""
        self.process.qmp("system_reset")
        self.wait_ready(timeout_s)

    # --- network ------------------------------------------------------------------------

    def set_address(self, address: str, interface: str = "eth0") -> None:
        """Brings an interface up with `address`, e.g. "10.0.0.1/24", and no other."""
        self.check(f"ip addr flush dev {interface} && ip addr add {address} dev {interface} && "
                   f"ip link set {interface} up")

    # --- migration ----------------------------------------------------------------------

    def migrate_to(self, other: "Guest", timeout_s: float = 60.0) -> None:
        """Moves this running guest into `other`'s QEMU, which was started as `incoming`.

        Both share this guest's name and jobs afterwards; only `other` answers.
        """
        channel = f"unix:{other.directory}/migration"
        for end in (self, other):
            capability = [{"capability": "events", "state": True}]
            end.process.qmp("migrate-set-capabilities", capabilities=capability)
        other.process.qmp("migrate-incoming", uri=channel)
        self.process.qmp("migrate", uri=channel)
        event = self.process.wait_event(
            lambda event: event["event"] == "MIGRATION"
            and event["data"]["status"] in ("completed", "failed", "cancelled"),
            timeout_s,
        )
        if event["data"]["status"] != "completed":
            reason = self.process.qmp("query-migrate").get("error-desc", "no reason given")
            raise GuestFailed(f"{self.name}: migration {event['data']['status']}: {reason}\n"
                              f"{self.process.last_words()}\n{other.process.last_words()}")
        other.process.wait_event(lambda event: event["event"] == "RESUME", timeout_s)

    def migration(self) -> dict[str, int]:
        """QEMU's figures of the last migration out of here, e.g. `downtime` in ms."""
        return dict(self.process.qmp("query-migrate"))

    # --- the channel --------------------------------------------------------------------

    def _send(self, command: str) -> int:
        number = next(_numbers)
        line = f"{number} {base64.b64encode(command.encode()).decode()}\n"
        assert self.process.agent is not None
        self.process.agent.settimeout(20)
        self.process.agent.sendall(line.encode())
        return number

    def _receive(self, deadline: float, doing: str) -> None:
        agent = self.process.agent
        assert agent is not None
        remaining = deadline - time.monotonic()
        agent.settimeout(max(remaining, 0.001))
        try:
            data = agent.recv(65536) if remaining > 0 else None
        except TimeoutError:
            data = None
        except ConnectionError:
            data = b""
        if data is None:
            seen = bytes(self._pending[-500:]).decode(errors="replace")
            self.process.check()
            raise GuestFailed(f"{self.name}: no answer in time to `{doing}`; so far {seen!r}\n"
                              f"{self.process.last_words()}")
        if not data:
            self.process.process.wait(5)
            self.process.check()
        self._pending += data

    def _wait_line(self, start: str, deadline: float, doing: str = "boot") -> str:
        """The next line that starts so; others (late answers to given-up commands) are dropped."""
        while True:
            while (end := self._pending.find(b"\n")) >= 0:
                line = bytes(self._pending[:end]).decode(errors="replace")
                del self._pending[:end + 1]
                if line.startswith(start):
                    return line
                if line == "READY":
                    raise GuestFailed(f"{self.name}: the guest restarted during `{doing}`\n"
                                      f"{self.process.last_words()}")
            self._receive(deadline, doing)


@dataclass(frozen=True, slots=True)
class Job:
    """A command under way in a guest."""

    guest: Guest
    path: str
    command: str

    def ended(self) -> bool:
        """Without waiting for it."""
        return self.guest.run(f"[ -e {self.path}.ended ]").status == 0

    def wait(self, timeout_s: float = 60.0, *, on: Guest | None = None) -> Result:
        """Until it ends; `on`: where its guest was migrated to."""
        guest = on or self.guest
        return guest.run(
            f"read status < {self.path}; cat {self.path}.out; exit $status", timeout_s)


def boot(*guests: Guest, timeout_s: float = BOOT_S) -> None:
    """Boots all together: on two cores that takes little longer than one."""
    for guest in guests:
        guest.start()
    for guest in guests:
        guest.wait_ready(timeout_s)


def probe_kvm() -> bool:
    """Boots a guest under KVM and asks it something."""
    with tempfile.TemporaryDirectory(prefix="vhostpy-kvm-") as directory:
        guest = Guest("kvm-probe", Path(directory), kvm=True)
        try:
            guest.start()
            guest.wait_ready(timeout_s=15)
            return guest.check("echo works") == "works"
        except (QemuDied, GuestFailed, TimeoutError, OSError):
            return False
        finally:
            guest.close()
