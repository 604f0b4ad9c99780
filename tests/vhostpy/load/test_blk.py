"""Requests, on disks that behave and disks that do not."""

import pytest

from tests.serving import serving
from tests.vhostpy.load.short import request
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import ConfigError
from vhostpy.load import blk, report
from vhostpy.server.listen import Server

LAYOUTS = ("split", "packed")
MIB = 1 << 20


@pytest.mark.parametrize("pattern", ["randread", "randwrite", "read", "write", "mix"])
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read_back(disk, pattern, indirect, queues, layout):
    plan = {"indirect": indirect, "queues": queues, "layout": layout}
    result = request(disk, pattern=pattern, verify=True, **plan)
    assert result["kiops"] > 0 and report.wrong(result) == ""
    # Whatever the pattern, verification reads, and writes.
    assert result["reads"] > 0 and result["writes"] > 0
    assert (result["read_kiops"] > 0) == ("read" in pattern or pattern == "mix")
    assert (result["write_kiops"] > 0) == ("write" in pattern or pattern == "mix")


@pytest.mark.parametrize("block_bytes", [512, 4096, 131072])
def test_requests_of_any_size_are_verified(disk, block_bytes):
    result = request(disk, pattern="mix", verify=True, block_bytes=block_bytes)
    assert report.wrong(result) == "" and result["reads"] > 0


def test_reads_alone_write_nothing(workers, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"\x5a" * MIB)
    storage = FileStorage(str(image))
    with serving(server := Server(Disk("d", storage, workers), path=str(tmp_path / "d"))):
        assert request(server.path)["writes"] == 0
    storage.close()
    assert image.read_bytes() == b"\x5a" * MIB


def test_a_span_is_kept(workers, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    storage = FileStorage(str(image))
    with serving(server := Server(Disk("d", storage, workers), path=str(tmp_path / "d"))):
        request(server.path, pattern="randwrite", span_bytes=MIB // 2)
    storage.close()
    data = image.read_bytes()
    assert not any(data[MIB // 2 :]) and any(data[: MIB // 2])


def test_contents_that_change_behind_our_back_are_found(workers, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    storage = FileStorage(str(image))

    class Vandal:
        def show(self, text):
            with image.open("r+b") as file:
                file.seek(MIB // 2 + 700)
                file.write(b"x")

        def done(self):
            pass

    plan = {"block_bytes": 64 << 10, "verify": True, "seconds": 1.3, "warmup_s": 0.05}
    with serving(server := Server(Disk("d", storage, workers), path=str(tmp_path / "d"))):
        result = blk.run(blk.BlkPlan(server.path, **plan), Vandal())
    storage.close()
    assert result["corrupt_requests"] > 0
    assert report.wrong(result) == f"{result['corrupt_requests']} corrupt requests"


def test_requests_that_fail_are_counted(workers, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    storage = FileStorage(str(image))
    with serving(server := Server(Disk("d", storage, workers), path=str(tmp_path / "d"))):
        image.open("r+b").truncate(MIB // 2)
        result = request(server.path)
    storage.close()
    assert result["failed_requests"] > 0 and result["reads"] > 0
    assert report.wrong(result)


def test_a_read_only_disk_is_not_written_to(workers, tmp_path):
    storage = RamStorage(MIB)
    device = Disk("d", storage, workers, read_only=True)
    with serving(server := Server(device, path=str(tmp_path / "d"))):
        assert request(server.path)["reads"] > 0
        for plan in ({"pattern": "write"}, {"verify": True}):
            with pytest.raises(ConfigError, match="read-only"):
                request(server.path, **plan)


@pytest.mark.parametrize(
    ("plan", "text", "hint"),
    [
        ({"depth": 400}, "400 requests need 1200 descriptors", "--depth 341"),
        ({"block_bytes": 700}, "requests of 700 bytes", "--block-size 512"),
        ({"block_bytes": 8 * MIB}, "the disk has 4194304 bytes", "a smaller --block-size"),
        ({"span_bytes": 8 * MIB}, "a span of 8388608 bytes", "a smaller --span"),
        ({"queues": 5}, "the disk has 4 queues", "--queues 4"),
        ({"in_order": True}, "IN_ORDER", "leave --in-order"),
    ],
)
def test_what_a_disk_cannot_do_is_told(disk, plan, text, hint):
    with pytest.raises(ConfigError, match=text) as caught:
        request(disk, **plan)
    assert hint in caught.value.hint
