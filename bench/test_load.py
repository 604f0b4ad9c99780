"""What the generators themselves reach: against a device that copies nothing.

A rate near this one is the generator's, whatever the device.
"""

import pytest

from bench.peers.devices import DEVICE_CORE
from bench.peers.generators import GENERATOR_CORE
from bench.rates import measure, needs_two_cores, rated
from tests.null_net import NullNet
from tests.serving import serving
from vhostpy.load import net
from vhostpy.load.net_loop import Touch
from vhostpy.runtime.pool import Workers
from vhostpy.server.listen import Server


@needs_two_cores
@rated
@pytest.mark.parametrize("touch", list(Touch), ids=lambda touch: touch.name.lower())
def test_generate(benchmark, tmp_path, touch):
    """64 B, both ways; nothing of a frame is copied, and none arrives."""
    workers = Workers(1, poll="busy", cpus=[DEVICE_CORE])
    workers.start()
    ends = NullNet.couple(workers)
    servers = [Server(end, path=str(tmp_path / end.name)) for end in ends]

    def run():
        plan = net.NetPlan(
            tuple(server.path for server in servers), touch=touch, seconds=1, cpu=GENERATOR_CORE
        )
        result = net.run(plan)
        return {
            "value": result["sent_mpps"],
            "generator_busy_share": result["generator_busy_share"],
            "generator_cycles_per_packet": result["generator_cycles_per_packet"],
            "device_busy_share": workers.loads()[0]["busy_share"],
        }

    try:
        with serving(*servers):
            measure(benchmark, run, 1e6)
    finally:
        workers.stop()
