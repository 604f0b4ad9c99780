"""Where the processors were, and when `make bench-peers` has runs enough that compare."""

import argparse
import os
from itertools import cycle

import pytest

from bench.cores import line_cost, wake_cost
from bench.peers import interleave
from bench.peers.net import rate
from bench.peers.placement import WORDS, costs_of, placement, witness
from bench.peers.results import Results
from bench.rates import needs_two_cores
from tests.hostile.victim import eventually

CASE = rate("c", "a case")
OPTIONS = argparse.Namespace(pairs=2, retries=4, seconds=2)
TICKS = {
    "apart": [280.0], "near": [70.0], "one": [14.0], "moved": [280.0, 70.0], "disturbed": [280.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("distances", "where"),
    [
        ([13, 16], "one"),
        ([25, 100], "near"),
        ([150, 350], "apart"),
        ([280, 70, 280, 280, 280], "apart"),
        ([280, 70, 280, 280], "moved"),
    ],
)
def test_runs_are_where_the_processors_were_nearly_all_the_time(distances, where):
    assert placement(CASE, {"distances": distances, "line_ticks_dependent": 14}) == where


@pytest.mark.parametrize(("ticks", "where"), [(14, "one"), (70, "near"), (280, "apart")])
def test_runs_without_a_witness_are_where_the_processors_were_after_them(ticks, where):
    assert placement(CASE, {"line_ticks_dependent": ticks}) == where


class Named:
    def __init__(self, name):
        self.name = name


def turns(monkeypatch, *places):
    """How many runs each of two devices gets, if the machine puts them there by turns."""
    seen = {device: cycle(places_of) for device, places_of in zip("ab", places, strict=True)}

    def attempt(case, device, options):
        where = next(seen[device.name])
        share = 0.5 if where == "disturbed" else 1.0
        return {"value": 1.0, "generator_cpu_share": share, "distances": TICKS[where]}

    monkeypatch.setattr(interleave, "attempt", attempt)
    results = Results("net", "2000-01-01", [CASE])
    interleave.interleave(CASE, [Named("a"), Named("b")], results, OPTIONS)
    return len(results.runs["c"]["a"])


def test_it_ends_when_each_device_has_runs_enough_in_one_placement(monkeypatch):
    most = OPTIONS.pairs * (1 + OPTIONS.retries)
    assert turns(monkeypatch, ["near"], ["near"]) == 2
    assert turns(monkeypatch, ["near", "apart"], ["near", "apart"]) == 3
    assert turns(monkeypatch, ["near"], ["apart"]) == most
    for useless in ("one", "moved", "disturbed"):
        assert turns(monkeypatch, [useless], [useless]) == most


@needs_two_cores
def test_a_witness_tells_how_far_the_processors_were_from_each_other(monkeypatch):
    monkeypatch.setattr("bench.peers.placement.PERIOD_S", 0.01)
    cpus = sorted(os.sched_getaffinity(0))[:2]
    with witness(*cpus) as seen:
        eventually(lambda: len(costs_of(seen, 60).get("distances", [])) > 2)
    assert placement(CASE, costs_of(seen, 60)) in WORDS
    assert all(1 < ticks < 100_000 for ticks in costs_of(seen, 60)["distances"])


@needs_two_cores
def test_a_thread_that_sleeps_takes_microseconds_to_be_woken():
    first, second = sorted(os.sched_getaffinity(0))[:2]
    assert 0 < wake_cost(first, second)["wake_us"] < 1_000_000


@needs_two_cores
def test_a_processor_that_is_not_there_is_an_error_and_no_wait_for_it():
    with pytest.raises(OSError, match="Invalid argument"):
        line_cost(min(os.sched_getaffinity(0)), 4095)
