"""Settings that hold for all tests."""

import os

import pytest
from hypothesis import settings

# Builds and guests make time irregular, so no deadline; CI must not fail by luck.
settings.register_profile("vhostpy", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("vhostpy")


def pytest_configure(config: pytest.Config) -> None:
    """Soaks run only where asked for: make test-long, or -m long."""
    if not config.option.markexpr:
        config.option.markexpr = "not long"
