"""Sessions to talk to, whose tests must close every file that they open; and workers."""

import gc

import pytest

from tests.talk import Talk, open_fds, ready
from vhostpy.runtime.pool import Workers


@pytest.fixture(scope="module")
def no_garbage():
    """Files that earlier modules left in garbage would go at any time."""
    gc.collect()


@pytest.fixture
def no_fd_leaks(no_garbage):
    """Fails where a test leaves another set of open files than it found."""
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def fresh(no_fd_leaks):
    """A session that has heard nothing."""
    talk = Talk()
    yield talk
    talk.close()


@pytest.fixture
def talk(no_fd_leaks):
    """A session with features and memory; no ring yet."""
    talk = ready()
    yield talk
    talk.close()


@pytest.fixture
def workers():
    """One that runs, and with it the watchdog."""
    workers = Workers()
    workers.start()
    yield workers
    workers.stop()
