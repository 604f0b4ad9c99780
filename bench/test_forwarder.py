"""Cycles a frame through the switch, device only: `make bench`.

'median' is the time of all bursts of a round, their drivers' ends included. extra_info:
`cycles`, a frame's in the device, of the median burst, and of the fastest of a hundred.
"""

import statistics

import pytest

from bench import switch_loop
from tests.backends.netguest import MODERN, PACKED, frame, mac
from tests.vswitch.net import Net

BURST = 64
BURSTS = 3000
ROUNDS = 5
SIZE = 64
# No power of two, so that buffers do not compete for the same cache sets.
STRIDE = 2304


@pytest.mark.parametrize("flows", [1, 64, 4096])
@pytest.mark.parametrize("features", [MODERN, PACKED], ids=["split", "packed"])
def test_forwarded(benchmark, features, flows):
    """A burst of 64 B frames; where flows are many, no two in a row are of the same pair."""
    net = Net(2, features=features, size=1024)
    sender, receiver = net.guests
    header = bytes(sender.header_size)
    frames = []
    base = sender.allocate(max(flows, BURST) * STRIDE, STRIDE)
    for i in range(max(flows, BURST)):
        source, to = mac(1000 + 2 * (i % flows)), mac(1001 + 2 * (i % flows))
        net.switch.fdb.seen(source, 0)
        net.switch.fdb.seen(to, 1)
        sender.memory.write(base + i * STRIDE, header + frame(to, source, SIZE))
        frames.append((base + i * STRIDE, len(header) + SIZE))
    base = receiver.allocate(BURST * STRIDE, STRIDE)
    buffers = [(base + i * STRIDE, 2048) for i in range(BURST)]
    forwarder = net.switch.forwarder(sender.device.port)
    spent = []

    def once():
        spent.extend(
            switch_loop.run(
                forwarder,
                sender.drivers[1],
                receiver.drivers[0],
                frames,
                buffers,
                bursts=BURSTS,
            )
        )

    benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=1)
    counters = receiver.counters()
    assert counters["to_guest_packets"] == (ROUNDS + 1) * BURSTS * BURST
    benchmark.extra_info["cycles"] = round(statistics.median(spent), 1)
    benchmark.extra_info["cycles_best"] = round(statistics.quantiles(spent, n=100)[0], 1)
