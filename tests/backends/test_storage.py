"""Each storage against a bytearray, and what goes wrong with files."""

import atexit
import errno
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.machine import SIZE, image, opened_gate
from vhostpy.backends.storage import uring as uring_module
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.files import open_file
from vhostpy.backends.storage.null import NullStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.backends.storage.storage import Op
from vhostpy.backends.storage.uring import UringStorage
from vhostpy.backends.storage.uring_setup import UringUnavailable
from vhostpy.errors import ConfigError

UNMAP = 1


@contextmanager
def channel_of(storage):
    channel = storage.channel()
    try:
        yield channel
    finally:
        channel.close()
        storage.close()


def assert_is_a_bytearray(channel, disk_size, mix, gap=0):
    """Does the mix on a disk of zeros, and on a bytearray: they stay the same.

    Of it: (operation, sector, sectors, bytes of a piece, first byte, flags).
    """
    model = bytearray(disk_size)
    for op, sector, sectors, piece, fill, flags in mix:
        offset = sector * 512
        size = min(sectors * 512, disk_size - offset)
        data = bytes((fill + i) % 251 for i in range(size)) if op == Op.WRITE else b""
        if op == Op.FLUSH:
            offset = size = 0
        result, out = channel.run(op, offset, size, data, flags=flags, piece=piece, gap=gap)
        assert result == 0
        if op == Op.READ:
            assert out == model[offset : offset + size]
        elif op == Op.WRITE:
            model[offset : offset + size] = data
        elif op == Op.WRITE_ZEROES:
            model[offset : offset + size] = bytes(size)
        elif op == Op.DISCARD:
            # "undefined"; ours are zeros, where the file system can
            model[offset : offset + size] = channel.run(Op.READ, offset, size)[1]
    assert channel.run(Op.READ, 0, disk_size) == (0, bytes(model))


def in_memory(tmp):
    """Where there is a tmpfs; the test's own directory has a link to it."""
    shm = tempfile.mkdtemp(dir="/dev/shm")
    atexit.register(shutil.rmtree, shm, ignore_errors=True)
    (tmp / "disk.img").unlink(missing_ok=True)
    (tmp / "disk.img").symlink_to(image(Path(shm) / "disk.img"))
    return str(tmp / "disk.img")


def uring(**options):
    return lambda tmp: UringStorage(image(tmp / "disk.img"), **options)


STORAGES = {
    "ram": lambda tmp: RamStorage(SIZE),
    "file": lambda tmp: FileStorage(image(tmp / "disk.img")),
    "gate": opened_gate,
    "uring": uring(),
    "uring, in memory": lambda tmp: UringStorage(in_memory(tmp)),
    "uring as before Linux 6.1": uring(setup=1),
    "uring as before Linux 5.19": uring(setup=2),
    "uring, O_DIRECT": uring(direct=True),
    "uring, O_DIRECT in blocks of 4K": uring(direct=True, alignment=4096),
}
# Those whose contents are a file.
FILES = [kind for kind in STORAGES if kind.startswith(("file", "uring"))]
BUFFERED = [kind for kind in FILES if "O_DIRECT" not in kind]


