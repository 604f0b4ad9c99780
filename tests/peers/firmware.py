"""A guest of firmware alone: what it starts from our disk or port, and says on its first serial
port.
"""

import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.peers.qemu import (
    Drive,
    Nic,
    Qemu,
    QemuProcess,
    disk_arguments,
    memory_arguments,
    network_arguments,
)

MEMORY_MIB = 256
# mov dx, 0x3f8; next: lodsb; test al, al; jz end; out dx, al; jmp next; end: hlt; jmp end
SAY = bytes.fromhex("baf803 ac 84c0 7403 ee ebf8 f4 ebfd")
SAY64 = bytes.fromhex("66baf803 ac 84c0 7403 ee ebf8 f4 ebfd")  # the same for 64 bits


class Firmware:
    """One such guest, of one device: a drive or a NIC. `bios`: not SeaBIOS, but this."""

    def __init__(
        self, directory: Path, qemu: Qemu, device: Drive | Nic, bios: Path | None = None
    ) -> None:
        arguments = [*qemu.program.argv, *qemu.library_arguments, "-nodefaults"]
        arguments += ["-no-user-config", "-display", "none", *memory_arguments(MEMORY_MIB)]
        arguments += ["-accel", "tcg,thread=single"]
        if bios is not None:
            arguments += ["-bios", str(bios)]
        if isinstance(device, Drive):
            arguments += disk_arguments(qemu, 0, device)
        else:
            arguments += network_arguments(qemu, 0, device, msix=qemu.modern)
        arguments[-1] += ",bootindex=0"
        self.qemu = QemuProcess("firmware", directory, arguments, qemu.program.env())

    def says(self, word: str) -> bool:
        """Whether it has said so by now."""
        self.qemu.check()
        return word in self.qemu.console.read_text(errors="replace")

    def wait_for(self, word: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.says(word):
            assert time.monotonic() < deadline, f"no {word!r}\n{self.qemu.last_words()}"
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.qemu.kill()


def boot_sector(word: str) -> bytes:
    """A disk of a few sectors: its first one has the BIOS read the third, and says what is there.

    xor ax, ax; mov ds, ax; mov es, ax; mov ax, 0x201; mov bx, 0x7e00; mov cx, 3; mov dh, 0;
    int 0x13; jc to the end; mov si, bx
    """
    code = bytes.fromhex("31c0 8ed8 8ec0 b80102 bb007e b90300 b600 cd13 720d 89de") + SAY
    first = code.ljust(510, b"\0") + b"\x55\xaa"
    return first + bytes(512) + word.encode().ljust(512, b"\0")


def network_program(word: str) -> bytes:
    """What PXE loads to 0x7c00 and starts: xor ax, ax; mov ds, ax; mov si, behind the code."""
    start = bytes.fromhex("31c0 8ed8 be")
    length = len(start) + 2 + len(SAY)
    return start + (0x7C00 + length).to_bytes(2, "little") + SAY + word.encode() + b"\0"


def efi_program(word: str) -> bytes:
    """A PE32+ application of one section: lea rsi, behind the code; then the same."""
    code = b"\x48\x8d\x35" + len(SAY64).to_bytes(4, "little") + SAY64 + word.encode() + b"\0"
    dos = b"MZ".ljust(60, b"\0") + (64).to_bytes(4, "little")
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 240, 0x22E)
    # Entry at 0x1000; base 0; pages of 4 KiB; 8 KiB in all, 512 of them headers; EFI application.
    optional = struct.pack(
        "<HBBIIIIIQIIHHHHHHIIIIHHQQQQII",
        *(0x20B, 0, 0, 512, 0, 0, 0x1000, 0x1000, 0, 0x1000, 512, 0, 0, 0, 0, 0, 0),
        *(0, 0x2000, 512, 0, 10, 0, 0, 0, 0, 0, 0, 16),
    ).ljust(240, b"\0")
    section = struct.pack("<8sIIIIIIHHI", b".text", 512, 0x1000, 512, 512, 0, 0, 0, 0, 0x60000020)
    return (dos + coff + optional + section).ljust(512, b"\0") + code.ljust(512, b"\0")
