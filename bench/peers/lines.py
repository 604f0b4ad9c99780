"""The cache lines that a frame has to bring from the generator's core: what bounds a device.

Counted for `vhostpy load` as it is by default (two-byte avail and eight-byte used entries,
16-byte descriptors, buffers that begin on a line, a virtio header of 12 bytes, rx headers
dirty), and for a device that copies once. Only lines that the other core has touched since
count: of `Touch.HEADER` these are a frame's first ones, all others lie in the device's cache.
"""

from typing import NamedTuple

from bench.peers.case import Case
from vhostpy.load.net_loop import Touch

LINE = 64
HEADER = 12
ROOM = 2048  # of a buffer


class Lines(NamedTuple):
    """A frame's share of lines, each way."""

    read: float
    written: float


def of_frame(size: int, touch: Touch, layout: str) -> Lines:
    """Lines of a frame of `size` bytes: those of its buffers, and its share of the rings'."""
    frame = 1 if touch == Touch.HEADER else -(-(HEADER + size) // LINE)
    if layout == "packed":
        # A descriptor is read, and written as used, on the sender's and the receiver's side.
        return Lines(frame + 2 * 16 / LINE, frame + 2 * 16 / LINE)
    return Lines(frame + 2 * (16 + 2) / LINE, frame + 2 * 8 / LINE)


def of_case(case: Case) -> Lines | None:
    """None where the generator is another, or its frames differ or are in pieces."""
    sizes = case.plan.get("sizes", (64,))
    touch = case.plan.get("touch", Touch.NONE)
    plain = len(sizes) == 1 and HEADER + sizes[0] <= ROOM and touch != Touch.NONE
    if case.unit != "Mpps" or not plain or case.plan.keys() & {"macs", "broadcast"}:
        return None
    return of_frame(sizes[0], touch, case.plan.get("layout", "split"))


def bound(lines: Lines, read_ticks: float, overwritten_ticks: float) -> tuple[float, float]:
    """(least, most) cycles a frame: with reads and writes at the same time, and in turn."""
    reads, writes = lines.read * read_ticks, lines.written * overwritten_ticks
    return max(reads, writes), reads + writes
