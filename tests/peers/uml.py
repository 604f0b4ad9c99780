"""User-mode Linux as a guest: a kernel that speaks vhost-user itself, with this machine's files.

QEMU shows its guests only the features of a disk that it knows, and SECURE_ERASE is none of
them. This kernel shows its driver all that a back-end offers. Its root is this machine's, read
only: what runs there runs in the guest as it is.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from tests.peers import peers
from vhostpy.fds import OwnedFd, close_all, receive, send
from vhostpy.layout import first_base
from vhostpy.payloads import U64, MemoryRegion, VringState
from vhostpy.protocol import FrontEndRequest, Header

VIRTIO_BLK = 2  # virtio 1.3, "Device Types"
MEMORY = "256M"
ENDED = "guest's command ended with status "

INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/run PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
insmod {module}
cd {project}
{command} < /dev/null 2>&1
echo "{ended}$?"
echo o > /proc/sysrq-trigger
exec sleep 60
"""


class UmlFailed(Exception):
    """The guest did not come as far as to say how its command ended."""


def run_in_uml(
    command: str, directory: Path, disks: Sequence[Path], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in a guest whose /dev/vda, ... are the back-ends at `disks`."""
    program = Path(peers.system("linux.uml").argv[0])
    (modules,) = (program.parents[1] / "lib/uml/modules").iterdir()
    module = modules / "kernel/drivers/block/virtio_blk.ko"
    init = directory / "init"
    init.write_text(INIT.format(module=module, project=peers.PROJECT, command=command, ended=ENDED))
    init.chmod(0o755)
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(adapted(back_end, directory / f"uml{index}"))
            for index, back_end in enumerate(disks)
        ]
        arguments = [
            str(program),
            f"mem={MEMORY}",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={init}",
            f"uml_dir={directory}",
            "umid=uml",
            "con=null",
            "con0=fd:0,fd:1",
            "quiet",
            "panic=-1",
            *(f"virtio_uml.device={path}:{VIRTIO_BLK}" for path in sockets),
        ]
        output = _run(arguments, directory / "console.log", timeout_s)
    output, found, status = output.rpartition(ENDED)
    if not found:
        raise UmlFailed(f"no end within {timeout_s:.0f} s of what follows\n{status}")
    return subprocess.CompletedProcess(command, int(status.split()[0]), output)


def _run(arguments: list[str], console: Path, timeout_s: float) -> str:
    with console.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    finally:
        # The guest's processes are some of ours, and outlive a kernel that was killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return console.read_text(errors="replace")


# --- What this front-end does in its own way --------------------------------------------------


@contextlib.contextmanager
def adapted(back_end: Path, path: Path) -> Iterator[Path]:
    """A socket at which User-mode Linux reaches the back-end at `back_end`, which wants:

    - eventfds to call; it gets SIGIO of none, and gives sockets;
    - a memory table of as many regions as it says; it always sends room for two;
    - the wrap counters of a packed ring in its base; it always says 0.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(1)
        over, end = os.pipe()
        stack.callback(os.close, over)
        thread = threading.Thread(target=_adapt, args=(listener, str(back_end), over))
        thread.start()
        try:
            yield path
        finally:
            os.close(end)
            thread.join()


def _adapt(listener: socket.socket, back_end: str, over: int) -> None:
    with contextlib.suppress(ConnectionError), contextlib.ExitStack() as stack:
        if over in select.select([listener, over], [], [])[0]:
            return
        guest = stack.enter_context(listener.accept()[0])
        behind = stack.enter_context(socket.socket(socket.AF_UNIX))
        behind.connect(back_end)
        adapter = stack.enter_context(Adapter(guest, behind))
        while adapter.turn(over):
            pass


class Adapter:
    """Between one guest's disk and its back-end."""

    def __init__(self, guest: socket.socket, behind: socket.socket) -> None:
        self.guest = guest
        self.behind = behind
        self.features = 0
        self.calls: dict[int, tuple[OwnedFd, OwnedFd]] = {}  # by the number of the first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for call, answered in self.calls.values():
            call.close()
            answered.close()

    def turn(self, over: int) -> bool:
        """Waits for one of them, and passes on what came; False: that was the end."""
        ready = select.select([self.guest, self.behind, over, *self.calls], [], [])[0]
        if over in ready:
            return False
        for fd in self.calls.keys() & set(ready):
            os.write(self.calls[fd][1].fileno(), os.read(fd, 8))
        if self.behind in ready:
            replies = self.behind.recv(65536)
            self.guest.sendall(replies)
            if not replies:
                return False
        return self.guest not in ready or self.pass_on()

    def pass_on(self) -> bool:
        """One message of the guest's; False: it has hung up."""
        data, fds = receive(self.guest, Header.LAYOUT.size)
        if not data:
            return False
        header = Header.unpack(data)
        payload = self.guest.recv(header.size, socket.MSG_WAITALL) if header.size else b""
        if header.request == FrontEndRequest.SET_FEATURES:
            self.features = U64.unpack(payload).value
        elif header.request == FrontEndRequest.SET_MEM_TABLE:
            (count,) = struct.unpack_from("=I", payload)
            payload = payload[: 8 + count * MemoryRegion.LAYOUT.size]
        elif header.request == FrontEndRequest.SET_VRING_BASE:
            index = VringState.unpack(payload).index
            payload = VringState(index, first_base(self.features)).pack()
        elif header.request == FrontEndRequest.SET_VRING_CALL and fds:
            call = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self.calls[call.fileno()] = call, fds[0]
            fds = [call]
        header = Header(header.request, header.flags, len(payload))
        send(self.behind, header.pack() + payload, fds)
        if header.request != FrontEndRequest.SET_VRING_CALL:
            close_all(fds)
        return True
