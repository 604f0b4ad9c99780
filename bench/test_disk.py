"""Requests to `vhostpy blk`, busy on core 0; `vhostpy load` on core 1.

'median' is a request's time. extra_info: kIOPS (`value`), latencies, the device's busy share.
"""

import pytest

from bench.peers.devices import Vhostpy
from bench.peers.generators import fill, own_blk
from bench.rates import SECONDS, measure, needs_two_cores, rated


@pytest.fixture(scope="module", params=["null", "ram"])
def device(request, tmp_path_factory):
    device = Vhostpy(tmp_path_factory.mktemp("disk"), 1, "blk", f"--{request.param}", "1G")
    device.start()
    if request.param == "ram":
        fill(device)
    yield device
    device.close()


@needs_two_cores
@rated
@pytest.mark.parametrize("depth", [1, 64])
def test_read(benchmark, device, depth):
    """4 KiB random reads."""
    measure(benchmark, lambda: own_blk(device, SECONDS, depth=depth), 1e3)
