"""Where the commands run."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def place(monkeypatch):
    """A short directory of our own, current and for control sockets, as the machine's are not."""
    with tempfile.TemporaryDirectory(prefix="vp") as directory:
        monkeypatch.setenv("VHOSTPY_RUNTIME_DIR", f"{directory}/vhostpy")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
        monkeypatch.chdir(directory)
        yield Path(directory)
