"""Settings that hold for all tests."""

import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Builds and guests make time irregular, so no deadline; CI must not fail by luck.
settings.register_profile("vhostpy", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("vhostpy")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """tests/ceph wants Ceph's packages: only where it is named, as make test-ceph does."""
    named = any("ceph" in word for word in config.args)
    return True if collection_path.name == "ceph" and not named else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Where everything is to be tested, what could not be has failed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and "CI" in os.environ:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {report.longrepr[2]}"
    return report


def pytest_configure(config: pytest.Config) -> None:
    """Soaks run only where asked for: make test-long, or -m long."""
    # Under nohup, or behind a shell's &, these are ignored, and would be by what tests start.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not config.option.markexpr:
        config.option.markexpr = "not long"
