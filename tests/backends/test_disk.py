"""A disk as its front-end sees it: features, config space, options."""

import struct

import pytest

from tests.backends.machine import SECTORS, SIZE, image
from vhostpy._spec import Feature
from vhostpy.backends.blk.device import CONFIG, CONFIG_FIELDS, Disk
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.null import NullStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import ConfigError, ProtocolError
from vhostpy.runtime.pool import Workers


def config_of(disk):
    return dict(zip(CONFIG_FIELDS, CONFIG.unpack(disk.config()), strict=True))


def test_each_feature_comes_with_a_config_value_that_makes_sense(tmp_path):
    workers = Workers()
    path = image(tmp_path / "disk.img")
    for storage, options in [
        (NullStorage(1 << 40), {}),
        (RamStorage(SIZE), {"queues": 1}),
        (FileStorage(path, read_only=True), {"block_size": 4096, "read_only": True}),
        (FileStorage(path, read_only=True), {}),
        (FileStorage(path, read_only=True, block_size=4096), {"queues": 256}),
        (FileStorage(image(tmp_path / "other.img")), {}),
    ]:
        disk = Disk("vb0", storage, workers, **options)
        config = config_of(disk)

        def has(bit, disk=disk):
            return bool(disk.features() >> bit & 1)

        assert config["capacity"] == storage.size_bytes // 512
        assert not has(Feature.BLK_SIZE_MAX) and config["size_max"] == 0
        assert has(Feature.BLK_SEG_MAX) and config["seg_max"] == 126
        assert has(Feature.BLK_BLK_SIZE) and config["blk_size"] in (512, 4096)
        assert config["blk_size"] << config["physical_block_exp"] == 4096
        assert has(Feature.BLK_MQ) == (config["num_queues"] > 1) == (disk.queue_number > 1)
        assert has(Feature.BLK_RO) == disk.read_only
        for name, bit in (("discard", Feature.BLK_DISCARD),
                          ("write_zeroes", Feature.BLK_WRITE_ZEROES)):  # fmt: skip
            assert has(bit) == (not disk.read_only)
            assert (config[f"max_{name}_sectors"] > 0) == has(bit)
            assert (config[f"max_{name}_seg"] > 0) == has(bit)
        # Zeros in a file are no promise of what lies below.
        assert has(Feature.BLK_SECURE_ERASE) == (
            isinstance(storage, RamStorage) and not disk.read_only
        )
        for name in ("max_secure_erase_sectors", "max_secure_erase_seg",
                     "secure_erase_sector_alignment"):  # fmt: skip
            assert (config[name] > 0) == has(Feature.BLK_SECURE_ERASE)
        assert len(disk.config()) == 96
        storage.close()


def test_config_offsets_are_the_standard_s():
    # virtio 1.3, "Block Device / Device configuration layout"
    config = Disk("vb0", RamStorage(SIZE), Workers(), queues=7).config()
    assert struct.unpack_from("<Q", config, 0) == (SECTORS,)
    assert struct.unpack_from("<I", config, 12) == (126,)
    assert struct.unpack_from("<I", config, 20) == (512,)
    assert config[24] == 3 and config[32] == 1
    assert struct.unpack_from("<H", config, 34) == (7,)
    assert struct.unpack_from("<III", config, 36) == (1 << 19, 32, 8)
    assert struct.unpack_from("<II", config, 48) == (1 << 19, 32)
    assert config[56] == 1


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, bytes(8)), (32, b"\2"), (32, b"\0\0"), (33, b"\0"), (32, b""), (95, b"\0")],
)
def test_only_writeback_can_be_written(offset, data):
    disk = Disk("vb0", RamStorage(SIZE), Workers())
    before = disk.config()
    with pytest.raises(ProtocolError, match="SET_CONFIG"):
        disk.write_config(offset, data)
    assert disk.config() == before


def test_bad_options_are_the_operator_s():
    for options in ({"queues": 0}, {"queues": 257}, {"serial": "x" * 21}, {"serial": "é"},
                    {"block_size": 100}):  # fmt: skip
        with pytest.raises(ConfigError, match="vb0"):
            Disk("vb0", RamStorage(SIZE), Workers(), **options)
    with pytest.raises(ConfigError, match="no multiple"):
        Disk("vb0", RamStorage(SIZE - 512), Workers(), block_size=4096)
