"""Cycles a chain that each end of a ring spends, split and packed: `make bench`."""

import statistics

import pytest

from bench import ring_loop
from tests.rings import BORDER, LAYOUTS, Rings

ROUNDS = 2000
SIZE = 1024
# Buffers like a driver's: each starts on a line of its own, at a stride that is no power of
# two, so that they do not compete for the same cache sets.
BUFFERS = [(BORDER + 2304 * i, 64) for i in range(512)]


def cycles(benchmark, *, layout, shape=0, writable=False, **form):
    """Benchmarks round trips of bursts; leaves cycles a chain for each step."""
    samples = []
    with Rings(layout, size=SIZE, **form) as rings:
        rings.driver.disarm()

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


@pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
@pytest.mark.parametrize("writable", [False, True], ids=["readable", "writable"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chains_of_one_descriptor(benchmark, layout, writable, in_order):
    cycles(benchmark, layout=layout, writable=writable, in_order=in_order)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chains_of_four_descriptors(benchmark, layout):
    cycles(benchmark, layout=layout, shape=4)
