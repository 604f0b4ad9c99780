"""QEMU's command lines, and QEMU as a process of ours.

`network_arguments`, `disk_arguments` and `memory_arguments` give the very lines that README
tells people to paste. Nothing here knows what runs inside the guest (guest.py does).
"""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import QMPError, legacy

from tests.peers import peers
from tests.peers.image import guest_image

STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Nic:
    """A virtio-net device whose back-end listens at `socket`."""

    socket: Path
    mac: str
    pairs: int = 1
    host_mtu: int | None = None
    reconnect: bool = False
    packed: bool = False
    in_order: bool = False


@dataclass(frozen=True, slots=True)
class Drive:
    """A virtio-blk device whose back-end listens at `socket`."""

    socket: Path
    queues: int = 1
    reconnect: bool = False
    packed: bool = False
    inflight_migration: bool = False  # QEMU 11: requests under way move with the guest


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU to start guests with.

    QEMU 7.2 crashes under TCG once a driver uses a vhost-user-net device with MSI-X (NULL
    vector_irqfd, QEMU issue 2334): such a one gets INTx by `vectors=0`.
    """

    name: str
    program: peers.Program
    modern: bool  # QEMU 9.2 or newer: `reconnect-ms`
    root: Path | None = None  # where it was unpacked

    @property
    def library_arguments(self) -> list[str]:
        share = f"{self.root}/usr/share"
        return ["-L", f"{share}/qemu", "-L", f"{share}/seabios"] if self.root else []

    def reconnect(self) -> str:
        return ",reconnect-ms=100" if self.modern else ",reconnect=1"


def qemu10() -> Qemu:
    """QEMU 10 of Debian 13, in .cache/."""
    return Qemu("qemu10", peers.trixie("qemu-system-x86_64"), modern=True, root=peers.TRIXIE)


def qemu11() -> Qemu:
    """QEMU 11 of Debian 13's backports, in .cache/."""
    program = peers.backports("qemu-system-x86_64")
    return Qemu("qemu11", program, modern=True, root=peers.BACKPORTS)


def qemu7() -> Qemu:
    """The system's QEMU: 7.2 on Debian 12."""
    return Qemu("qemu7", peers.system("qemu-system-x86_64"), modern=False)


def memory_arguments(size_mib: int) -> list[str]:
    """Guest memory that a back-end can map: without share=on there is no vhost-user."""
    return [
        "-m", f"{size_mib}M",
        "-object", f"memory-backend-memfd,id=mem,size={size_mib}M,share=on",
        "-machine", "q35,memory-backend=mem",
    ]


def network_arguments(qemu: Qemu, index: int, nic: Nic, msix: bool) -> list[str]:
    name = f"net{index}"
    device = f"virtio-net-pci,netdev={name},mac={nic.mac}"
    if nic.pairs > 1:
        device += ",mq=on"
    if not msix:
        device += ",vectors=0"
    if nic.packed:
        device += ",packed=on"
    if nic.in_order:
        device += ",in_order=on"
    if nic.host_mtu:
        device += f",host_mtu={nic.host_mtu}"
    return [
        "-chardev", f"socket,id={name},path={nic.socket}" + qemu.reconnect() * nic.reconnect,
        "-netdev", f"vhost-user,id={name},chardev={name},queues={nic.pairs}",
        "-device", device,
    ]


def disk_arguments(qemu: Qemu, index: int, drive: Drive) -> list[str]:
    name = f"disk{index}"
    return [
        "-chardev", f"socket,id={name},path={drive.socket}" + qemu.reconnect() * drive.reconnect,
        "-device", f"vhost-user-blk-pci,chardev={name},num-queues={drive.queues}"
        + ",packed=on" * drive.packed + ",inflight-migration=on" * drive.inflight_migration,
    ]


def guest_arguments(
    qemu: Qemu,
    *,
    nics: list[Nic],
    drives: list[Drive],
    memory_mib: int,
    cpus: int,
    kvm: bool,
    tools: Path | None = None,
) -> list[str]:
    """A guest with all its devices, without how we talk to it; `tools`: a disk of its own."""
    image = guest_image()
    arguments = [*qemu.program.argv, *qemu.library_arguments, "-nodefaults", "-no-user-config"]
    arguments += ["-display", "none", "-smp", str(cpus), *memory_arguments(memory_mib)]
    # All vCPUs on one thread: with one each, TCG now and then ends itself at boot
    # (iotlb_to_section) or loses a vCPU's timer for good (RCU stalls). The price: vCPUs that
    # compute at the same time share a core.
    arguments += ["-accel", "kvm", "-cpu", "host"] if kvm else ["-accel", "tcg,thread=single"]
    msix = kvm or qemu.modern
    for index, nic in enumerate(nics):
        arguments += network_arguments(qemu, index, nic, msix)
    for index, drive in enumerate(drives):
        arguments += disk_arguments(qemu, index, drive)
    if tools is not None:
        arguments += ["-drive", f"file={tools},format=raw,readonly=on,if=none,id=tools",
                      "-device", "virtio-blk-pci,drive=tools"]
    # No PXE ROM: it costs start-up time and nobody boots from it.
    arguments += ["-global", "virtio-net-pci.romfile="]
    arguments += ["-kernel", str(image.kernel), "-initrd", str(image.initrd)]
    arguments += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on"]
    return arguments


