"""A back-end that dies at a store of the real code: no chain is lost, none comes twice.

The process that dies may not write to one page of the memory that it shares: so it is
killed at its first store there, with all stores before it done and none behind it.
"""

import ctypes
import faulthandler
import mmap
import os

import pytest

from tests.rings import AVAIL, DESC, GPA, LAYOUTS, USED, Rings
from vhostpy._inflight import InflightArea, region_bytes

SIZE = 1024
AREA = region_bytes(SIZE)
PAGE = mmap.PAGESIZE
# So long that the entries of each chain are remembered on another page.
PIECES = {"split": 256, "packed": 140}

layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Life:
    """A ring with four chains, whose device can be made to die at a store."""

    def __init__(self, layout):
        self.rings = Rings(layout, size=SIZE)
        self.base = self.rings.device.base
        self.fd = os.memfd_create("inflight")
        os.ftruncate(self.fd, AREA)
        self.begin()
        pieces = [(self.rings.free[0], 16)] * PIECES[layout]
        self.ids = [self.rings.driver.add(pieces, []) for _ in range(4)]
        self.rings.driver.kick()
        self.chains = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)
        self.rings.__exit__()

    def begin(self):
        """The device's life: whoever comes after a kill is told no more than this base."""
        split = self.rings.layout == "split"
        self.device = self.rings.start(self.rings.guest.used_idx if split else self.base)
        self.device.set_live(False)
        self.queue = InflightArea(self.fd, 0, AREA, 1, SIZE).queue(0)
        self.device.track(self.queue)
        self.device.set_live(True)

    def take(self, count):
        self.chains += self.device.take(count)

    def give(self, *numbers):
        self.device.give([(self.chains[number], 0) for number in numbers])

    def pages(self):
        """Where it stores what others see: addresses."""
        ring = self.rings.memory.regions[0].mapping.address - GPA
        places = {DESC: 16 * SIZE, AVAIL: 4 + 2 * SIZE, USED: 4 + 8 * SIZE}
        region = self.queue.mapping.address
        return [
            *range(region, region + AREA, PAGE),
            *(page for gpa, size in places.items() for page in range(gpa, gpa + size, PAGE)
              for page in [ring + page]),
        ]  # fmt: skip

    def dies(self, page, deeds):
        """Whether a process dies that does them and may not write to that page."""
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, mmap.PROT_READ)
            try:
                deeds(self)
            finally:
                os._exit(0)
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def take_all(life):
    life.take(4)


def give_some(life):
    life.give(2, 0)
    life.give(3)


def put_back_some(life):
    life.device.put_back(life.chains[1:])


def all_of_it(life):
    life.give(1)
    life.device.put_back([life.chains.pop()])
    life.take(2)
    life.give(3, 0)


DEEDS = {"take": (0, take_all), "give": (4, give_some), "put back": (4, put_back_some),
         "all of it": (3, all_of_it)}  # fmt: skip


@layouts
@pytest.mark.parametrize("name", DEEDS)
def test_every_chain_comes_back_once_whichever_store_is_not_made(layout, name):
    taken, deeds = DEEDS[name]
    with Life(layout) as life:
        pages = len(life.pages())
    deaths = 0
    for number in range(pages):
        with Life(layout) as life:
            life.take(taken)
            deaths += life.dies(life.pages()[number], deeds)
            back = [id_ for id_, _ in life.rings.driver.used()]
            life.begin()
            rest = []
            while chains := life.device.take():
                rest += chains
            left = [id_ for id_ in life.ids if id_ not in back]
            assert [chain.id for chain in rest] == left, f"page {number}: {back} came back"
            life.device.give([(chain, 0) for chain in rest])
            back += [id_ for id_, _ in life.rings.driver.used()]
            assert sorted(back) == sorted(life.ids)
            life.begin()
            assert life.device.again == 0 and life.device.take() == []
    assert deaths >= 3, "or nothing was shown"
