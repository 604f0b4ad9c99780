"""Live migration: a guest moves between two QEMUs, each at its own port or disk socket.

QEMU copies memory while the guest runs and relies on the dirty log of every back-end: one
page that we wrote and did not log would show here as a lost ping or a wrong checksum.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.peers import traffic
from tests.peers.backend import Backend
from tests.peers.guest import Guest, boot
from tests.peers.qemu import Drive, Nic, Qemu, qemu10, qemu11
from tests.peers.test_disk import assert_sound, make_image

pytestmark = [pytest.mark.guest, pytest.mark.timeout(200)]

A, MOVER = "10.0.0.1", "10.0.0.2"
MOVER_MAC = "52:54:00:00:00:02"


def wait_lines(guest: Guest, path: str, count: int) -> None:
    """Until the file at `path` in the guest has that many lines."""
    guest.check(f"until [ $(wc -l < {path}) -ge {count} ]; do usleep 50000; done", timeout_s=30)


@pytest.mark.parametrize("pairs", [pytest.param(1, marks=pytest.mark.long), 4])
def test_guest_moves_while_it_pings(directory: Path, pairs: int) -> None:
    here = directory / f"net{pairs}"
    here.mkdir()
    sockets = [here / f"vu{port}" for port in range(3)]
    words: list[str | Path] = []
    for socket in sockets:
        words += ["--socket", socket]
    with ExitStack() as stack:
        backend = stack.enter_context(Backend("net", *words, directory=here))
        stays = Guest("stays", here / "a", nics=[Nic(sockets[0], "52:54:00:00:00:01", pairs)])
        source, target = (
            Guest(name, here / name, nics=[Nic(socket, MOVER_MAC, pairs)], cpus=pairs)
            for name, socket in (("source", sockets[1]), ("target", sockets[2])))
        for guest in (stays, source, target):
            stack.callback(guest.close)
        boot(stays, source)
        stays.set_address(f"{A}/24")
        source.set_address(f"{MOVER}/24")
        target.start(incoming=True)
        out = traffic.start_ping(source, A, count=100, interval_s=0.2)
        back = traffic.start_ping(stays, MOVER, count=100, interval_s=0.2)
        wait_lines(source, f"{out.path}.out", 20)
        source.migrate_to(target)
        source.close()
        for job, guest in ((out, target), (back, stays)):
            ping = traffic.pinged(job.wait(on=guest).output)
            assert ping.sent == 100
            assert ping.received >= 95, ping.output
        # What it received after the move came through the new port, and so does TCP.
        transfer = traffic.send_over_tcp(stays, target, MOVER, mib=10)
        assert transfer.received_sum == transfer.sent_sum
        backend.check()


# A round writes a file with new content, syncs, and compares what the disk gives back.
ROUNDS = """
round=0
while [ ! -e /tmp/enough ]; do
    dd if=/dev/urandom of=/tmp/round bs=64K count=32 2> /dev/null
    dd if=/tmp/round of=/mnt/round$((round % 8)) bs=64K conv=fsync 2> /dev/null || exit 1
    echo 1 > /proc/sys/vm/drop_caches
    cmp /tmp/round /mnt/round$((round % 8)) || exit 1
    cp /tmp/round /tmp/kept$((round % 8))
    round=$((round + 1))
    echo $round
done
"""


@pytest.mark.parametrize(
    ("make_qemu", "inflight"), [(qemu10, False), pytest.param(qemu11, True, marks=pytest.mark.long)]
)
def test_guest_moves_while_it_writes_to_our_disk(
    make_qemu: Callable[[], Qemu], inflight: bool, directory: Path
) -> None:
    """`inflight`: QEMU takes the requests under way along instead of waiting for them."""
    here = directory / f"disk-{inflight}"
    here.mkdir()
    image = make_image(here / "disk.img")
    with ExitStack() as stack:
        guests = []
        for name in ("source", "target"):
            (here / name).mkdir()
            socket = here / name / "vb0"
            stack.enter_context(
                Backend(
                "blk", "--socket", socket, "--file", image, "--share-rw", directory=here / name))
            drive = Drive(socket, inflight_migration=inflight)
            guests.append(Guest(name, here / name, qemu=make_qemu(), drives=[drive]))
        source, target = guests
        for guest in guests:
            stack.callback(guest.close)
        boot(source)
        traffic.make_file_system(source)
        job = source.background(ROUNDS)
        wait_lines(source, f"{job.path}.out", 10)
        target.start(incoming=True)
        source.migrate_to(target)
        source.close()
        moved = len(target.check(f"cat {job.path}.out").splitlines())
        wait_lines(target, f"{job.path}.out", moved + 20)
        target.check("touch /tmp/enough")
        done = job.wait(on=target)
        assert done.status == 0, done.output
        target.check("umount /mnt && mount /dev/vda /mnt")
        target.check("for number in 0 1 2 3 4 5 6 7; do "
                     "cmp /tmp/kept$number /mnt/round$number || exit 1; done")
        target.check("umount /mnt")
        target.close()
    assert_sound(image)
