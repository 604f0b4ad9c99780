"""What `make bench-peers` makes of its runs: medians, ratios, and what it dares to judge."""

import json
from argparse import Namespace
from xml.etree import ElementTree

import pytest

from bench.peers import chart
from bench.peers.net import CASES, Case
from bench.peers.results import Results

OPTIONS = Namespace(pairs=3, seconds=2)
CASE = Case("c", "a case", goals={"testpmd": 2.0}, chart=64)


def run(value, **more):
    calm = {"generator_cpu_share": 0.99, "device_cpu_share": 1.0, "cores": "apart"}
    lines = {"line_ticks": 10.0, "line_ticks_in_a_row": 9.0, "line_ticks_dependent": 160.0}
    return {"value": value, "busy_share": 0.99, "cycles_per_packet": 70.0, **calm, **lines, **more}


def results(ours, theirs, case=CASE):
    made = Results("net", "2000-01-01", OPTIONS)
    for device, runs in (("vhostpy", ours), ("testpmd", theirs)):
        for outcome in runs:
            made.add(case, device, outcome)
    return made


def row_of(made, device, cores="apart"):
    (row,) = (r for r in made.rows() if r["device"] == device and r["cores"] == cores)
    return row


def test_ratios_are_of_medians():
    made = results([run(30), run(1), run(31)], [run(10), run(12), run(99)])
    row = row_of(made, "testpmd")
    assert (row["median"], row["low"], row["high"], row["ratio"]) == (12, 10, 99, 30 / 12)
    assert row["met"]
    assert "| 12.00 Mpps | 10.00..99.00 | 3 | 2.50 x | 2.00 x | 70 | 99% | met |" in made.markdown()


@pytest.mark.parametrize(("ours", "met"), [(18.5, True), (18.3, False)])
def test_a_goal_is_met_at_92_percent(ours, met):
    assert row_of(results([run(ours)], [run(10)]), "testpmd")["met"] is met


@pytest.mark.parametrize("other", [{"device_cpu_share": 0.5}, {"generator_cpu_share": 0.5}])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_disturbed_runs_are_shown_and_not_judged(other, whose):
    bad, good = [run(10, **other)], [run(10)]
    made = results(*((bad, good) if whose == "ours" else (good, bad)))
    assert "met" not in row_of(made, "testpmd")
    assert "not judged" in made.markdown() and "disturbed: 50%" in made.markdown()


def test_disturbed_runs_count_only_where_there_are_no_others():
    made = results([run(30), run(1, device_cpu_share=0.5)], [run(10)])
    assert row_of(made, "vhostpy")["median"] == 30


def test_runs_of_one_core_stand_apart():
    made = results([run(30), run(90, cores="shared")], [run(10), run(60, cores="shared")])
    assert row_of(made, "testpmd")["ratio"] == 3
    shared = row_of(made, "testpmd", "shared")
    assert shared["ratio"] == 1.5 and "met" not in shared
    assert "two threads of one core" in made.markdown()


@pytest.mark.parametrize("limit", [{"busy_share": 0.94}, {"generator_full_share": 0.95}])
def test_a_rate_that_is_the_generators_says_so(limit):
    made = results([run(30, **limit)], [run(10)])
    lines = [line for line in made.markdown().splitlines() if "| vhostpy |" in line]
    assert "generator-limited" in lines[0]
    assert made.markdown().count("| generator-limited") == 1


def test_lower_is_better_for_times():
    case = Case("l", "latency", unit="us", lower_is_better=True, goals={"testpmd": 1.0})
    row = row_of(results([run(2.0)], [run(3.0)], case), "testpmd")
    assert row["ratio"] == 1.5 and row["met"]


def test_a_peer_that_cannot_do_it_is_named_with_its_error():
    made = results([run(30)], [{"error": "no packed rings", "cores": "apart"}])
    assert "| testpmd | - |" in made.markdown() and "no packed rings" in made.markdown()


def test_all_of_it_is_written(tmp_path):
    results([run(30)], [run(10)]).write(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".svg"}
    data = json.loads((tmp_path / "2000-01-01-net.json").read_text())
    assert data["runs"]["c"]["vhostpy"][0]["value"] == 30 and data["rows"][1]["ratio"] == 3


def test_the_chart_is_a_picture_of_each_device():
    picture = ElementTree.fromstring(chart.draw(results([run(30)], [run(10)]).rows(), "net"))
    names = {element.text for element in picture.iter() if element.tag.endswith("text")}
    assert {"vhostpy", "testpmd", "Mpps", "64"} <= names
    assert chart.draw([], "net") == ""


def test_names_of_cases_are_their_own():
    assert len({case.name for case in CASES}) == len(CASES)
