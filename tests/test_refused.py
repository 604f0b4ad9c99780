"""What is refused while it is made has got nothing yet, so it closes and unmaps nothing.

Fields of a cdef class are 0 until `__cinit__` sets them, and `__dealloc__` comes even where
Python refuses the arguments, before the first line of `__cinit__`. A class that closes what
it finds there closes fd 0.
"""

import contextlib
import enum
import importlib
import inspect
import os
import pkgutil
from importlib.machinery import ExtensionFileLoader

import pytest

import vhostpy
from tests.backends.guest import Guest
from tests.hostile.pages import PAGE, memfd, region
from vhostpy.backends.blk.queue import DiskQueue
from vhostpy.backends.storage.null import NullStorage
from vhostpy.errors import ConfigError, ProtocolError
from vhostpy.memory.guest import GuestMemory
from vhostpy.memory.mapping import Mapping, poison_fd
from vhostpy.runtime.pool import Workers
from vhostpy.runtime.worker import Worker


@contextlib.contextmanager
def nothing_is_lost():
    """Whatever has number 0, of files and of mappings, is as it was."""
    kept = os.dup(0)
    try:
        with memfd(PAGE) as fd:
            memory = GuestMemory([region(fd, PAGE)])  # number 0, where no other lives
            yield
            assert os.path.sameopenfile(0, kept)
            memory.poison()  # as a SIGBUS does: it finds the mapping, or the process dies
            assert memory.poisoned
            os.read(poison_fd(), 8)
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def compiled_classes():
    """All of the package, so that none is forgotten."""
    classes = []
    for module in pkgutil.walk_packages(vhostpy.__path__, "vhostpy."):
        spec = module.module_finder.find_spec(module.name, None)
        if isinstance(spec.loader, ExtensionFileLoader):
            found = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
            classes += [cls for _, cls in found if cls.__module__ == module.name]
    return [cls for cls in classes if not issubclass(cls, enum.Enum)]


@pytest.mark.parametrize("cls", compiled_classes(), ids=lambda cls: cls.__name__)
def test_what_python_refuses_closes_nothing(cls):
    for arguments, options in [([object()], {}), ([object()] * 30, {}), ([], {"unknown": 0})]:
        with nothing_is_lost(), contextlib.suppress(TypeError):  # a few take anything
            cls(*arguments, **options)


def disk_queue(serial):
    with Guest() as guest:
        DiskQueue(guest.virtqueue(), NullStorage(512), serial=serial)


@pytest.mark.parametrize(
    ("cls", "make", "error"),
    [
        ("Mapping", lambda: Mapping(0, -1, PAGE), ProtocolError),
        ("Worker", lambda: Worker(0, poll="fast", cpu=None, spin_us=0), KeyError),
        ("Workers", lambda: Workers(0), ConfigError),
        ("DiskQueue", lambda: disk_queue(serial=bytes(21)), ValueError),
    ],
)
def test_what_we_refuse_closes_nothing(cls, make, error):
    with nothing_is_lost(), pytest.raises(error):
        make()
