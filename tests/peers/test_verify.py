"""fio in a guest reads back what it wrote, each block with a checksum of its own."""

import time
from pathlib import Path

import pytest

from tests.backends.nbdkit import Nbdkit
from tests.peers.backend import Backend
from tests.peers.guest import Guest, Job
from tests.peers.qemu import Drive
from tests.peers.test_disk import make_image
from tests.peers.tools import tools_image, use_tools

pytestmark = pytest.mark.guest

RESTARTS_S = 0.15


def start_fio(guest: Guest, device: str, mib: int) -> Job:
    """Small blocks at random and large ones in order, side by side; wrong bytes end it."""
    common = (f"--filename=/dev/{device} --direct=1 --ioengine=libaio --verify=crc32c "
              f"--verify_fatal=1 --verify_backlog=128 --do_verify=1 --size={mib}M --randrepeat=0")
    return guest.background(
        f"fio {common} --name=small --rw=randwrite --bs=4k --iodepth=16 "
        f"--name=large --rw=write --bs=128k --iodepth=4 --offset={mib}M "
        f"--name=odd --rw=randwrite --bs=2560 --iodepth=4 --offset={2 * mib}M --size={mib // 2}M")


def check_fio(job: Job, timeout_s: float) -> None:
    done = job.wait(timeout_s)
    assert done.status == 0, done.output
    for name in ("small", "large", "odd"):
        assert f"{name}: (groupid=0, jobs=1): err= 0" in done.output, done.output


@pytest.mark.timeout(150)
def test_fio_verifies_a_file_and_an_nbd_server_that_is_killed(directory: Path) -> None:
    verified(directory, mib=8)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_fio_verifies_more_of_both(directory: Path) -> None:
    verified(directory, mib=64)


def verified(directory: Path, mib: int) -> None:
    here = directory / f"verify{mib}"
    for name in ("file", "nbd"):
        (here / name).mkdir(parents=True)
        make_image(here / f"{name}.img", 3 * mib)
    sockets = {name: here / name / "vb" for name in ("file", "nbd")}
    with (
        Nbdkit(here / "server", "file", str(here / "nbd.img")) as server,
        Backend("blk", "--socket", sockets["file"], "--file", here / "file.img", "--direct",
                directory=here / "file"),
        Backend("blk", "--socket", sockets["nbd"], "--uri", server.uri,
                directory=here / "nbd") as nbd,
        Guest("verify", here / "guest", tools=tools_image(), cpus=2,
              drives=[Drive(sockets["file"], queues=2), Drive(sockets["nbd"])]) as guest,
    ):
        use_tools(guest)
        check_fio(start_fio(guest, "vda", mib), 60 + mib * 4)
        job = start_fio(guest, "vdb", mib)
        restarts = 0
        while not job.ended():
            server.restart()
            restarts += 1
            time.sleep(RESTARTS_S)  # so that some I/O gets between
        check_fio(job, 60)
        assert "connection lost" in nbd.log() and restarts > 3, restarts
        assert "error" not in guest.check("dmesg | grep -i ' vd[ab]' || true").lower()
