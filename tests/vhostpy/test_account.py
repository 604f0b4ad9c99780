"""Shares of what is finite: how large, and what becomes of who asks for more."""

import os
import resource

import pytest

from tests.hostile.victim import eventually
from tests.serving import serving
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import ProtocolError
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.memory.mapping import Mapping
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import encode
from vhostpy.protocol.payloads import VringFile
from vhostpy.server.listen import Server
from vhostpy.site.site import App
from vhostpy.system import account
from vhostpy.system.account import Account
from vhostpy.system.fds import OwnedFd

RINGS = 4


@pytest.fixture
def among():
    """`among(n)`: accounts of n sockets, and no other."""
    before = list(account._sockets)
    opened: list[Account] = []

    def open_all(count: int) -> list[Account]:
        for other in account._sockets:
            other.close()
        opened.extend(Account() for _ in range(count))
        for one in opened:
            one.open()
        return opened

    yield open_all
    for one in opened:
        one.close()
    for other in before:
        other.open()


def test_a_hundred_sockets_have_room_for_large_guests(among, monkeypatch):
    """128 queue pairs, 509 regions and a log, replaced while a new one is mapped: by the
    defaults of a system."""
    monkeypatch.setattr(account, "fd_limit", lambda: 524_288)
    monkeypatch.setattr(account, "mapping_limit", lambda: 65_530)
    one = among(100)[0]
    assert one.fds_share >= 3 * 2 * 128 + 253
    assert one.mappings_share >= 509 + 8 + 2 + 2
    assert one.mapped_bytes_share >= 2 * 256 << 30


def test_what_goes_gives_its_share_to_those_that_stay(among):
    first, second = among(2)
    half = first.mapped_bytes_share
    second.close()
    assert first.mapped_bytes_share == 2 * half
    assert second.mapped_bytes_share == 2 * half  # what it still has is bounded by the whole


def test_a_limit_that_is_none_counts_as_what_a_system_allows(monkeypatch):
    none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: none)
    assert account.fd_limit() == 1 << 20


@pytest.mark.parametrize("limit", [2 * 3 * RINGS - 2, 2 * 3 * RINGS])
def test_a_share_too_small_for_all_queues_is_told_at_the_start(
    among, workers, monkeypatch, caplog, limit
):
    monkeypatch.setattr(account, "fd_limit", lambda: limit)
    among(0)
    server = Server(Disk("disk", RamStorage(1 << 20), workers, queues=RINGS), path="unused")
    App("blk", workers=workers, servers=[server])._advise()
    assert ("all 4 queues needs 12" in caplog.text) == (limit < 2 * 3 * RINGS)


def test_the_mapping_beyond_the_share_is_refused_and_none_of_others(among, monkeypatch):
    monkeypatch.setattr(account, "mapping_limit", lambda: 16)
    greedy, other = among(2)
    with OwnedFd(os.memfd_create("guest")) as fd:
        os.ftruncate(fd.fileno(), 4096)
        kept = [Mapping(fd.fileno(), 0, 4096, greedy) for _ in range(7)]
        with pytest.raises(ProtocolError, match="more than 7 mappings: the share of each of 2"):
            Mapping(fd.fileno(), 0, 4096, greedy)
        kept.append(Mapping(fd.fileno(), 0, 4096, other))
        kept.pop(0)
        kept.append(Mapping(fd.fileno(), 0, 4096, greedy))
        assert (greedy.mappings, other.mappings) == (7, 1)
        del kept
        assert (greedy.mappings, greedy.mapped_bytes, other.mappings) == (0, 0, 0)


def test_what_is_refused_for_another_reason_counts_for_nothing():
    one = Account()
    with OwnedFd(os.memfd_create("guest")) as fd, pytest.raises(ProtocolError):
        Mapping(fd.fileno(), 0, 4096, one)
    assert (one.mappings, one.mapped_bytes) == (0, 0)


def test_more_fds_than_the_share_end_their_session_by_name(
    among, workers, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(account, "fd_limit", lambda: 2 * 2 * 3 * RINGS)
    among(0)
    paths = [str(tmp_path / name) for name in ("greedy", "other")]
    disks = [Disk(path, RamStorage(1 << 20), workers, queues=RINGS) for path in paths]
    servers = [Server(disk, path=path) for disk, path in zip(disks, paths, strict=True)]
    kinds = (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR)
    with serving(*servers), OwnedFd(os.eventfd(0)) as fd:
        with FrontEnd(paths[0]) as greedy, FrontEnd(paths[1]) as other:
            for ring in range(RINGS):
                for kind in kinds:  # all that a guest needs
                    greedy.send_raw(encode(kind, VringFile(ring, True)), [fd])
            greedy.get_features()
            assert servers[0].status()["account"]["fds"] == 3 * RINGS
            assert servers[0].status()["account"]["fds_share"] == 3 * RINGS
            greedy.send_raw(encode(R.SET_BACKEND_REQ_FD), [fd])
            assert greedy.hung_up()
            share = "more than 12 file descriptors: the share of each of 2 sockets"
            eventually(lambda: share in caplog.text)
            other.set_mem_table()
        eventually(lambda: not servers[0].account.fds)
