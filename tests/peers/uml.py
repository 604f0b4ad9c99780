"""User-mode Linux as a guest: a kernel that speaks vhost-user itself, with this machine's files.

QEMU shows its guests only the features of a disk that it knows, and SECURE_ERASE is none of
them. This kernel shows its driver all that a back-end offers. Its root is this machine's, read
only: what runs there runs in the guest as it is.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.peers import peers

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

# This kernel gives back less of a process's registers than processors have by now (AMX), which
# ptrace refuses: what it does not know stays as it is.
REGISTERS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
    static char state[65536];
    long (*next)(enum __ptrace_request, ...) = dlsym(RTLD_NEXT, "ptrace");
    struct iovec whole = {state, sizeof state}, *known;
    void *pid, *address, *data;
    va_list arguments;
    va_start(arguments, request);
    pid = va_arg(arguments, void *);
    address = va_arg(arguments, void *);
    data = va_arg(arguments, void *);
    va_end(arguments);
    if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE) {
        known = data;
        if (next(PTRACE_GETREGSET, pid, address, &whole) < 0)
            return -1;
        if (known->iov_len < whole.iov_len) {
            memcpy(state, known->iov_base, known->iov_len);
            data = &whole;
        }
    }
    return next(request, pid, address, data);
}
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
    registers = directory / "registers.so"
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", registers],
        input=REGISTERS, text=True, check=True,
    )  # fmt: skip
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
        *(f"virtio_uml.device={path}:{VIRTIO_BLK}" for path in disks),
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": str(registers),
        "TMPDIR": "/dev/shm",  # where its memory is: not on a disk
    }
    output = _run(arguments, environment, directory / "console.log", timeout_s)
    output, found, status = output.rpartition(ENDED)
    if not found:
        raise UmlFailed(f"no end within {timeout_s:.0f} s of what follows\n{status}")
    return subprocess.CompletedProcess(command, int(status.split()[0]), output)


def _run(
    arguments: list[str], environment: dict[str, str], console: Path, timeout_s: float
) -> str:
    with console.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
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
