"""Firmware has drivers of its own: it starts what lies on our disk, or comes through our port."""

import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.peers import peers
from tests.peers.backend import Backend
from tests.peers.firmware import Firmware, boot_sector, efi_program, network_program
from tests.peers.netboot import BootServer
from tests.peers.qemu import Drive, Nic, qemu10, qemu11

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120)]

WORD = "started from vhostpy"


def test_seabios_starts_from_our_disk(directory: Path) -> None:
    image = directory / "bios.img"
    image.write_bytes(boot_sector(WORD).ljust(1 << 20, b"\0"))
    with (
        Backend("blk", "--socket", directory / "vb0", "--file", image, directory=directory),
        Firmware(directory / "bios", qemu10(), Drive(directory / "vb0")) as guest,
    ):
        guest.wait_for(WORD, 30)


@pytest.mark.long
def test_ovmf_starts_from_our_disk(directory: Path) -> None:
    image, program = directory / "efi.img", directory / "BOOTX64.EFI"
    program.write_bytes(efi_program(WORD))
    subprocess.run([*peers.system("mkfs.vfat").argv, "-C", image, "65536"], check=True)
    for directories in ("::EFI", "::EFI/BOOT"):
        subprocess.run([*peers.system("mmd").argv, "-i", image, directories], check=True)
    copy = [*peers.system("mcopy").argv, "-i", image, program, "::EFI/BOOT/BOOTX64.EFI"]
    subprocess.run(copy, check=True)
    bios = peers.BACKPORTS / "usr/share/ovmf/OVMF.fd"
    with (
        Backend("blk", "--socket", directory / "vb1", "--file", image, directory=directory),
        Firmware(directory / "efi", qemu11(), Drive(directory / "vb1"), bios) as guest,
    ):
        guest.wait_for(WORD, 60)


@pytest.mark.long
def test_ipxe_starts_what_it_gets_through_our_port(directory: Path) -> None:
    sockets = [directory / "vu0", directory / "vu1"]
    words = [word for socket in sockets for word in ("--socket", socket)]
    with (
        Backend("net", *words, directory=directory),
        closing(BootServer(str(sockets[0]), network_program(WORD))) as server,
        Firmware(directory / "pxe", qemu11(), Nic(sockets[1], "52:54:00:00:00:02")) as guest,
    ):
        deadline = time.monotonic() + 60
        while not guest.says(WORD):
            assert time.monotonic() < deadline, "nothing was started"
            server.serve(0.2)
