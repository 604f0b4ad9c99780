"""Guests write while the process that serves their disk is killed with -9 and started again.

QEMU connects again and hands over the memory in which requests under way are remembered.
What is lost there hangs the guest; what is done twice too late shows as a wrong byte.
"""

import hashlib
import random
import re
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.peers.backend import Backend
from tests.peers.guest import Guest, GuestFailed, Job
from tests.peers.qemu import Drive
from tests.peers.test_disk import make_image

pytestmark = pytest.mark.guest

SLOTS, SLOT_MIB, FILES = 2, 1, 7
# Past the guest's cache, one request at a time, small ones and large ones; and through it:
# many at a time, and a flush.
WRITERS = ("bs=4K oflag=direct,seek_bytes", "bs=4K oflag=direct,seek_bytes",
           "bs=64K oflag=direct,seek_bytes", "bs=1M oflag=seek_bytes conv=notrunc,fsync")

# A round writes other bytes than before into the next slot, and reads them back past the
# cache. Random bytes are made once: the guest shall wait for its disk, not for them.
ROUNDS = f"""
round=0
while [ ! -e /tmp/enough ]; do
    slot=$((round % {SLOTS}))
    new=/tmp/random$(((round + {{number}}) % {FILES}))
    at=$((({{number}} * {SLOTS} + slot) * {SLOT_MIB << 20}))
    dd if=$new of=/dev/vda {{how}} seek=$at || exit 1
    dd if=/dev/vda of=/tmp/back{{number}} bs=64K count={16 * SLOT_MIB} \
        iflag=direct,skip_bytes skip=$at 2> /dev/null || exit 2
    cmp $new /tmp/back{{number}} || exit 3
    ln -sf $new /tmp/kept{{number}}.$slot
    round=$((round + 1))
    echo round $round
done
"""

CASES = [("split", 4), ("packed", 1), ("split", 1), ("packed", 4)]


def wait_rounds(guest: Guest, job: Job, count: int, backend: Backend) -> None:
    """Until that many are done. Else a request is lost: says what each end knows of it."""
    try:
        guest.check(f"timeout 60 sh -c 'until [ $(grep -c ^round {job.path}.out) -ge {count} ]; "
                    "do usleep 20000; done'", timeout_s=90)
    except GuestFailed as error:
        seen = guest.run(f"cat {job.path}.out; cat /sys/block/vda/inflight; dmesg | tail -5")
        raise GuestFailed(f"{error}\n{seen.output}\n{backend.status()}\n{backend.log()}") from None


def rounds(guest: Guest, job: Job) -> int:
    return int(guest.check(f"grep -c ^round {job.path}.out || true"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("layout", "queues"), CASES[:2])
def test_no_request_is_lost_by_a_kill(directory: Path, layout: str, queues: int) -> None:
    killed_under_writes(directory, layout, queues, kills=5)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("layout", "queues"), CASES)
def test_no_request_is_lost_by_100_kills(directory: Path, layout: str, queues: int) -> None:
    assert killed_under_writes(directory, layout, queues, kills=100) >= 5


def killed_under_writes(directory: Path, layout: str, queues: int, kills: int) -> int:
    """How many requests were under way at a kill and done again."""
    here = directory / f"{layout}{queues}x{kills}"
    here.mkdir()
    socket, image = here / "vb0", make_image(here / "disk.img", 64)
    random_ = random.Random(kills)
    done_again = 0

    def serve() -> Backend:
        # Past the host's cache: what is under way is so for longer.
        return Backend("blk", "--socket", socket, "--file", image, "--direct", directory=here)

    with ExitStack() as stack:
        backend = serve()
        stack.callback(lambda: backend.kill())
        drive = Drive(socket, queues, reconnect=True, packed=layout == "packed")
        guest = stack.enter_context(Guest("a", here / "a", drives=[drive], cpus=queues))
        write_through = layout == "packed"
        if write_through:
            guest.check("echo write through > /sys/block/vda/cache_type")
        for number in range(FILES):
            guest.check(f"dd if=/dev/urandom of=/tmp/random{number} bs=64K "
                        f"count={16 * SLOT_MIB} 2> /dev/null")
        jobs = [guest.background(ROUNDS.format(number=number, how=how))
                for number, how in enumerate(WRITERS)]
        for kill in range(kills):
            if kill % 5 == 0:
                # All went on since: else a hang would show only at the end.
                before = [rounds(guest, job) for job in jobs]
                for job, count in zip(jobs, before, strict=True):
                    wait_rounds(guest, job, count + 1, backend)
            time.sleep(random_.uniform(0.1, 0.6))   # a moment of no meaning
            backend.check()
            done_again += sum(map(int, re.findall(r"(\d+) requests that were under way",
                                                  backend.log())))
            backend.kill()
            backend = serve()
        guest.check("touch /tmp/enough")
        for job in jobs:
            done = job.wait(60)
            assert done.status == 0, done.output
        assert "error" not in guest.check("dmesg | grep -i 'vda' || true").lower()
        # QEMU says it once only, so each life of ours had it from the one before.
        assert backend.status()["sockets"][0]["device"]["write_cache"] is not write_through
        sums = guest.check("sha256sum /tmp/kept?.? | cut -d' ' -f1").split()
        guest.close()
        backend.check()
    print(f"{done_again} requests were under way at a kill")
    content = image.read_bytes()
    size = SLOT_MIB << 20
    assert sums == [hashlib.sha256(content[at:at + size]).hexdigest()
                    for at in range(0, len(WRITERS) * SLOTS * size, size)]
    return done_again
