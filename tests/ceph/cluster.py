"""A Ceph of one monitor and one OSD in a directory: all in memory, without keys."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

from tests.ports import free_port

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "rbd", "monmaptool")
START_S = 60
POOL = "disks"


class Cluster:
    """Runs while the block does; `conf` is its ceph.conf."""

    def __init__(self, directory: Path) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        assert not missing, f"{', '.join(missing)} missing: run tests/peers/install.sh ceph"
        self.directory = directory
        self.conf = directory / "ceph.conf"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        port = free_port()
        self.address = f"v1:127.0.0.1:{port}/0"
        self.fsid = str(uuid.uuid4())
        self.conf.write_text(f"""
[global]
fsid = {self.fsid}
mon_host = {self.address}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_bind_msgr2 = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
osd_objectstore = memstore
memstore_device_bytes = {1 << 30}
run_dir = {directory}
admin_socket = {directory}/$name.asok
log_file = {directory}/$name.log
mon_data = {directory}/mon
osd_data = {directory}/osd
mon_cluster_log_file = {directory}/cluster.log
""")

    def run(self, *words: str) -> str:
        """One of Ceph's own commands, against this cluster."""
        done = subprocess.run(
            [words[0], "--conf", str(self.conf), *words[1:]],
            capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def start(self, name: str) -> None:
        """'mon' or 'osd'; in the foreground, so that it is ours to kill."""
        kind, id_ = {"mon": ("ceph-mon", "a"), "osd": ("ceph-osd", "0")}[name]
        with (self.directory / f"{name}.out").open("wb") as out:
            self.processes[name] = subprocess.Popen(
                [kind, "--conf", str(self.conf), "--foreground", "--id", id_],
                stdout=out, stderr=out,
            )  # fmt: skip

    def pause(self, name: str) -> None:
        process = self.processes[name]
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)

    def resume(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGCONT)

    def __enter__(self) -> "Cluster":
        try:
            monmap = str(self.directory / "monmap")
            subprocess.run(
                ["monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", f"[{self.address}]",
                 monmap], check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            for data in ("mon", "osd"):
                (self.directory / data).mkdir()
            self.run("ceph-mon", "--mkfs", "--id", "a", "--monmap", monmap)
            self.start("mon")
            self.run("ceph", "--connect-timeout", "30", "osd", "new", self.fsid)
            self.run("ceph-osd", "--mkfs", "--id", "0", "--osd-uuid", self.fsid)
            self.start("osd")
            deadline = time.monotonic() + START_S
            while "1 up" not in self.run("ceph", "osd", "stat"):
                assert time.monotonic() < deadline, "the OSD did not start"
                # It ends with "wrong fsid" where it asks before it has the monitor's map.
                if self.processes["osd"].poll() is not None:
                    self.start("osd")
                time.sleep(0.2)
            self.run("ceph", "osd", "pool", "create", POOL, "8")
            self.run("rbd", "pool", "init", POOL)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
