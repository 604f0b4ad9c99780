"""Cycles a chain that each end of a ring spends, split and packed: `make bench`."""

import array
import os
import statistics
import threading

import pytest

from bench import ring_loop
from tests.rings import BORDER, LAYOUTS, Rings
from vhostpy.ring.inflight import InflightArea, area_bytes

ROUNDS = 2000
CHAINS = 100_000  # in less than a millisecond: most samples are not interrupted
SIZE = 1024
# Buffers like a driver's: each starts on a line of its own, at a stride that is no power of
# two, so that they do not compete for the same cache sets.
BUFFERS = [(BORDER + 2304 * i, 64) for i in range(512)]


def cycles(benchmark, *, layout, shape=0, writable=False, tracked=False, **form):
    """Benchmarks round trips of bursts; leaves cycles a chain for each step."""
    samples = []
    with Rings(layout, size=SIZE, **form) as rings:
        rings.driver.disarm()
        if tracked:
            rings.remember(region())

        def once():
            samples.append(
                ring_loop.run(
                    rings.driver,
                    rings.device,
                    BUFFERS,
                    rounds=ROUNDS,
                    shape=shape,
                    writable=writable,
                )
            )

        benchmark.pedantic(once, rounds=15, warmup_rounds=2)
    assert {sample["chains"] for sample in samples} == {64 * ROUNDS}
    for step in ring_loop.STEPS:
        ticks = statistics.median(sample[step] for sample in samples)
        benchmark.extra_info[f"{step}_cycles"] = round(ticks, 1)


def region():
    """Where a queue's chains are remembered, for whoever comes after a kill."""
    size = area_bytes(1, SIZE)
    fd = os.memfd_create("inflight")
    os.truncate(fd, size)
    area = InflightArea(fd, 0, size, 1, SIZE)
    os.close(fd)
    return area.queue(0)


@pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
@pytest.mark.parametrize("writable", [False, True], ids=["readable", "writable"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chains_of_one_descriptor(benchmark, layout, writable, in_order):
    cycles(benchmark, layout=layout, writable=writable, in_order=in_order)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chains_of_four_descriptors(benchmark, layout):
    cycles(benchmark, layout=layout, shape=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chains_that_outlive_a_kill(benchmark, layout):
    cycles(benchmark, layout=layout, tracked=True)


def across_cores(rings, chains, touched):
    """The two ends on a core each; what the device's says, and the driver's ticks a chain."""
    cores = sorted(os.sched_getaffinity(0))
    stop = array.array("I", [0])
    result = {}

    def serve():
        os.sched_setaffinity(0, {cores[0]})
        result.update(ring_loop.serve(rings.device, stop, touched=touched))

    thread = threading.Thread(target=serve)
    thread.start()
    os.sched_setaffinity(0, {cores[1]})
    try:
        result["driver_cycles"] = ring_loop.feed(
            rings.driver, first=BORDER, stride=2304, chains=chains, touched=touched
        )
    finally:
        stop[0] = 1
        thread.join()
        os.sched_setaffinity(0, cores)
    return result


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("touched", [False, True], ids=["untouched", "touched"])
@pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ends_on_two_cores(benchmark, layout, in_order, touched):
    samples = []
    with Rings(layout, size=512, in_order=in_order) as rings:
        rings.driver.disarm()
        benchmark.pedantic(
            lambda: samples.append(across_cores(rings, CHAINS, touched)),
            rounds=60,
            warmup_rounds=2,
        )
    for name in ("device_cycles", "driver_cycles", "chains_per_poll", "busy_share"):
        benchmark.extra_info[name] = round(statistics.median(s[name] for s in samples), 2)
