"""Where a hostile front-end says that a ring, its log and its call fd are."""

import os

import pytest

from tests.hostile.chains import SIZE, works
from tests.rings import (
    EVENT_IDX,
    GPA,
    LAYOUTS,
    USED,
    UVA,
    Rings,
    events,
)
from vhostpy._ring import Virtqueue
from vhostpy.errors import GuestError, ProtocolError
from vhostpy.memory.guest import DirtyLog, GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping

each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def ring_at(rings, **changes):
    place = {"desc_uva": UVA, "avail_uva": UVA + 65536, "used_uva": UVA + 131072} | changes
    size = place.pop("size", SIZE)
    features = rings.features & ~(EVENT_IDX | place.pop("without", 0)) | place.pop("features", 0)
    return Virtqueue(rings.memory, size, features, **place)


@each_layout
@pytest.mark.parametrize("size", [0, 3, 63, 65, 32767, 32769, 65535, 65536, 2**32 + 64, -64])
def test_a_ring_of_a_bad_size(layout, size):
    with Rings(layout) as rings:
        if layout == "packed" and 0 < size < 32768:
            assert ring_at(rings, size=size).size == size
            return
        with pytest.raises(ProtocolError, match=str(size)):
            ring_at(rings, size=size)


@each_layout
@pytest.mark.parametrize(
    ("part", "offsets"), [("desc", [1, 2, 4, 8]), ("avail", [1, 2]), ("used", [1, 2])]
)
def test_a_ring_that_is_not_aligned(layout, part, offsets):
    with Rings(layout) as rings:
        for offset in offsets:
            if (layout, part, offset) == ("split", "avail", 2):
                assert ring_at(rings, avail_uva=UVA + 2)
                continue
            with pytest.raises(ProtocolError, match="aligned"):
                ring_at(rings, **{f"{part}_uva": UVA + offset})


@each_layout
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_a_ring_that_is_aligned_only_for_the_front_end(layout, offset):
    """The region starts at an odd place in its file: our own address is what we load from."""
    with Rings(layout) as rings:
        odd = RegionInfo(GPA, 1 << 20, UVA, Mapping(rings.fd, offset, 1 << 20))
        with pytest.raises(ProtocolError, match="aligned"):
            Virtqueue(
                GuestMemory([odd]),
                SIZE,
                rings.features,
                desc_uva=UVA,
                avail_uva=UVA + 65536,
                used_uva=UVA + 131072,
            )


@each_layout
@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize(
    "uva", [0, UVA - 16, UVA + (2 << 20) - 16, UVA + (2 << 20), 2**64 - 16, 2**64, -16]
)
def test_a_ring_that_is_not_in_one_region(layout, part, uva):
    with Rings(layout) as rings:
        if uva == UVA + (2 << 20) - 16 and layout == "packed" and part != "desc":
            assert ring_at(rings, **{f"{part}_uva": uva})  # four bytes
            return
        with pytest.raises(ProtocolError):
            ring_at(rings, **{f"{part}_uva": uva})


@pytest.mark.parametrize(("part", "end"), [("avail", 4 + 2 * SIZE), ("used", 4 + 8 * SIZE)])
def test_the_event_field_must_be_in_the_region_too(part, end):
    with Rings("split") as rings:
        place = {f"{part}_uva": UVA + (2 << 20) - end}
        ring_at(rings, **place)
        with pytest.raises(ProtocolError):
            ring_at(rings, features=EVENT_IDX, **place)


@pytest.mark.parametrize(
    ("layout", "base"),
    [
        *[("split", base) for base in (-1, 65536, 2**32)],
        *[("packed", base) for base in (-1, 2**32, SIZE, 0x7FFF, 0xFFFF, 0x8000 | SIZE)],
        *[("packed", base << 16) for base in (SIZE, 0x7FFF, 0xFFFF, 0x8000 | SIZE)],
    ],
)
def test_a_base_beyond_the_ring(layout, base):
    with Rings(layout) as rings, pytest.raises(ProtocolError):
        ring_at(rings, base=base)


@each_layout
def test_a_refused_change_leaves_the_ring_as_it_was(layout):
    with Rings(layout, size=SIZE) as rings:
        rings.device.set_live(False)
        fd = os.memfd_create("small")
        os.truncate(fd, 4096)
        elsewhere = GuestMemory([RegionInfo(0, 4096, 0x1000, Mapping(fd, 0, 4096))])
        os.close(fd)
        with pytest.raises(ProtocolError):
            rings.device.remap(elsewhere)
        with pytest.raises(ProtocolError):
            rings.device.set_addresses(desc_uva=UVA, avail_uva=UVA + 65536, used_uva=0)
        rings.device.set_live(True)
        works(rings)


@each_layout
def test_parts_of_the_ring_on_top_of_each_other(layout):
    """The guest reads nonsense; we write inside its ring and nowhere else."""
    with Rings(layout, size=SIZE) as rings:
        place = UVA + (1 << 20)
        rings.start(desc_uva=place, avail_uva=place, used_uva=place)
        if layout == "packed":
            rings.memory.write(place - UVA + GPA, bytes(range(256)) * (16 * SIZE // 256))
        for _ in range(50):
            try:
                rings.device.give([(taken, 1) for taken in rings.device.take()])
            except GuestError:
                break
        assert rings.memory.read(GPA + (1 << 20) - 4096, 4096) == bytes(4096)
        assert rings.memory.read(GPA + (1 << 20) + 16 * SIZE, 4096) == bytes(4096)


# Notifications and the dirty log.


@each_layout
def test_a_call_fd_that_cannot_be_written(layout):
    with Rings(layout, size=SIZE) as rings:
        full = os.eventfd(0, os.EFD_NONBLOCK)
        os.eventfd_write(full, 2**64 - 2)
        reader, writer = os.pipe()
        os.close(reader)
        closed = os.eventfd(0)
        os.close(closed)
        readonly = os.open("/dev/null", os.O_RDONLY)
        for fd in (full, writer, readonly, closed, 2**31 - 1):
            rings.start(rings.device.base, call_fd=fd)
            works(rings)
            rings.device.notify()
        assert events(full) == 2**64 - 2
        for fd in (full, writer, readonly):
            os.close(fd)


@each_layout
@pytest.mark.parametrize("size", [1, 64, 4096])
@pytest.mark.parametrize("used_log_gpa", [0, USED, 2**63, 2**64 - 4096])
def test_writes_beyond_the_dirty_log(layout, size, used_log_gpa):
    """CVE-2019-14835, CVE-2020-10722: the bits would lie past the log's end."""
    with Rings(layout, size=SIZE, event_idx=True) as rings:
        fd = os.memfd_create("log")
        os.truncate(fd, 2 * 4096)
        log = DirtyLog(fd, 0, size)
        rings.device.set_live(False)
        rings.device.set_log(log, used_log_gpa)
        rings.device.set_live(True)
        works(rings)
        rings.device.want_kicks()
        works(rings)
        assert os.pread(fd, 8192, size) == bytes(8192 - size)
        assert log.pages() == ([0] if used_log_gpa == 0 else [])
        os.close(fd)


@each_layout
@pytest.mark.parametrize("gpa", [-1, 2**64 - 2, 2**64])
def test_a_log_address_beyond_64_bits(layout, gpa):
    with Rings(layout) as rings:
        log = rings.log()
        rings.device.set_live(False)
        with pytest.raises(ProtocolError):
            rings.device.set_log(log, gpa)
