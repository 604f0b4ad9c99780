"""What every bad chain must come to, whatever the layout."""

from tests.rings import BORDER, WRITE, Rings
from vhostpy._ring import ChainFault

SIZE = 64
GOOD = BORDER + 4096  # a buffer


def refuse(rings: Rings, fault: int, *pieces: tuple, id: int = 0) -> None:
    """The chain of these pieces is taken as faulty, given back unused; the ring still works."""
    rings.guest.offer_chain(*pieces, id=id)
    (taken,) = rings.device.take()
    assert (taken.id, taken.fault) == (id, fault)
    assert taken.readable == taken.writable == []
    assert rings.device.inflight == 1
    rings.device.give([(taken, 0)])
    assert rings.guest.collect() == [(id, 0)]
    works(rings)


def works(rings: Rings) -> None:
    """A good chain of two pieces, next to whatever else stands in the ring."""
    guest, id = rings.guest, rings.size - 2
    guest.collect()
    guest.memory.write(GOOD, b"alive")
    guest.offer_chain((GOOD, 5), (GOOD + 100, 7, WRITE), id=id)
    (taken,) = rings.device.take()
    assert taken.fault == ChainFault.CHAIN_OK
    assert rings.device.read(taken) == b"alive"
    assert rings.device.write(taken, b"and how") == 7
    rings.device.give([(taken, 7)])
    assert guest.collect() == [(id, 7)]
    assert guest.memory.read(GOOD + 100, 7) == b"and how"
    assert rings.device.inflight == 0
    assert not rings.device.broken
