"""More tools for a guest, on a disk of their own: fio and XFS, too large for each guest's memory.

They are this machine's own programs, with their libraries; the XFS module is the guest
kernel's. The disk is a small ext4, made without root.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.peers import peers
from tests.peers.guest import Guest
from tests.peers.image import WANTED_MODULES, guest_image, modules_in_order

PROGRAMS = ("fio", "mkfs.xfs", "xfs_repair")
SPARE_MIB = 16
STARTER = """#!/bin/sh
exec /tools/lib/ld-linux-x86-64.so.2 --library-path /tools/lib /tools/exec/{name} "$@"
"""


def tools_image() -> Path:
    """The disk, built once for each set of programs and each version of this file."""
    programs = [Path(peers.system(name).argv[0]).resolve() for name in PROGRAMS]
    kernel = guest_image().kernel
    digest = hashlib.sha256(Path(__file__).read_bytes() + kernel.name.encode())
    for program in programs:
        digest.update(program.read_bytes())
    image = peers.CACHE / f"tools-{digest.hexdigest()[:12]}.img"
    if not image.exists():
        for old in peers.CACHE.glob("tools-*.img"):
            old.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="vhostpy-tools-") as directory:
            _fill(Path(directory), programs, kernel.name.removeprefix("vmlinuz-"))
            part = image.with_suffix(f".{os.getpid()}")
            _make_file_system(part, Path(directory))
        part.rename(image)  # another process may build the same: both are whole
    return image


def _fill(root: Path, programs: Iterable[Path], release: str) -> None:
    for name in ("bin", "lib", "exec", "modules"):
        (root / name).mkdir()
    for name, program in zip(PROGRAMS, programs, strict=True):
        shutil.copy(program, root / "exec" / name)
        (root / "bin" / name).write_text(STARTER.format(name=name))
        (root / "bin" / name).chmod(0o755)
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
        for library in re.findall(r"(/\S+) \(", listed.stdout):
            shutil.copy(library, root / "lib" / Path(library).name)
    modules = modules_in_order(peers.TRIXIE / "usr/lib/modules" / release, ["xfs"])
    known = modules_in_order(peers.TRIXIE / "usr/lib/modules" / release, WANTED_MODULES)
    new = [module for module in modules if module not in known]
    for name, code in new:
        (root / "modules" / f"{name}.ko").write_bytes(code)
    (root / "modules/order").write_text("".join(f"{name}\n" for name, _ in new))


def _make_file_system(image: Path, directory: Path) -> None:
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    mib = (size >> 20) * 11 // 10 + SPARE_MIB
    mke2fs = peers.trixie("mke2fs")
    subprocess.run(
        [*mke2fs.argv, "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", directory, image,
         f"{mib}M"], check=True, capture_output=True)


def use_tools(guest: Guest) -> None:
    """Puts them into PATH of a guest that was given their disk."""
    guest.check(f"mkdir /tools && mount -o ro /dev/{guest.tools_name} /tools && "
                "ln -s /tools/bin/* /bin && "
                "while read -r name; do insmod /tools/modules/$name.ko || exit 1; done "
                "< /tools/modules/order")
