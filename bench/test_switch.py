"""Forwarding between two ports of `vhostpy net`, busy on core 0; `vhostpy load` on core 1.

    make bench

'median' is a packet's time. extra_info: Mpps (`value`), the device's cycles a packet and
busy share, how full the generator's bursts were, what was lost.
"""

import pytest

from bench.peers.devices import Vhostpy
from bench.peers.generators import own_net
from bench.rates import SECONDS, measure, needs_two_cores, rated
from vhostpy._spec import Feature
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.load.net import IMIX
from vhostpy.load.net_loop import Touch

CASES = {
    "64": {"sizes": (64,), "touch": Touch.HEADER},
    "1500": {"sizes": (1500,), "touch": Touch.FRAME},
    "imix": {"sizes": IMIX, "touch": Touch.HEADER},
}


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    device = Vhostpy(tmp_path_factory.mktemp("switch"), 2)
    device.start()
    yield device
    device.close()


@needs_two_cores
@rated
@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_forward(benchmark, device, case, layout):
    """Two ports, a learning switch; ids LIFO, rx headers dirty."""
    if layout == "packed" and case != "64":
        pytest.skip("one case shows the layout")
    if layout == "packed" and not offers(device, Feature.RING_PACKED):
        pytest.skip("packed virtqueues are not offered")
    plan = CASES[case] | {"layout": layout}
    measure(benchmark, lambda: own_net(device, SECONDS, **plan), 1e6)


def offers(device, bit):
    """Whether the device has this feature."""
    with FrontEnd(device.sockets[0]) as front_end:
        return bool(front_end.get_features() >> bit & 1)
