"""The file in which positions of packed rings outlive us: whose it is, and what it holds."""

import os
import stat

import pytest

from vhostpy.errors import ConfigError
from vhostpy.ring.positions import Keeper

FILE = (7, 4711)  # device and inode of some guest's memory
NAME = "vu0.rings"


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path


def life(folder, **owners):
    """A process's file; it keeps its lock as long as it lives."""
    return Keeper(str(folder), NAME, owners or {"vu0": 2})


def test_positions_are_found_in_the_next_life_by_memory_address_and_size(folder):
    keeper = life(folder)
    owner = keeper.owners["vu0"]
    for index, position in enumerate([0x8001, 0x7]):
        place = owner.claim(FILE, 0x1000 * index, 256)
        assert place.found is None
        place.start(position)
    del place, owner, keeper
    keeper = life(folder, other=4, vu0=2)
    owner = keeper.owners["vu0"]
    assert owner.claim(FILE, 0x1000, 256).found == (0x7, 0x7)
    assert owner.claim(FILE, 0, 128).found is None
    assert owner.claim((7, 4712), 0, 256).found is None
    assert owner.claim(FILE, 0, 256).found == (0x8001, 0x8001)
    assert owner.claim(FILE, 0x5000, 256) is None  # as many rings as there is room for
    assert keeper.owners["other"].claim(FILE, 0x1000, 256).found is None


def test_a_ring_that_moves_or_is_forgotten_is_not_found_where_it_was(folder):
    keeper = life(folder)
    owner = keeper.owners["vu0"]
    moved, forgotten = (owner.claim(FILE, gpa, 64) for gpa in (0, 0x1000))
    for place in (moved, forgotten):
        place.start(3)
    moved.move((8, 1), 0x2000)
    forgotten.forget()
    for place in (moved, forgotten):
        owner.release(place)
    assert owner.claim(FILE, 0, 64).found is None
    assert owner.claim(FILE, 0x1000, 64).found is None
    assert owner.claim((8, 1), 0x2000, 64).found == (3, 3)


def test_an_owners_oldest_positions_go_first_and_nobody_elses(folder):
    keeper = life(folder, vu0=1, vu1=1)
    other = keeper.owners["vu1"].claim(FILE, 0, 64)
    other.start(9)
    keeper.owners["vu1"].release(other)
    for gpa in range(5):
        place = keeper.owners["vu0"].claim(FILE, gpa, 64)
        place.start(gpa)
        keeper.owners["vu0"].release(place)
    del place, other, keeper
    keeper = life(folder, vu1=1, vu0=1)
    found = [keeper.owners["vu0"].claim(FILE, gpa, 64).found for gpa in (4, 3)]
    assert found == [(4, 4), (3, 3)]
    assert keeper.owners["vu1"].claim(FILE, 0, 64).found == (9, 9)


def test_the_file_is_private_and_whole_and_one_processes(folder):
    keeper = life(folder)
    status = (folder / NAME).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 >= status.st_size  # a store to a hole may find no room
    with pytest.raises(ConfigError, match="in use"):
        life(folder)
    del keeper
    life(folder)
    assert os.listdir(folder) == [NAME]


def test_a_file_with_nothing_in_it_goes_with_its_process(folder):
    keeper = life(folder)
    place = keeper.owners["vu0"].claim(FILE, 0, 64)
    place.start(1)
    keeper.close()
    assert os.listdir(folder) == [NAME]
    place.forget()
    keeper.close()
    assert os.listdir(folder) == []


@pytest.mark.parametrize("trick", ["symlink", "hard link", "fifo", "directory", "open folder"])
def test_what_others_could_have_put_there_is_not_taken(folder, trick):
    elsewhere = folder / "elsewhere"
    elsewhere.write_bytes(b"precious")
    if trick == "symlink":
        (folder / NAME).symlink_to(elsewhere)
    elif trick == "hard link":
        (folder / NAME).hardlink_to(elsewhere)
    elif trick == "fifo":
        os.mkfifo(folder / NAME)
    elif trick == "directory":
        (folder / NAME).mkdir()
    else:
        folder.chmod(0o777)
    before = sorted(os.listdir(folder))
    with pytest.raises(ConfigError):
        life(folder)
    assert sorted(os.listdir(folder)) == before
    assert elsewhere.read_bytes() == b"precious"


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100, b"vhostpy positions 1\n"])
def test_a_file_that_is_none_of_ours_is_replaced(folder, content):
    (folder / NAME).write_bytes(content)
    assert life(folder).owners["vu0"].claim(FILE, 0, 64).found is None
