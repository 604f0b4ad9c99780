"""Power cuts: QEMU is killed with -9 under load, and its file systems are sound.

What was synced before is there. The next guest finds the disks as a machine does that is
switched on again.
"""

import os
import random
import re
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.peers import peers
from tests.peers.backend import Backend
from tests.peers.guest import Guest, Job
from tests.peers.qemu import Drive
from tests.peers.test_disk import assert_sound, make_image
from tests.peers.tools import tools_image, use_tools

pytestmark = pytest.mark.guest

DISK_MIB = 1024  # XFS wants 300 at least
SYSTEMS = {"ext4": "vda", "xfs": "vdb"}

# What a guest can do to a file system, by several at once. Every eighth file stays; it is
# named in the log once it is on the disk, with its sum.
LOAD = r"""
cd /mnt/{system}
number=0
while :; do
    number=$((number + 1))
    mkdir -p {worker}/$((number % 5))
    file={worker}/$((number % 5))/$number
    dd if=/tmp/random of=$file bs=3000 count=$((number % 23 + 1)) skip=$((number % 60)) || exit 1
    case $((number % 8)) in
        0) dd if=/dev/null of=$file conv=notrunc,fsync; echo synced $file $(sha256sum < $file) ;;
        1) mv $file {worker}/moved ;;
        2) ln -f $file {worker}/linked; echo more >> $file ;;
        3) truncate -s $((number % 9000)) $file; rm -f {worker}/linked ;;
        4) ln -sf $file {worker}/symbolic ;;
        5) rm -f {worker}/*/$((number - 3)) {worker}/*/$((number - 10)) ;;
        6) mkdir -p {worker}/deep/$number/a/b/c; rm -rf {worker}/deep/$((number - 16)) ;;
        7) truncate -s 5000000 $file; rm -f {worker}/*/$((number - 8 * 3 - 1)) ;;
    esac || exit 2
done
"""
WORKERS = 2


@pytest.mark.timeout(150)
def test_file_systems_are_sound_after_a_power_cut(directory: Path) -> None:
    cut(directory, cuts=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_file_systems_are_sound_after_twenty_power_cuts(directory: Path) -> None:
    cut(directory, cuts=20)


def cut(directory: Path, cuts: int) -> None:
    """Each third time our process dies with the guest."""
    here = directory / f"cut{cuts}"
    random_ = random.Random(cuts)
    images = {}
    for system in SYSTEMS:
        (here / system).mkdir(parents=True)
        images[system] = make_image(here / f"{system}.img", DISK_MIB)
    backends: dict[str, Backend] = {}
    synced: dict[str, dict[str, str]] = {system: {} for system in SYSTEMS}

    def boot(name: str, stack: ExitStack) -> Guest:
        for system in SYSTEMS:
            if system not in backends:
                backends[system] = Backend(
                    "blk", "--socket", here / system / "vb", "--file", images[system],
                    directory=here / system)
        drives = [Drive(here / system / "vb", queues=2) for system in SYSTEMS]
        guest = stack.enter_context(
            Guest(name, here / name, tools=tools_image(), drives=drives, cpus=2))
        use_tools(guest)
        return guest

    def mount(guest: Guest) -> None:
        for system, device in SYSTEMS.items():
            guest.check(f"mkdir -p /mnt/{system} && mount -t {system} /dev/{device} /mnt/{system}")

    with ExitStack() as stack:
        stack.callback(lambda: [backend.kill() for backend in backends.values()])
        guest = boot("first", stack)
        guest.check("mkfs.ext4 -q /dev/vda && mkfs.xfs -q /dev/vdb", timeout_s=60)
        for number in range(cuts):
            mount(guest)
            loaded(guest, random_.uniform(1.0, 2.5), synced)
            guest.process.power_cut()
            if number % 3 == 0:
                for backend in backends.values():
                    backend.kill()
                backends.clear()
            guest = boot(f"guest{number}", stack)
            mount(guest)        # which replays the journals
            for system, files in synced.items():
                sums = guest.check(
                    f"cd /mnt/{system} && for file in {' '.join(files)}; do "
                    "sha256sum < $file; done", timeout_s=60)
                assert re.findall("[0-9a-f]{64}", sums) == list(files.values()), system
            guest.check("umount /mnt/*")
            guest.check("xfs_repair -n /dev/vdb && e2fsck -fn /dev/vda", timeout_s=60)
        guest.close()
        for backend in backends.values():
            backend.check()
    assert_sound(images["ext4"])
    xfs_repair = peers.system("xfs_repair")
    subprocess.run([*xfs_repair.argv, "-n", "-f", images["xfs"]], check=True, capture_output=True)
    assert all(len(files) > 3 for files in synced.values()), "or nothing was shown"


def loaded(guest: Guest, time_s: float, synced: dict[str, dict[str, str]]) -> None:
    """Load for so long; adds files that were synced meanwhile, and their sums."""
    guest.check("dd if=/dev/urandom of=/tmp/random bs=3000 count=100 2> /dev/null")
    names = [f"{os.urandom(2).hex()}{worker}" for worker in range(WORKERS)]
    jobs: dict[Job, str] = {
        guest.background(LOAD.replace("{system}", system).replace("{worker}", name)): system
        for system in SYSTEMS for name in names
    }
    for job in jobs:
        guest.check(f"until grep -q synced {job.path}.out; do usleep 20000; done", timeout_s=30)
    time.sleep(time_s)  # a moment of no meaning
    for job, system in jobs.items():
        log = guest.check(f"grep ^synced {job.path}.out")
        synced[system] |= dict(re.findall(r"^synced (\S+) ([0-9a-f]{64})", log, re.MULTILINE))
        assert not job.ended(), guest.check(f"cat {job.path}.out")