requests = st.tuples(
    st.sampled_from([Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES]),
    st.integers(0, SIZE // 512),
    st.one_of(st.integers(0, 40), st.integers(0, SIZE // 512)),
    st.sampled_from([512, 4096, 1000, 77]),
    st.integers(0, 255),
    st.sampled_from([0, UNMAP]),
)


@pytest.mark.parametrize("kind", STORAGES)
@settings(max_examples=40, deadline=None)
@given(mix=st.lists(requests, max_size=30))
def test_contents_are_those_of_a_bytearray(tmp_path_factory, kind, mix):
    with channel_of(STORAGES[kind](tmp_path_factory.mktemp("disk"))) as channel:
        assert_is_a_bytearray(channel, SIZE, mix)


pieces = st.tuples(
    st.sampled_from([Op.READ, Op.WRITE, Op.WRITE, Op.WRITE_ZEROES]),
    st.integers(1, 40),
    st.sampled_from([512, 4096, 1000, 77]),
)


@pytest.mark.parametrize("kind", STORAGES)
@settings(max_examples=20, deadline=None)
@given(mix=st.lists(pieces, min_size=1, max_size=60), sleep=st.booleans())
def test_requests_side_by_side_leave_each_other_alone(tmp_path_factory, kind, mix, sleep):
    # Neighbours on the disk: some share a block, never a sector.
    model = bytearray(random.Random(0).randbytes(SIZE))
    with channel_of(STORAGES[kind](tmp_path_factory.mktemp("disk"))) as channel:
        channel.run(Op.WRITE, 0, SIZE, bytes(model))
        offset, requests, wanted = 512, [], []
        for number, (op, sectors, piece) in enumerate(mix):
            size = sectors * 512
            data = bytes((number + i) % 251 for i in range(size)) if op == Op.WRITE else b""
            requests.append((op, offset, size, data, 0, piece))
            wanted.append((0, bytes(model[offset : offset + size]) if op == Op.READ else b""))
            if op != Op.READ:
                model[offset : offset + size] = data or bytes(size)
            offset += size
        assert channel.run_all(requests, sleep=sleep) == wanted
        assert channel.run(Op.READ, 0, SIZE) == (0, bytes(model))


@pytest.mark.parametrize("kind", FILES)
def test_more_requests_than_a_channel_takes_at_a_time_all_end(tmp_path, kind):
    with channel_of(STORAGES[kind](tmp_path)) as channel:
        writes = [(Op.WRITE, 512 * i, 512, bytes([i % 251]) * 512) for i in range(1000)]
        assert channel.run_all(writes, sleep=True) == [(0, b"")] * 1000
        reads = [(Op.READ, 512 * i, 512) for i in range(1000)]
        assert channel.run_all(reads) == [(0, data) for _, _, _, data in writes]


def test_ram_gives_discarded_pages_back():
    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    size = 64 << 20
    with channel_of(RamStorage(size)) as channel:
        channel.run(Op.WRITE, 0, size, b"x" * size, piece=1 << 20)
        before = resident()
        assert channel.run(Op.DISCARD, 512, size - 512)[0] == 0
        assert resident() < before - size // 2
        assert channel.run(Op.READ, 0, 1024)[1] == b"x" * 512 + bytes(512)


def test_a_huge_copy_takes_many_polls_so_that_a_turn_stays_short():
    storage = RamStorage(64 << 20)
    with channel_of(storage) as channel:
        data = os.urandom(16 << 20)
        assert channel.run(Op.WRITE, 4096, len(data), data, piece=1 << 20)[0] == 0
        assert channel.run(Op.READ, 4096, len(data), piece=3000)[1] == data


def test_null_writes_nothing_into_its_buffers():
    with channel_of(NullStorage(1 << 40)) as channel:
        mark = b"mark" * 1024
        assert channel.run(Op.READ, (1 << 40) - 4096, 4096, mark) == (0, mark)


@pytest.mark.parametrize("kind", FILES)
def test_file_takes_more_pieces_than_one_call_can(tmp_path, kind):
    with channel_of(STORAGES[kind](tmp_path)) as channel:
        data = os.urandom(4000 * 64)
        assert channel.run(Op.WRITE, 512, len(data), data, piece=64)[0] == 0
        assert channel.run(Op.READ, 512, len(data), piece=64)[1] == data
    assert (tmp_path / "disk.img").read_bytes()[512 : 512 + len(data)] == data


@pytest.mark.parametrize("kind", BUFFERED)
def test_file_truncated_under_us_says_eio_and_serves_the_rest(tmp_path, kind):
    with channel_of(STORAGES[kind](tmp_path)) as channel:
        channel.run(Op.WRITE, 0, 4096, b"a" * 4096)
        os.truncate(tmp_path / "disk.img", 2048)
        assert channel.run(Op.READ, 0, 4096)[0] == -errno.EIO
        assert channel.run(Op.READ, 0, 2048) == (0, b"a" * 2048)


@pytest.mark.parametrize("kind", BUFFERED)
def test_a_write_that_the_file_system_refuses_says_why(tmp_path, kind):
    # A limit on file sizes stands for a full file system: both fail in the middle.
    path = tmp_path / "disk.img"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with channel_of(STORAGES[kind](tmp_path)) as channel:
        os.truncate(path, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
        try:
            result, _ = channel.run(Op.WRITE, SIZE // 2 - 2048, 4096, b"x" * 4096, piece=1000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert result == -errno.EFBIG
        assert channel.run(Op.READ, SIZE // 2 - 2048, 2048) == (0, b"x" * 2048)


@pytest.mark.parametrize("storage", [FileStorage, UringStorage])
def test_zeros_reach_a_file_system_without_zero_range(storage):
    # tmpfs punches holes, but has no FALLOC_FL_ZERO_RANGE: zeros are written.
    fd = os.memfd_create("disk")
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"x" * SIZE, 0)
    with channel_of(storage(f"/proc/self/fd/{fd}")) as channel:
        assert channel.run(Op.WRITE_ZEROES, 512, 300 * 1024)[0] == 0
        assert os.pread(fd, SIZE, 0) == b"x" * 512 + bytes(300 * 1024) + b"x" * (
            SIZE - 512 - 300 * 1024
        )
        assert os.fstat(fd).st_blocks * 512 >= SIZE, "not deallocated unless told so"
        assert channel.run(Op.WRITE_ZEROES, 0, SIZE, flags=UNMAP)[0] == 0
        assert os.fstat(fd).st_blocks == 0
    os.close(fd)


@pytest.mark.parametrize("kind", FILES)
def test_close_leaves_no_thread_and_no_fd(tmp_path, kind):
    threads, fds = threading.active_count(), os.listdir("/proc/self/fd")
    for _ in range(3):
        storage = STORAGES[kind](tmp_path)
        channels = [storage.channel() for _ in range(4)]
        for channel in channels:
            assert channel.run(Op.READ, 0, 512)[0] == 0
        for channel in channels:
            channel.close()
        storage.close()
        storage.close()
    assert threading.active_count() == threads
    assert os.listdir("/proc/self/fd") == fds


@pytest.mark.parametrize("kind", FILES)
def test_completions_signal_nobody_who_has_not_asked(tmp_path, kind):
    with channel_of(STORAGES[kind](tmp_path)) as channel:
        channel.run(Op.READ, 0, 512)
        with pytest.raises(BlockingIOError):  # it was never written
            os.eventfd_read(channel.completion_fd)


# What an operator gets wrong ---------------------------------------------------------


def refused(*arguments, **options):
    with pytest.raises(ConfigError) as caught:
        FileStorage(*arguments, **options)
    text = caught.value.args[0]
    assert "\n" not in text and caught.value.hint
    return text


def test_a_bad_image_gets_one_line_that_says_what_to_do(tmp_path):
    assert "no such file" in refused(str(tmp_path / "missing.img"))
    assert "directory" in refused(str(tmp_path))
    assert "directory" in refused(str(tmp_path), read_only=True)
    assert "neither a regular file nor a block device" in refused("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    assert "neither" in refused(str(tmp_path / "pipe"))
    assert "neither" in refused(str(tmp_path / "pipe"), read_only=True)
    assert "less than one block" in refused(image(tmp_path / "empty.img", 0))
    assert "block size 513" in refused(image(tmp_path / "disk.img"), block_size=513)


FORMATS = {
    "qcow": b"QFI\xfb\0\0\0\1",
    "qcow2": b"QFI\xfb\0\0\0\3",
    "vmdk": b"KDMV\1\0\0\0",
    "vmdk with its data elsewhere": b"# Disk DescriptorFile\nversion=1\n",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
    "vhdx": b"vhdxfile",
    "vpc": b"conectix",
    "qed": b"QED\0",
    "parallels": b"WithoutFreeSpace",
}


@pytest.mark.parametrize("kind", [FileStorage, UringStorage, partial(UringStorage, direct=True)])
@pytest.mark.parametrize("name", FORMATS)
def test_an_image_in_another_format_is_not_served_as_raw(tmp_path, name, kind):
    path = tmp_path / "a disk"
    path.write_bytes(FORMATS[name].ljust(4100, b"\0"))  # no whole number of blocks
    for read_only in (False, True):
        with pytest.raises(ConfigError, match=f"a {name.split()[0]} image, which") as caught:
            kind(str(path), read_only=read_only)
        assert f"-f {name.split()[0]} -k /tmp/nbd '{path}'" in caught.value.hint
        assert ("qemu-nbd -t -r " in caught.value.hint) == read_only
    storage = kind(str(path), raw=True)
    assert storage.size_bytes == 4096
    storage.close()


def test_an_encrypted_image_is_served_and_said(tmp_path, caplog):
    path = tmp_path / "disk.img"
    path.write_bytes(b"LUKS\xba\xbe".ljust(512, b"\0"))
    with caplog.at_level(logging.WARNING, "vhostpy"):
        FileStorage(str(path)).close()
    assert "encrypted by LUKS" in caplog.text


def test_a_read_only_file_opens_only_read_only():
    path = "/proc/sys/kernel/ostype"  # 0444, and that holds for root too
    assert "permission denied" in refused(path)
    assert "less than one block" in refused(path, read_only=True), "it could be opened"


def test_a_read_only_image_is_not_written(tmp_path):
    with channel_of(FileStorage(image(tmp_path / "disk.img"), read_only=True)) as channel:
        assert channel.run(Op.READ, 0, 512) == (0, bytes(512))
        assert channel.run(Op.WRITE, 0, 512, b"x" * 512)[0] == -errno.EBADF


def test_an_odd_size_is_rounded_down_and_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "vhostpy"):
        storage = FileStorage(image(tmp_path / "disk.img", 1000))
    assert storage.size_bytes == 512
    assert "488 bytes" in caplog.text
    storage.close()


# Which storage serves a file ----------------------------------------------------------


def test_a_file_is_served_by_io_uring(tmp_path, caplog):
    storage = open_file(image(tmp_path / "disk.img"))
    assert isinstance(storage, UringStorage)
    assert not caplog.text
    storage.close()


def not_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "vhostpy.backends.storage.uring", None)


def not_allowed(monkeypatch):
    def refuse(*arguments):
        raise UringUnavailable("Operation not permitted")

    monkeypatch.setattr(uring_module, "UringStorage", refuse)


@pytest.mark.parametrize(
    ("cause", "words"), [(not_built, "without liburing"), (not_allowed, "not permitted")]
)
def test_without_io_uring_threads_serve_and_one_line_says_why(
    tmp_path, monkeypatch, caplog, cause, words
):
    path = image(tmp_path / "disk.img")
    cause(monkeypatch)
    with caplog.at_level(logging.WARNING, "vhostpy"):
        storage = open_file(path, block_size=4096)
    assert isinstance(storage, FileStorage)
    assert (storage.block_size, len(caplog.records)) == (4096, 1)
    assert words in caplog.text and "next: " in caplog.text
    storage.close()
    with pytest.raises(ConfigError, match=f"O_DIRECT needs io_uring.*{words}"):
        open_file(path, direct=True)


def test_an_image_on_a_block_device(tmp_path):
    with loop_device(tmp_path) as path, channel_of(UringStorage(path, direct=True)) as channel:
        assert channel.run(Op.WRITE, 4096, 8192, b"x" * 8192) == (0, b"")
        assert channel.run(Op.WRITE_ZEROES, 4096, 4096, flags=UNMAP)[0] == 0
        assert channel.run(Op.DISCARD, 0, 4096)[0] == 0
        assert channel.run(Op.FLUSH, 0, 0)[0] == 0
        assert channel.run(Op.READ, 4096, 8192) == (0, bytes(4096) + b"x" * 4096)


@contextmanager
def loop_device(tmp_path):
    path = image(tmp_path / "disk.img")
    made = subprocess.run(
        ["losetup", "--find", "--show", path], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    try:
        yield made.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
