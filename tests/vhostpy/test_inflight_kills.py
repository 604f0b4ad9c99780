"""A back-end that dies at any store of the real code: no chain is lost, none comes twice.

The process that dies does its deeds one instruction at a time, and after each one the
memory that it shares is looked at: each of its states is one that a kill can leave behind.
"""

import ctypes
import gc
import os
import signal

import pytest

from tests.rings import AVAIL, DESC, GPA, LAYOUTS, USED, Rings, sizes_of
from vhostpy.ring.inflight import InflightArea, region_bytes

SIZE = 16
AREA = region_bytes(SIZE)
CHAINS, PIECES = 4, 3
TRACEME, SINGLESTEP = 0, 9  # Linux, ptrace.h

layouts = pytest.mark.parametrize("layout", LAYOUTS)
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Life:
    """A ring with four chains, whose device can be made to die."""

    def __init__(self, layout):
        # Used so often that the deeds go past the ring's end.
        self.rings = Rings(layout, size=SIZE, used=SIZE - PIECES)
        self.fd = os.memfd_create("inflight")
        os.ftruncate(self.fd, AREA)
        self.begin()
        pieces = [(self.rings.free[0], 16)] * PIECES
        self.ids = [self.rings.driver.add(pieces, []) for _ in range(CHAINS)]
        self.rings.driver.kick()
        self.chains = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)
        self.rings.__exit__()

    def begin(self):
        """The device's life: whoever comes after a kill is told no more than this base."""
        self.queue = InflightArea(self.fd, 0, AREA, 1, SIZE).queue(0)
        self.device = self.rings.start_after_a_kill(self.queue)

    def take(self, count):
        self.chains += self.device.take(count)

    def give(self, *numbers, publish=True):
        self.device.give([(self.chains[number], 0) for number in numbers], publish=publish)

    def driver_sees(self):
        return [id_ for id_, _ in self.rings.driver.used()]

    def shared(self):
        """All that outlives the device, to be read and written."""
        guest = self.rings.memory.regions[0].mapping.address - GPA
        sizes = sizes_of(SIZE, self.rings.features)
        places = [(guest + gpa, size) for gpa, size in zip((DESC, AVAIL, USED), sizes, strict=True)]
        places.append((self.queue.mapping.address, AREA))
        return [
            memoryview((ctypes.c_char * size).from_address(at)).cast("B") for at, size in places
        ]

    def states(self, deeds):
        """What lies in shared memory after each store of a process that does them."""
        shared = self.shared()
        states = [[bytes(part) for part in shared]]
        pid = os.fork()
        if pid == 0:
            gc.disable()
            libc.ptrace(TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            try:
                deeds(self)
                os.kill(os.getpid(), signal.SIGSTOP)
            finally:
                os._exit(1)
        os.waitpid(pid, 0)
        status = 0
        while status in (0, signal.SIGTRAP):
            assert libc.ptrace(SINGLESTEP, pid, None, None) == 0, os.strerror(ctypes.get_errno())
            _, status = os.waitpid(pid, 0)
            assert os.WIFSTOPPED(status), "the deeds went wrong"
            status = os.WSTOPSIG(status)
            if any(part != was for part, was in zip(shared, states[-1], strict=True)):
                states.append([bytes(part) for part in shared])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return states

    def leave(self, state):
        """As a process that was killed has left it."""
        for part, was in zip(self.shared(), state, strict=True):
            part[:] = was


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


def come_after_a_kill(life):
    life.give(3, 1, publish=False)
    life.begin()


DEEDS = {"take": (0, take_all), "give": (4, give_some), "put back": (4, put_back_some),
         "all of it": (3, all_of_it), "come after a kill": (4, come_after_a_kill)}  # fmt: skip


@layouts
@pytest.mark.parametrize("name", DEEDS)
def test_every_chain_comes_back_once_whichever_store_was_the_last(layout, name):
    taken, deeds = DEEDS[name]
    with Life(layout) as life:
        life.take(taken)
        states = life.states(deeds)
    assert len(states) >= 3, "or nothing was shown"
    for state in states:
        with Life(layout) as life:
            life.take(taken)
            life.leave(state)
            back = life.driver_sees()
            life.begin()
            rest = []
            while chains := life.device.take():
                rest += chains
            assert [chain.id for chain in rest] == [id_ for id_ in life.ids if id_ not in back]
            # One by one, and not in the order in which the killed one did it.
            for chain in rest:
                life.device.give([(chain, 0)])
                assert life.driver_sees() == [chain.id]
            assert sorted(back + [chain.id for chain in rest]) == sorted(life.ids)
            life.begin()
            assert life.device.again == 0 and life.device.take() == []
