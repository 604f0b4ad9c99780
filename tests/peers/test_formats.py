"""Images that QEMU makes: none but the raw ones are served as raw."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers.peers import trixie
from vhostpy.backends.storage.nbd import NbdStorage
from vhostpy.backends.storage.uring import UringStorage
from vhostpy.errors import ConfigError

pytestmark = pytest.mark.guest

FORMATS = {
    "qcow": "", "qcow2": "", "qed": "", "vdi": "", "vhdx": "", "vpc": "", "parallels": "",
    "vmdk": "", "vmdk in two files": "subformat=monolithicFlat",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_qemus_images_are_refused_and_the_hint_serves_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.img"
    tool = trixie("qemu-img")
    options = ["-o", FORMATS[name]] if FORMATS[name] else []
    subprocess.run(
        [*tool.argv, "create", "-q", "-f", name.split()[0], *options, path, "64M"],
        env=tool.env(), check=True)  # fmt: skip
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=f"a {name.split()[0]} image") as caught:
        UringStorage(str(path))
    assert path.read_bytes() == before
    command, _, _ = caught.value.hint.partition(" serves it to --uri")
    with serving(command, tmp_path / "nbd") as uri:
        disk = NbdStorage(uri)
        assert disk.size_bytes >= 64 << 20  # vpc rounds up, to whole cylinders
        disk.close()


@contextmanager
def serving(command: str, socket: Path) -> Iterator[str]:
    """The hint's command, on a socket of our own; the URI that it says."""
    program, *words = command.replace("/tmp/nbd", str(socket)).split()
    tool = trixie(program)
    with subprocess.Popen([*tool.argv, *words], env=tool.env()) as process:
        try:
            deadline = time.monotonic() + 30
            while not socket.exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            process.terminate()
