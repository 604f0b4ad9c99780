"""A disk that we serve, used by Linux guests and by QEMU's own virtio-blk front-end."""

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.backends.nbdkit import Nbdkit
from tests.peers import peers, traffic
from tests.peers.backend import Backend
from tests.peers.guest import Guest
from tests.peers.qemu import Drive, Qemu, qemu7, qemu10, qemu11

pytestmark = [pytest.mark.guest, pytest.mark.timeout(200)]

DISK_MIB = 256
SERIAL = "vhostpy-0001"


@dataclass(frozen=True, slots=True)
class Disk:
    backend: Backend
    guest: Guest
    image: Path
    queues: int


def make_image(path: Path, mib: int = DISK_MIB) -> Path:
    path.write_bytes(b"")
    os.truncate(path, mib << 20)
    return path


def assert_sound(image: Path) -> None:
    """The host's e2fsck finds nothing to repair."""
    e2fsck = peers.trixie("e2fsck")
    done = subprocess.run([*e2fsck.argv, "-fn", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


DISKS = {
    "qemu10": (qemu10, 1),
    "qemu10-4queues": (qemu10, 4),
    "qemu7": (qemu7, 1),
    "qemu11": (qemu11, 2),
}
LONG_DISKS = [pytest.param(name, marks=pytest.mark.long) for name in ("qemu10", "qemu11")]


@pytest.fixture(
    scope="module",
    params=["qemu10-4queues", "qemu7", *LONG_DISKS])
def disk(request: pytest.FixtureRequest, directory: Path) -> Iterator[Disk]:
    make_qemu, queues = DISKS[request.param]
    qemu: Qemu = make_qemu()
    here = directory / request.param
    here.mkdir()
    image = make_image(here / "disk.img")
    with ExitStack() as stack:
        backend = stack.enter_context(Backend(
            "blk", "--socket", here / "vb0", "--file", image, "--serial", SERIAL, directory=here))
        guest = stack.enter_context(Guest(
            "a", here / "a", qemu=qemu, cpus=queues,
            drives=[Drive(here / "vb0", queues, inflight_migration=request.param == "qemu11")]))
        yield Disk(backend, guest, image, queues)


def test_guest_sees_the_disk_as_it_was_described(disk: Disk) -> None:
    assert disk.guest.check("cat /sys/block/vda/size") == str(DISK_MIB * 2048)
    assert disk.guest.check("cat /sys/block/vda/serial") == SERIAL
    assert disk.guest.check("cat /sys/block/vda/ro") == "0"
    assert len(disk.guest.check("ls /sys/block/vda/mq").split()) == disk.queues


def test_file_system_survives_a_reboot(disk: Disk) -> None:
    traffic.make_file_system(disk.guest)
    written, _ = traffic.write_file(disk.guest, mib=50)
    assert traffic.read_file(disk.guest) == written
    disk.guest.reboot()
    disk.guest.check("mount /dev/vda /mnt")
    assert traffic.read_file(disk.guest) == written
    disk.guest.check("umount /mnt")
    assert_sound(disk.image)


def test_writers_on_all_cpus_do_not_mix_their_data(disk: Disk) -> None:
    """Direct I/O of odd sizes beside each other; the host's image has what each wrote."""
    writers = range(4)
    for number in writers:
        disk.guest.check(f"dd if=/dev/urandom of=/tmp/w{number} bs=64K count=64 2> /dev/null")
    sums = disk.guest.check("sha256sum /tmp/w? | cut -d' ' -f1").split()
    sizes = ("512", "4096", "65536", "1M")
    jobs = [
        disk.guest.background(
            f"dd if=/tmp/w{number} of=/dev/vda bs={sizes[number]} oflag=direct,seek_bytes "
            f"seek={number * 8 << 20} conv=notrunc")
        for number in writers
    ]
    for job in jobs:
        done = job.wait(60)
        assert done.status == 0, done.output
    disk.guest.check("sync")
    for number in writers:
        with disk.image.open("rb") as image:
            image.seek(number * 8 << 20)
            assert sha256(image.read(4 << 20)) == sums[number]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_discarded_blocks_read_as_zeros_and_others_stay(disk: Disk) -> None:
    disk.guest.check("dd if=/dev/urandom of=/tmp/d bs=1M count=3 2> /dev/null && "
                     "dd if=/tmp/d of=/dev/vda bs=1M seek=100 oflag=direct 2> /dev/null")
    disk.guest.check(f"blkdiscard -o {101 << 20} -l {1 << 20} /dev/vda")
    found = disk.guest.check(
        "echo 3 > /proc/sys/vm/drop_caches; for skip in 100 101 102; do "
        "dd if=/dev/vda bs=1M skip=$skip count=1 2> /dev/null | sha256sum | cut -d' ' -f1; done"
    ).split()
    wanted = disk.guest.check("for skip in 0 2; do dd if=/tmp/d bs=1M skip=$skip count=1 "
                              "2> /dev/null | sha256sum | cut -d' ' -f1; done").split()
    assert found == [wanted[0], sha256(bytes(1 << 20)), wanted[1]]


def test_guest_sees_its_disk_grow(disk: Disk) -> None:
    mib = DISK_MIB * 2
    os.truncate(disk.image, mib << 20)
    disk.backend.ask("resize")
    disk.guest.check(f"until [ $(cat /sys/block/vda/size) = {mib * 2048} ]; do sleep 0.1; done")
    disk.guest.check(f"printf grown | dd of=/dev/vda bs=512 seek={mib * 2048 - 1} conv=sync "
                     "oflag=direct 2> /dev/null")
    with disk.image.open("rb") as image:
        image.seek(-512, os.SEEK_END)
        assert image.read(5) == b"grown"


def test_read_only_disk_refuses_writes_and_stays_as_it_is(directory: Path) -> None:
    image = directory / "ro.img"
    image.write_bytes(b"\x5a" * (4 << 20))
    with (
        Backend("blk", "--socket", directory / "vbro", "--file", image, "--read-only",
                directory=directory),
        Guest("ro", directory / "ro", drives=[Drive(directory / "vbro")]) as guest,
    ):
        assert guest.check("cat /sys/block/vda/ro") == "1"
        assert guest.run("dd if=/dev/zero of=/dev/vda bs=4096 count=1").status != 0
        assert guest.check("dd if=/dev/vda bs=1M 2> /dev/null | sha256sum").split()[0] == sha256(
            b"\x5a" * (4 << 20))
    assert image.read_bytes() == b"\x5a" * (4 << 20)


def test_guest_io_outlives_an_nbd_server_killed_again_and_again(directory: Path) -> None:
    image = make_image(directory / "nbd.img", 64)
    with (
        Nbdkit(directory / "nbd", "file", str(image)) as server,
        Backend("blk", "--socket", directory / "vbnbd", "--uri", server.uri, directory=directory),
        Guest("nbd", directory / "nbd-guest", drives=[Drive(directory / "vbnbd")]) as guest,
    ):
        guest.check("dd if=/dev/urandom of=/tmp/w bs=1M count=16 2> /dev/null")
        wanted = guest.check("sha256sum /tmp/w").split()[0]
        job = guest.background(
            "for n in 0 1 2; do dd if=/tmp/w of=/dev/vda bs=64K oflag=direct,seek_bytes "
            "seek=$((n * 16777216)) conv=notrunc || exit 1; done; echo 3 > "
            "/proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M count=48 iflag=direct | sha256sum")
        for _ in range(10):
            server.restart()
            time.sleep(0.1)  # so that some I/O gets between
        done = job.wait(90)
        assert done.status == 0, done.output
        data = image.read_bytes()
        for number in range(3):
            assert sha256(data[number * 16 << 20:(number + 1) * 16 << 20]) == wanted
        assert sha256(data[:48 << 20]) in done.output


# --- QEMU 10's virtio-blk-vhost-user driver (libblkio): a front-end without a guest --------

def qemu_io(socket: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    program = peers.trixie("qemu-io")
    target = f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on"
    words = [word for command in commands for word in ("-c", command)]
    return subprocess.run(
        [*program.argv, "--image-opts", target, *words],
        env=program.env(), capture_output=True, text=True, timeout=60, check=False)


def test_qemu_io_writes_and_verifies_patterns(directory: Path) -> None:
    image = make_image(directory / "patterns.img", 64)
    socket = directory / "vbio"
    with Backend("blk", "--socket", socket, "--file", image, directory=directory):
        wrote = qemu_io(
            socket, "write -P 0x5a 0 1M", "write -P 0xa5 1M 512", "write -P 0x11 2M 300K",
            "writev -P 0x77 8M 64K 4K 512", "write -z 256K 256K", "flush")
        assert wrote.returncode == 0, wrote.stdout + wrote.stderr
        # Another session: what it reads came from the disk.
        read = qemu_io(
            socket, "read -P 0x5a 0 256K", "read -P 0 256K 256K", "read -P 0x5a 512K 512K",
            "read -P 0xa5 1M 512", "read -P 0x11 2M 300K", "read -P 0x77 8M 70144",
            "read -P 0 32M 1M")
        assert read.returncode == 0 and "verification failed" not in read.stdout, read.stdout
        wrong = qemu_io(socket, "read -P 0x5b 0 4K")
        assert "verification failed" in wrong.stdout  # or the checks above say nothing
        discarded = qemu_io(socket, "discard 0 64K", "read -P 0 0 64K", "read -P 0x5a 64K 64K")
        assert discarded.returncode == 0 and "failed" not in discarded.stdout, discarded.stdout
    data = image.read_bytes()
    assert data[:64 << 10] == bytes(64 << 10)
    assert data[64 << 10:256 << 10] == b"\x5a" * (192 << 10)
    assert data[256 << 10:512 << 10] == bytes(256 << 10)
    assert data[1 << 20:(1 << 20) + 512] == b"\xa5" * 512
    assert data[2 << 20:(2 << 20) + (300 << 10)] == b"\x11" * (300 << 10)
    assert data[8 << 20:(8 << 20) + 70144] == b"\x77" * 70144


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_disk_outlives_100_killed_front_ends(directory: Path) -> None:
    image = make_image(directory / "kills.img", 64)
    socket = directory / "vbkill"
    program = peers.trixie("qemu-img")
    target = f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on"
    with Backend("blk", "--socket", socket, "--file", image, directory=directory) as backend:
        footprints = []
        for number in range(101):
            pattern = number % 255 + 1
            bench = subprocess.Popen(
                [*program.argv, "bench", "-w", f"--pattern={pattern}", "-c", "100000000",
                 "-d", "64", "-s", "4096", "-t", "none", "--image-opts", target],
                env=program.env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_first_byte(image, pattern)
            bench.kill()
            bench.wait()
            done = qemu_io(socket, "write -P 0 0 1M", "read -P 0 0 1M")
            assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
            footprints.append(backend.footprint())
    first, last = footprints[0], footprints[-1]
    assert (last.fds, last.threads, last.mappings) == (first.fds, first.threads, first.mappings)


def wait_first_byte(image: Path, value: int, timeout_s: float = 20) -> None:
    """Until writes have reached the image."""
    deadline = time.monotonic() + timeout_s
    with image.open("rb", buffering=0) as file:
        while os.pread(file.fileno(), 1, 0) != bytes([value]):
            assert time.monotonic() < deadline, f"no {value} in {image} within {timeout_s} s"
            time.sleep(0.01)
