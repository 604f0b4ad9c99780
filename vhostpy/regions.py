"""Guest memory as the front-end describes it: what can be, and what lies in it.

Knows numbers only; `memory.pyx` maps.
"""

import itertools
from collections.abc import Iterable, Sequence

from vhostpy.errors import ProtocolError
from vhostpy.payloads import MemoryRegion
from vhostpy.ringstate import ADDRESS_END, RingPart

FILE_END = (1 << 63) - 1  # off_t


def check_regions(name: str, regions: tuple[MemoryRegion, ...] | list[MemoryRegion]) -> None:
    """Exact sums, no wrap, no overlap of guest addresses."""
    for i, region in enumerate(regions):
        where = f"{name} region {i}"
        if not region.size:
            raise ProtocolError(f"{where}: size 0 at GPA {region.gpa:#x}")
        for kind, start, end in (
            ("GPA", region.gpa, ADDRESS_END),
            ("UVA", region.uva, ADDRESS_END),
            ("offset", region.offset, FILE_END),
        ):
            if start + region.size > end:
                raise ProtocolError(
                    f"{where}: {region.size:#x} bytes at {kind} {start:#x} pass {end:#x}"
                )
    ordered = sorted(regions, key=lambda region: region.gpa)
    for lower, upper in itertools.pairwise(ordered):
        if lower.gpa + lower.size > upper.gpa:
            raise ProtocolError(
                f"{name}: regions overlap: GPA {lower.gpa:#x} with {lower.size:#x} bytes and "
                f"GPA {upper.gpa:#x}"
            )


def first_unmapped(parts: Iterable[RingPart], regions: Sequence[MemoryRegion]) -> RingPart | None:
    """The first part that lies in no region; None when all do.

    In one region as a whole: neighbours in the front-end's addresses may be far apart here.
    """
    for part in parts:
        end = part.uva + part.size
        if not any(r.uva <= part.uva and end <= r.uva + r.size for r in regions):
            return part
    return None
