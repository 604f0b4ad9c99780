"""The guest's system: a kernel of Debian and an initramfs made here, with an agent in it.

The initramfs holds busybox, mke2fs and e2fsck, the modules that a virtio guest needs, and
an /init that runs what the host sends over the second serial port (see guest.py). It is
written as a newc archive: no root, no cpio, no device nodes (devtmpfs makes them).
"""

import gzip
import hashlib
import lzma
import os
import re
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.peers.peers import CACHE, LIBRARIES, TRIXIE, PeerMissing

WANTED_MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "ext4", "crc32c_generic")
TOOLS = ("mke2fs", "e2fsck")

INIT = r"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /root
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o size=80% tmpfs /tmp
while read module; do insmod /modules/$module.ko; done < /modules/order
ip link set lo up
stty -F /dev/ttyS1 raw -echo
exec sh /agent <> /dev/ttyS1 >&0
"""

# One command a line, as `NUMBER BASE64`; the answer is `RESULT NUMBER STATUS BYTES` and then
# the bytes of its output. Numbers pair them up even after a timeout or a migration.
AGENT = r"""
cd /root
echo READY
while read -r number text; do
    echo "$text" | base64 -d > /tmp/.command
    sh /tmp/.command > /tmp/.output 2>&1 < /dev/null
    status=$?
    echo RESULT $number $status $(wc -c < /tmp/.output)
    cat /tmp/.output
done
"""


@dataclass(frozen=True, slots=True)
class Image:
    kernel: Path
    initrd: Path


def guest_image() -> Image:
    """The image, built once for each kernel and each version of this file."""
    kernels = sorted((TRIXIE / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise PeerMissing(f"no guest kernel in {TRIXIE}: run tests/peers/install.sh demo")
    kernel = kernels[-1]
    release = kernel.name.removeprefix("vmlinuz-")
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    initrd = CACHE / f"guest-{release}-{version}.img"
    if not initrd.exists():
        for old in CACHE.glob("guest-*.img"):
            old.unlink(missing_ok=True)
        part = initrd.with_suffix(f".{os.getpid()}")
        part.write_bytes(gzip.compress(_archive(release), compresslevel=1))
        part.rename(initrd)  # another process may build the same: both are whole
    return Image(kernel, initrd)


def _archive(release: str) -> bytes:
    archive = Archive()
    archive.add("/init", INIT.encode(), 0o755)
    archive.add("/agent", AGENT.encode())
    archive.add("/bin/busybox", (TRIXIE / "usr/bin/busybox").read_bytes(), 0o755)
    modules = modules_in_order(TRIXIE / "usr/lib/modules" / release, WANTED_MODULES)
    archive.add("/modules/order", "".join(f"{name}\n" for name, _ in modules).encode())
    for name, code in modules:
        archive.add(f"/modules/{name}.ko", code)
    archive.add("/etc/mke2fs.conf", (TRIXIE / "etc/mke2fs.conf").read_bytes())
    tools = [TRIXIE / "usr/sbin" / name for name in TOOLS]
    for path in tools:
        archive.add(f"/bin/{path.name}", path.read_bytes(), 0o755)
    archive.link("/bin/mkfs.ext4", "mke2fs")
    for path in shared_libraries(tools):
        archive.add(f"/lib64/{path.name}", path.read_bytes(), 0o755)
    archive.link("/lib", "lib64")
    return archive.finish()


class Archive:
    """A cpio archive in the newc form, as the kernel takes it (buffer-format.rst)."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._directories: set[str] = set()
        self._count = 0

    def add(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._parents(path)
        self._entry(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        self._parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        self._parents("/dev/console")
        # The kernel opens this one before devtmpfs is there; a device node needs no root here.
        self._entry("/dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1))
        self._entry("TRAILER!!!", 0, b"")
        return bytes(self._out)

    def _parents(self, path: str) -> None:
        for parent in list(Path(path).parents)[-2::-1]:
            if str(parent) not in self._directories:
                self._directories.add(str(parent))
                self._entry(str(parent), stat.S_IFDIR | 0o755, b"")

    def _entry(self, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        name = path.lstrip("/").encode() + b"\0"
        self._count += 1
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        self._out += b"070701" + b"".join(b"%08x" % number for number in fields) + name
        self._out += bytes(-len(self._out) % 4) + data
        self._out += bytes(-len(self._out) % 4)


def modules_in_order(directory: Path, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, code) of the wanted modules and of all they depend on, dependencies first.

    What is built into the kernel is left out. Debian's packages carry no modules.dep (depmod
    writes it after installation), so the modules' own words are read.
    """
    files = {re.sub(r"\.ko.*", "", path.name).replace("-", "_"): path
             for path in directory.glob("kernel/**/*.ko*")}
    built_in = {Path(line).stem.replace("-", "_")
                for line in (directory / "modules.builtin").read_text().split()}
    ordered: dict[str, bytes] = {}

    def visit(name: str) -> None:
        name = name.replace("-", "_")
        if name in ordered or name in built_in:
            return
        if name not in files:
            raise PeerMissing(f"module {name} is not in {directory}")
        code = files[name].read_bytes()
        if files[name].suffix == ".xz":
            code = lzma.decompress(code)
        for dependency in _depends(code):
            visit(dependency)
        ordered[name] = code

    for name in wanted:
        visit(name)
    return list(ordered.items())


def _depends(code: bytes) -> list[str]:
    found = re.search(rb"\0depends=([^\0]*)\0", code)
    return [name for name in found[1].decode().split(",") if name] if found else []


def shared_libraries(programs: Iterable[Path]) -> list[Path]:
    """What the programs of .cache/trixie load, their loader included, from there."""
    found: dict[str, Path] = {}
    pending = [*programs, LIBRARIES / "ld-linux-x86-64.so.2"]
    found[pending[-1].name] = pending[-1]
    while pending:
        for name in needed(pending.pop().read_bytes()):
            if name not in found:
                found[name] = LIBRARIES / name
                pending.append(found[name])
    return list(found.values())


def needed(elf: bytes) -> list[str]:
    """The DT_NEEDED names of a 64-bit little-endian ELF file."""
    section_offset, = struct.unpack_from("<Q", elf, 40)
    entry_size, count = struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, section_offset + i * entry_size)
                for i in range(count)]
    names = []
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind != 6:  # SHT_DYNAMIC; its link is the string table
            continue
        strings = sections[link][4]
        for at in range(offset, offset + size, 16):
            tag, value = struct.unpack_from("<QQ", elf, at)
            if tag == 1:  # DT_NEEDED
                end = elf.index(b"\0", strings + value)
                names.append(elf[strings + value:end].decode())
    return names
