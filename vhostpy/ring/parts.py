"""A virtqueue's three parts: their sizes and alignments, and where a ring starts.

Source: virtio 1.3, "Split Virtqueues", "Packed Virtqueues"; vhost-user, "A vring
descriptor index for split virtqueues", "Vring descriptor indices for packed virtqueues".
"""

from vhostpy._spec import Feature, Limit
from vhostpy.errors import ProtocolError


def is_packed(features: int) -> bool:
    """Which layout these features mean."""
    return bool(features >> Feature.RING_PACKED & 1)


def part_names(features: int) -> tuple[str, str, str]:
    """What the standard calls them."""
    if is_packed(features):
        return "descriptor ring", "driver event suppression", "device event suppression"
    return "descriptor table", "avail ring", "used ring"


def sizes_of(size: int, features: int) -> tuple[int, int, int]:
    """Bytes of each part; a split ring's event fields exist only with EVENT_IDX."""
    if is_packed(features):
        return 16 * size, 4, 4
    event = 2 if features >> Feature.EVENT_IDX & 1 else 0
    return 16 * size, 4 + 2 * size + event, 4 + 8 * size + event


def alignments_of(features: int) -> tuple[int, int, int]:
    """What each part's address is a multiple of."""
    return (16, 4, 4) if is_packed(features) else (16, 2, 4)


def check_size(size: int, features: int) -> None:
    """Raises ProtocolError where no ring can have `size` entries."""
    most = int(Limit.QUEUE_SIZE_MAX)
    if not 0 < size <= most:
        raise ProtocolError(f"ring of {size} entries, expected 1 to {most}")
    if not is_packed(features) and size & (size - 1):
        raise ProtocolError(f"ring of {size} entries: a split ring has a power of two")


def first_base(features: int) -> int:
    """The base of a ring that was never used: wrap counters start at 1."""
    return 0x8000_8000 if is_packed(features) else 0


def check_base(base: int, size: int, features: int) -> None:
    """Raises ProtocolError where no ring of `size` entries can go on at `base`."""
    if not is_packed(features):
        if not 0 <= base <= 0xFFFF:
            raise ProtocolError(f"vring base {base}: beyond 65535")
    elif not 0 <= base <= 0xFFFF_FFFF or max(base & 0x7FFF, base >> 16 & 0x7FFF) >= size:
        raise ProtocolError(f"vring base {base:#x}: beyond a packed ring of {size} entries")
