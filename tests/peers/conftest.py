"""What the tests with real peers share: a place for sockets, a back-end, guests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A directory with a path short enough for socket names (pytest's are not)."""
    path = Path(tempfile.mkdtemp(prefix="vhostpy-test-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
