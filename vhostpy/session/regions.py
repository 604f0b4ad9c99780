"""Guest memory as the front-end describes it: what can be, and what lies in it.

Knows numbers only; `memory.pyx` maps.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter

from vhostpy.errors import ProtocolError
from vhostpy.protocol.payloads import MemoryRegion
from vhostpy.session.ring import ADDRESS_END

FILE_END = (1 << 63) - 1  # off_t


def check_regions(name: str, regions: Sequence[MemoryRegion], known: int = 0) -> None:
    """Exact sums, no wrap, no overlap of guest addresses; the first `known` stood this before."""
    for i, region in enumerate(regions[known:], known):
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
    ordered = sorted(regions, key=attrgetter("gpa"))
    for lower, upper in itertools.pairwise(ordered):
        if lower.gpa + lower.size > upper.gpa:
            raise ProtocolError(
                f"{name}: regions overlap: GPA {lower.gpa:#x} with {lower.size:#x} bytes and "
                f"GPA {upper.gpa:#x}"
            )


class Spans:
    """Which of the front-end's addresses lie in one region, found by bisection.

    In one as a whole: neighbours in the front-end's addresses may be far apart here. They may
    overlap, too; so beside where each begins stands how far it, or one before it, reaches.
    """

    def __init__(self, regions: Sequence[MemoryRegion]) -> None:
        ordered = sorted(regions, key=attrgetter("uva"))
        self._starts = [region.uva for region in ordered]
        ends = (region.uva + region.size for region in ordered)
        self._reaches = list(itertools.accumulate(ends, max))

    def __contains__(self, span: tuple[int, int]) -> bool:
        """Whether one region holds all from the first to the second address, that excluded."""
        start, end = span
        at = bisect_right(self._starts, start)
        return at > 0 and end <= self._reaches[at - 1]
