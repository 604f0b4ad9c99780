"""Socket files where somebody else may write, too."""

import contextlib
import grp
import os
import socket
import stat

import pytest

from tests.serving import serving
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import ConfigError
from vhostpy.server import listen
from vhostpy.system.unixsocket import remove_if


def some_group():
    """One that we may give a file to: of root, any; and it is not the file's already."""
    numbers = [g.gr_gid for g in grp.getgrall()] if os.geteuid() == 0 else os.getgroups()
    number = next((n for n in numbers if n != os.getegid()), os.getegid())
    return grp.getgrgid(number)


def facts(path):
    status = os.stat(path)
    return stat.S_IMODE(status.st_mode), status.st_gid


def listener_at(path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


@pytest.fixture
def swap(monkeypatch):
    """Has something done to the path right after a socket was bound to it."""
    work = []

    class Watched(socket.socket):
        def bind(self, path):
            super().bind(path)
            while work:
                work.pop()(path)

    monkeypatch.setattr(listen.socket, "socket", Watched)
    return work.append


def test_the_socket_gets_its_mode_and_its_group(tmp_path):
    path, group = str(tmp_path / "s"), some_group()
    for mode, name in ((0o660, group.gr_name), (0o606, None)):
        listen._listen(path, mode, name).close()
        gid = os.getegid() if name is None else group.gr_gid
        assert facts(path) == (mode, gid)
        os.unlink(path)


@pytest.mark.parametrize("what", ["link", "link to a socket", "file", "socket"])
def test_what_somebody_puts_in_the_sockets_place_keeps_its_mode_and_group(tmp_path, swap, what):
    path, target = str(tmp_path / "s"), str(tmp_path / "precious")
    with contextlib.ExitStack() as stack:
        if "socket" in what:
            stack.enter_context(listener_at(target))
        else:
            open(target, "w").close()
        os.chmod(target, 0o600)
        before = facts(target)

        def in_its_place(bound):
            if "link" in what:
                os.unlink(bound)
                os.symlink(target, bound)
            else:
                os.rename(target, bound)

        swap(in_its_place)
        with pytest.raises(ConfigError):
            listen._listen(path, 0o666, some_group().gr_name)
        assert facts(path) == before


def test_a_directory_that_turns_into_a_link_meanwhile_leads_nowhere_else(tmp_path, swap):
    for name in ("mine", "yours"):
        (tmp_path / name).mkdir()
    with listener_at(tmp_path / "yours" / "s"):
        os.chmod(tmp_path / "yours" / "s", 0o600)

        def elsewhere(bound):
            os.rename(tmp_path / "mine", tmp_path / "moved")
            os.symlink(tmp_path / "yours", tmp_path / "mine")

        swap(elsewhere)
        with pytest.raises(ConfigError, match="somebody has put something else"):
            listen._listen(str(tmp_path / "mine" / "s"), 0o666, None)
        assert facts(tmp_path / "yours" / "s")[0] == 0o600


def test_only_our_own_socket_is_removed_at_the_end(tmp_path, workers):
    path = tmp_path / "s"
    with serving(listen.Server(Disk("d", RamStorage(1 << 20), workers), path=str(path))):
        path.unlink()
        others = listener_at(path)
    assert path.exists()
    others.close()


def test_what_is_removed_is_looked_at_in_its_own_directory(tmp_path):
    for name in ("mine", "yours"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s").touch()

    def swapped(status):
        os.rename(tmp_path / "mine", tmp_path / "moved")
        os.symlink(tmp_path / "yours", tmp_path / "mine")
        return True

    remove_if(tmp_path / "mine" / "s", swapped)
    assert (tmp_path / "yours" / "s").exists() and not (tmp_path / "moved" / "s").exists()
    remove_if(tmp_path / "none" / "s", swapped)
    remove_if(tmp_path / "moved" / "s", swapped)
