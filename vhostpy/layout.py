"""A virtqueue's three parts: their sizes and alignments, as the standard lays them out.

Source: virtio 1.3, "Split Virtqueues".
"""

from vhostpy._spec import Feature, Limit
from vhostpy.errors import ProtocolError

PART_NAMES = ("descriptor table", "avail ring", "used ring")


def sizes_of(size: int, features: int) -> tuple[int, int, int]:
    """Bytes of each part; the event fields exist only with EVENT_IDX."""
    event = 2 if features >> Feature.EVENT_IDX & 1 else 0
    return 16 * size, 4 + 2 * size + event, 4 + 8 * size + event


def alignments_of(features: int) -> tuple[int, int, int]:
    """What each part's address is a multiple of."""
    return 16, 2, 4


def check_size(size: int, features: int) -> None:
    """Raises ProtocolError where no ring can have `size` entries."""
    if features >> Feature.RING_PACKED & 1:
        raise ProtocolError("a packed ring, which is not offered")
    if not 0 < size <= Limit.QUEUE_SIZE_MAX or size & (size - 1):
        raise ProtocolError(
            f"ring of {size} entries: a power of two up to {int(Limit.QUEUE_SIZE_MAX)} is needed"
        )
