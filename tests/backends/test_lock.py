"""The lock on an image, against ourselves, QEMU's tools, and the dead."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from vhostpy.backends.storage import lock
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.storage import Op
from vhostpy.backends.storage.uring import UringStorage
from vhostpy.errors import ConfigError

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return str(path)


@pytest.fixture
def no_grace(monkeypatch):
    monkeypatch.setattr(lock, "GRACE_S", 0.0)


HOLD = """
import sys, time
from vhostpy.backends.storage.file import FileStorage
storage = FileStorage(sys.argv[1], read_only=sys.argv[2] == "ro")
print("locked", flush=True)
time.sleep(60)
"""


def holding(path, access="rw"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path, access], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("kind", [FileStorage, UringStorage])
def test_a_second_writer_is_refused_and_told_who_has_it(path, kind, no_grace):
    with holding(path) as process:
        for read_only in (False, True):
            with pytest.raises(ConfigError, match=rf"in use by python\S* \(pid {process.pid}\)"):
                kind(path, read_only=read_only)
        process.kill()
    kind(path).close()  # and free again


def test_readers_share_an_image_and_keep_writers_out(path, no_grace):
    with holding(path, "ro") as process:
        storage = FileStorage(path, read_only=True)
        with pytest.raises(ConfigError, match="in use by"):
            FileStorage(path)
        storage.close()
        process.kill()


def test_both_ends_of_a_migration_share_an_image_and_nobody_else(path, no_grace):
    here, there = (FileStorage(path, share_rw=True) for _ in range(2))
    with pytest.raises(ConfigError, match="--share-rw"):
        FileStorage(path)
    here.close()
    there.close()


def test_the_same_process_is_refused_too(path, no_grace):
    storage = FileStorage(path)
    with pytest.raises(ConfigError, match="in use by this process"):
        FileStorage(path)
    storage.close()
    FileStorage(path).close()


def test_a_refused_attempt_leaves_no_lock_and_no_fd(path, no_grace):
    fds = os.listdir("/proc/self/fd")
    with holding(path, "ro") as process:
        with pytest.raises(ConfigError):
            FileStorage(path)
        assert os.listdir("/proc/self/fd") != fds  # the pipe
        # A writer's byte 101 would keep this one out.
        FileStorage(path, read_only=True).close()
        process.kill()
    assert len(os.listdir("/proc/self/fd")) == len(fds)


def test_a_closed_storage_is_free_at_once(path):
    # The kernel takes a ring apart when it has time; QEMU does not wait for that.
    for _ in range(20):
        storage = UringStorage(path)
        channel = storage.channel()
        assert channel.run(Op.WRITE, 0, 512, b"x" * 512)[0] == 0
        channel.close()
        storage.close()
        fd = os.open(path, os.O_RDWR)
        assert lock._try_lock(fd, path, [lock.CONSISTENT_READ, lock.WRITE], [lock.WRITE])
        os.close(fd)


def test_what_ends_soon_is_waited_for(path):
    with holding(path) as process:
        os.kill(process.pid, signal.SIGTERM)
        FileStorage(path).close()


# Somebody who cannot be seen holds it: as the kernel does for a process that was killed.


def test_the_dead_are_waited_for_with_progress(path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "_holder", lambda fd: "")
    fd = os.open(path, os.O_RDWR)
    lock._lock(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, lock.UNSHARED + lock.WRITE)
    naps = []

    def nap(time_s):
        naps.append(time_s)
        if len(naps) == 3:
            os.close(fd)

    monkeypatch.setattr(lock.time, "sleep", nap)
    FileStorage(path).close()
    assert len(naps) == 3
    assert "waiting 30 s more at most" in caplog.text


def test_the_wait_ends(path, monkeypatch):
    monkeypatch.setattr(lock, "_holder", lambda fd: "")
    monkeypatch.setattr(lock, "WAIT_S", 0.1)
    storage = FileStorage(path)
    started = time.monotonic()
    with pytest.raises(ConfigError, match="which cannot be seen from here"):
        FileStorage(path)
    assert time.monotonic() - started >= 0.1
    storage.close()


def test_a_killed_process_that_still_shows_is_no_living_holder(path):
    with holding(path) as process:
        fd = os.open(path, os.O_RDONLY)
        assert str(process.pid) in lock._holder(fd)
        assert not lock._is_dying(str(process.pid))
        process.kill()
        process.wait()
        assert lock._holder(fd) == ""
        os.close(fd)


def test_a_file_system_without_locks_is_served_with_a_warning(path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock, "_lock", refuse)
    FileStorage(path).close()
    assert "nothing keeps a second process from it" in caplog.text
