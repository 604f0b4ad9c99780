"""The device's core: for a process and for all that the kernel does in its name.

Affinity is not enough: the kernel threads that io_uring leaves work to (writes to a file,
above all) keep none, and would run on the generator's core. They keep to a cpuset.
"""

import atexit
import contextlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

DEVICE_CORE = 0
PINNED = ["taskset", "-c", str(DEVICE_CORE)]

CGROUP = Path("/sys/fs/cgroup")
NAME = "vhostpy-bench"


def start(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """A process of the device's core; pinned only, where cpusets cannot be had."""
    group = _cpuset()
    # 0 is whoever writes it.
    enter = (lambda: (group / "cgroup.procs").write_text("0")) if group else None
    return subprocess.Popen([*PINNED, *argv], preexec_fn=enter, **options)


def prefer(process: int) -> None:
    """Before all that others run meanwhile; needs root. A process that leads a session is
    scheduled with that, which has a nice level of its own."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), -20)
        Path(f"/proc/{process}/autogroup").write_text("-20")


@cache
def _cpuset() -> Path | None:
    """Made at the first use, and removed at the end. Needs root."""
    old = CGROUP / "cpuset"
    group = (old if (old / "cpuset.cpus").exists() else CGROUP) / NAME
    try:
        if group.parent == CGROUP:
            (CGROUP / "cgroup.subtree_control").write_text("+cpuset")
        group.mkdir(exist_ok=True)
        (group / "cpuset.cpus").write_text(str(DEVICE_CORE))
        (group / "cpuset.mems").write_text("0")
    except OSError as error:
        print(f"no cpuset, io_uring's threads run on any core: {error}", file=sys.stderr)
        return None
    atexit.register(_remove, group)
    return group


def _remove(group: Path) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(group)