class QemuDied(Exception):
    """QEMU ended by itself; the text has its last words."""


class QemuProcess:
    """A running QEMU: its process, QMP, and two serial ports (console.log and `agent`).

    We listen and QEMU connects, so nothing is polled for and no byte is lost.
    """

    def __init__(
        self, name: str, directory: Path, arguments: list[str], env: dict[str, str]
    ) -> None:
        self.name = name
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.console = directory / "console.log"
        self._errors = directory / "qemu.log"
        listeners = {which: self._listen(directory / which) for which in ("agent", "qmp")}
        arguments = [
            *arguments,
            "-chardev", f"file,id=console,path={self.console}",
            "-serial", "chardev:console",
            "-chardev", f"socket,id=agent,path={directory}/agent",
            "-serial", "chardev:agent",
            "-chardev", f"socket,id=qmp,path={directory}/qmp",
            "-mon", "chardev=qmp,mode=control",
        ]
        self.arguments = arguments
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=env,
                start_new_session=True,  # a Ctrl-C is ours to handle
            )
        self.agent: socket.socket | None = None
        self._qmp: legacy.QEMUMonitorProtocol | None = None
        try:
            self.agent = self._accept(listeners["agent"], 20)
            self._qmp = legacy.QEMUMonitorProtocol(self._accept(listeners["qmp"], 20))
            self._connect_qmp(self._qmp)
        except BaseException:
            self.kill()
            raise
        finally:
            for listener in listeners.values():
                listener.close()

    @staticmethod
    def _listen(path: Path) -> socket.socket:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        return listener

    def _accept(self, listener: socket.socket, timeout_s: float) -> socket.socket:
        deadline = time.monotonic() + timeout_s
        listener.settimeout(0.1)
        while True:
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: QEMU did not connect within {timeout_s:.0f} s")

    def _connect_qmp(self, monitor: legacy.QEMUMonitorProtocol) -> None:
        try:
            monitor.connect()
        except QMPError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            self.check()
            raise
        monitor.settimeout(30)

    def check(self) -> None:
        """Raises QemuDied where QEMU has ended."""
        status = self.process.poll()
        if status is not None:
            raise QemuDied(f"{self.name}: QEMU ended with status {status}\n{self.last_words()}")

    def last_words(self) -> str:
        texts = []
        for path in (self._errors, self.console):
            if path.exists():
                text = path.read_bytes()[-1500:].decode(errors="replace").strip()
                if text:
                    texts.append(f"--- {path.name}\n{text}")
        return "\n".join(texts)

    def qmp(self, command: str, **arguments: object) -> Any:
        assert self._qmp is not None
        return self._qmp.cmd(command, **arguments)

    def wait_event(
        self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float
    ) -> dict[str, Any]:
        """The first QMP event that `wanted` accepts; those before it are dropped."""
        assert self._qmp is not None
        deadline = time.monotonic() + timeout_s
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"{self.name}: no such event within {timeout_s:.0f} s")
            event = self._qmp.pull_event(wait=remaining)
            if event is not None and wanted(event):
                return event

    def power_cut(self) -> None:
        """As if the machine's plug were pulled."""
        self.process.kill()
        self.process.wait()
        self.kill()

    def kill(self) -> None:
        """Ends QEMU at once; harmless where it has ended."""
        if self._qmp is not None:
            with contextlib.suppress(Exception):
                self._qmp.close()
            self._qmp = None
        if self.agent is not None:
            self.agent.close()
            self.agent = None
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def kvm_works() -> bool:
    """Whether a guest really runs under KVM here; asked once a boot of this machine.

    On some machines /dev/kvm opens, and QEMU dies then with 'KVM internal error'.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    cached = peers.CACHE / "kvm-probe.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        answer = json.loads(cached.read_text())
        if answer["boot"] == boot:
            return bool(answer["works"])
    from tests.peers.guest import probe_kvm

    works = probe_kvm()
    peers.CACHE.mkdir(exist_ok=True)
    cached.write_text(json.dumps({"boot": boot, "works": works}))
    return works
