"""Disks in a real Ceph cluster; run by make test-ceph."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.guest import IN, IOERR, OK, OUT, eventually
from tests.backends.machine import Machine
from tests.backends.test_storage import assert_is_a_bytearray, channel_of
from tests.ceph.cluster import POOL, Cluster
from tests.peers.backend import Backend
from tests.peers.guest import Guest
from tests.peers.qemu import Drive
from tests.peers.test_verify import check_fio, start_fio
from tests.peers.tools import tools_image, use_tools
from vhostpy.backends.storage.rbd import RbdStorage
from vhostpy.backends.storage.storage import Op
from vhostpy.errors import ConfigError

SIZE = 8 << 20
UNMAP = 1


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("ceph")) as cluster:
        yield cluster


@pytest.fixture
def image(cluster, request):
    name = f"{POOL}/{abs(hash(request.node.name))}"
    cluster.run("rbd", "create", name, "--size", f"{SIZE}B")
    return f"rbd:{name}:conf={cluster.conf}"


mixes = st.lists(
    st.tuples(
        st.sampled_from([Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES]),
        st.integers(0, SIZE // 512),
        st.one_of(st.integers(0, 40), st.integers(0, 2 << 11)),
        st.sampled_from([512, 4096, 1000, 1 << 17]),
        st.integers(0, 255),
        st.sampled_from([0, UNMAP]),
    ),
    max_size=15,
)


def test_contents_are_those_of_a_bytearray(image):
    with channel_of(RbdStorage(image)) as channel:

        @settings(max_examples=20, deadline=None)
        @given(mix=mixes)
        def check(mix):
            assert channel.run(Op.WRITE_ZEROES, 0, SIZE)[0] == 0
            assert_is_a_bytearray(channel, SIZE, mix, gap=8)

        check()


def test_a_guest_reads_what_it_wrote_on_several_at_once(image):
    with Machine(RbdStorage(image)) as machine:
        sent = [
            machine.guest.request(OUT, 64 * n, data=bytes([n]) * 4096, cuts=[100 * n + 1])
            for n in range(16)
        ]
        assert [request.wait() for request in sent] == [OK] * 16
        for n in range(16):
            read = machine.guest.request(IN, 64 * n, space=4096, cuts=[700])
            assert (read.wait(), read.data) == (OK, bytes([n]) * 4096)


def test_a_snapshot_is_read_only_and_stays_as_it_was(cluster, image):
    name = image.split(":")[1]
    with channel_of(RbdStorage(image)) as channel:
        assert channel.run(Op.WRITE, 0, 512, b"old!" * 128)[0] == 0
        assert channel.run(Op.FLUSH, 0, 0)[0] == 0
        cluster.run("rbd", "snap", "create", f"{name}@then")
        assert channel.run(Op.WRITE, 0, 512, b"new!" * 128)[0] == 0
    storage = RbdStorage(image.replace(name, f"{name}@then"))
    assert storage.read_only and not storage.can_discard
    with channel_of(storage) as channel:
        assert channel.run(Op.READ, 0, 512) == (0, b"old!" * 128)
        assert channel.run(Op.WRITE, 0, 512, bytes(512))[0] == -errno.EROFS


def test_an_image_that_grew_is_seen(cluster, image):
    with Machine(RbdStorage(image)) as machine:
        cluster.run("rbd", "resize", image.split(":")[1], "--size", f"{2 * SIZE}B")
        eventually(lambda: machine.disk.grow(machine.storage.actual_bytes()), "the new size")
        assert machine.guest.request(OUT, 2 * SIZE // 512 - 1, data=b"x" * 512).wait() == OK


def test_a_cluster_that_hangs_costs_errors_and_no_other_disk(cluster, image):
    with Machine(RbdStorage(image, timeout_s=2)) as machine:
        assert machine.guest.request(OUT, data=b"x" * 512).wait() == OK
        cluster.pause("osd")
        try:
            assert machine.guest.request(IN, space=512).wait() == IOERR
        finally:
            cluster.resume("osd")
        eventually(lambda: machine.guest.request(IN, space=512).wait() == OK, "the cluster")


def test_guest_memory_that_goes_away_ends_its_guest_alone(cluster, image):
    with Machine(RbdStorage(image)) as machine:
        cluster.pause("osd")
        machine.guest.request(IN, space=65536)
        eventually(lambda: machine.counters()["inflight"] == 1, "a request")
        os.ftruncate(machine.guest.fd, 4 * 4096)
        cluster.resume("osd")
        eventually(lambda: machine.guest.memory.poisoned, "poison")
        with channel_of(RbdStorage(image)) as innocent:
            assert innocent.run(Op.READ, 0, 512)[0] == 0


def test_what_cannot_be_had_gets_one_line_that_says_what_to_do(cluster, tmp_path):
    conf = f":conf={cluster.conf}"
    for uri, text in {
        "rbd:nowhere": "not an RBD image",
        f"rbd:no-pool/image{conf}": "pool no-pool",
        f"rbd:{POOL}/no-image{conf}": "cannot open",
        f"rbd:{POOL}/image:conf={tmp_path}/none": "configuration",
        f"rbd:{POOL}/image{conf}:no_such_option=1": "option no_such_option",
    }.items():
        with pytest.raises(ConfigError, match=text) as caught:
            RbdStorage(uri)
        assert "\n" not in caught.value.args[0] and caught.value.hint


def test_fio_in_a_guest_reads_back_what_it_wrote(image):
    with tempfile.TemporaryDirectory(prefix="vhostpy-rbd-") as name:
        here = Path(name)
        drives = [Drive(here / "vb", queues=2)]
        with (
            Backend("blk", "--socket", here / "vb", "--uri", image, directory=here) as backend,
            Guest("rbd", here / "guest", drives=drives, cpus=2, tools=tools_image()) as guest,
        ):
            use_tools(guest)
            check_fio(start_fio(guest, "vda", SIZE * 2 // 5 >> 20), 120)
            backend.check()


def test_a_process_serves_it_and_ends_cleanly(image, tmp_path):
    argv = [sys.executable, "-m", "vhostpy"]
    serving = subprocess.Popen(
        [*argv, "blk", "--socket", "vb0", "--uri", image, "--json", "--control", "c"],
        cwd=tmp_path, stdout=subprocess.PIPE,
    )  # fmt: skip
    with serving:
        assert serving.stdout is not None and b"listening" in serving.stdout.readline()
        words = "load vb0 --seconds 1 --warmup 0.2 --pattern mix --verify --depth 16"
        subprocess.run([*argv, *words.split()], cwd=tmp_path, check=True, timeout=30)
        serving.terminate()
        assert serving.wait(20) == 0
