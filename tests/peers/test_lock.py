"""The lock on an image and QEMU's own: each refuses what the other writes."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.peers.peers import Program, system, trixie
from vhostpy.backends.storage import lock
from vhostpy.backends.storage.uring import UringStorage
from vhostpy.errors import ConfigError

pytestmark = pytest.mark.guest


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return str(path)


@pytest.fixture(params=[trixie, system])
def program(request: pytest.FixtureRequest) -> Callable[[str], Program]:
    """QEMU 10's, and the system's."""
    find: Callable[[str], Program] = request.param
    return find


def qemu_img(program: Callable[[str], Program], *words: str) -> subprocess.CompletedProcess[str]:
    tool = program("qemu-img")
    return subprocess.run(
        [*tool.argv, *words], env=tool.env(), capture_output=True, text=True, timeout=60,
        check=False)


def test_qemu_img_refuses_what_we_write(path: str, program: Callable[[str], Program]) -> None:
    storage = UringStorage(path)
    for command in (
        ["resize", "-f", "raw", path, "2M"],
        ["bench", "-w", "-f", "raw", "-c", "1", path],
    ):
        refused = qemu_img(program, *command)
        assert refused.returncode != 0 and "Failed to get" in refused.stderr, command
    storage.close()
    assert qemu_img(program, "resize", "-f", "raw", path, "2M").returncode == 0


def test_qemu_img_reads_what_we_read(path: str, program: Callable[[str], Program]) -> None:
    storage = UringStorage(path, read_only=True)
    assert qemu_img(program, "bench", "-f", "raw", "-c", "1", path).returncode == 0
    assert qemu_img(program, "bench", "-w", "-f", "raw", "-c", "1", path).returncode != 0
    storage.close()


def test_we_refuse_what_qemu_writes(
    path: str, program: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "GRACE_S", 0.0)
    daemon = program("qemu-storage-daemon")
    socket = tmp_path / "nbd"
    command = [
        *daemon.argv, "--blockdev", f"driver=file,node-name=disk,filename={path}",
        "--nbd-server", f"addr.type=unix,addr.path={socket}",
        "--export", "type=nbd,id=e,node-name=disk,writable=on",
    ]
    with subprocess.Popen(command, env=daemon.env()) as process:
        deadline = time.monotonic() + 30
        while not socket.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for read_only in (False, True):
            with pytest.raises(ConfigError, match=rf"in use by \S+ \(pid {process.pid}\)"):
                UringStorage(path, read_only=read_only)
        process.kill()
    UringStorage(path).close()
