"""What `make bench-peers` makes of its runs: medians, ratios, and what it dares to judge."""

import json
from xml.etree import ElementTree

import pytest

from bench.peers import blk, chart, net, readme
from bench.peers.__main__ import RESULTS
from bench.peers.net import rate
from bench.peers.placement import best_known
from bench.peers.results import Results
from vhostpy.load.net_loop import Touch

CASE = rate("c", "a case", goals={"testpmd": 2.0}, chart=64)


def run(value, **more):
    calm = {"generator_cpu_share": 0.99, "device_cpu_share": 1.0}
    lines = {"line_ticks": 10.0, "line_ticks_in_a_row": 9.0, "line_ticks_dependent": 160.0,
             "line_ticks_overwritten": 20.0}  # fmt: skip
    return {"value": value, "busy_share": 0.99, "cycles_per_packet": 70.0, **calm, **lines, **more}


def results(ours, theirs, case=CASE, folder=None, commit="abc"):
    """Each of these runs thrice, as many as are judged."""
    return results_of([*ours, *ours, *ours], [*theirs, *theirs, *theirs], case, folder, commit)


def results_of(ours, theirs, case=CASE, folder=None, commit="abc"):
    made = Results("net", "2000-01-01", [case], folder)
    made.commit = commit
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
    cells = "12.00 Mpps", "10.00..99.00 (742%)", "9", "2.50 x", "2.00 x", "70", "", "99%"
    assert " | ".join(cells) + " | caches apart, met |" in made.markdown()


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


@pytest.mark.parametrize("few", ["ours", "theirs"])
def test_few_runs_are_shown_and_not_judged(few):
    some, enough = [run(10)] * 2, [run(10)] * 3
    made = results_of(*((some, enough) if few == "ours" else (enough, some)))
    assert "met" not in row_of(made, "testpmd") and "not judged" in made.markdown()


def test_runs_compare_only_with_those_of_their_placement():
    near, one = {"line_ticks_dependent": 70.0}, {"line_ticks_dependent": 15.0}
    ours = [run(30), run(90, **near), run(20, **one)]
    theirs = [run(10), run(60, **near), run(5, **one)]
    made = results(ours, theirs)
    rows = {cores: row_of(made, "testpmd", cores) for cores in ("apart", "near", "one")}
    assert [row["ratio"] for row in rows.values()] == [3, 1.5, 4]
    assert [row.get("met") for row in rows.values()] == [True, False, None]
    for words in ("caches apart, met", "one last-level cache, **missed**",
                  "two threads of one core, not judged"):  # fmt: skip
        assert f"| {words} |" in made.markdown()


@pytest.mark.parametrize("limit", [{"busy_share": 0.94}, {"generator_full_share": 0.95}])
def test_a_rate_that_is_the_generators_says_so(limit):
    made = results([run(30, **limit)], [run(10)])
    lines = [line for line in made.markdown().splitlines() if "| vhostpy |" in line]
    assert "generator-limited" in lines[0]
    assert made.markdown().count("generator-limited") == 1


def test_a_generator_says_how_busy_it_was():
    assert "generator 62% busy" in results([run(30, generator_busy_share=0.62)], []).markdown()


def test_lower_is_better_for_times():
    case = net.latency("l", "latency", goals={"testpmd": 1.0})
    tails = {"latency_p99_us": 4.25, "latency_p99_9_us": 9.5}
    made = results([run(2.0, **tails)], [run(3.0)], case)
    row = row_of(made, "testpmd")
    assert row["ratio"] == 1.5 and row["met"]
    assert "p99 4.25, p99.9 9.50" in made.markdown()


@pytest.mark.parametrize(("ours", "met"), [(54, True), (55, False)])
def test_a_goal_may_be_the_most_that_is_allowed(ours, met):
    made = results([run(ours)], [], net.latency("l", "latency", most=50.0))
    assert row_of(made, "vhostpy")["met"] is met and "<= 50 us" in made.markdown()


def test_what_it_takes_to_be_woken_stands_beside_our_time():
    case = net.latency("l", "latency", most=50.0, sleeps=True)
    made = results([run(60, wake_us=45.0)], [run(3)], case)
    assert "| to be woken: 45 us |" in made.markdown()
    assert row_of(made, "vhostpy", "anywhere")["met"] is False


def test_what_lines_cost_stands_beside_our_cycles():
    made = results([run(30)], [run(10)], rate("c", "64 B", plan={"touch": Touch.HEADER}))
    # A line of the frame, and of descriptors and entries 36 bytes to read, 16 to write.
    assert "| 1.6 + 1.2: 25..41 |" in made.markdown()
    assert "lines" not in row_of(made, "testpmd")


def test_a_peer_that_cannot_do_it_is_named_with_its_error():
    made = results([run(30)], [{"error": "no packed rings"}])
    assert "| testpmd | - |" in made.markdown() and "no packed rings" in made.markdown()


def test_all_of_it_is_written(tmp_path):
    results([run(30)], [run(10)]).write(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".svg"}
    data = json.loads((tmp_path / "2000-01-01-abc-net.json").read_text())
    assert data["runs"]["c"]["vhostpy"][0]["value"] == 30 and data["rows"][1]["ratio"] == 3


def test_parts_of_one_day_and_commit_come_into_one_table(tmp_path):
    results([run(30)], [run(10)]).write(tmp_path)
    other = rate("d", "another case")
    part = results([], [], other, tmp_path)
    part.cases = {"c": CASE, "d": other}
    part.resume()
    part.add(other, "vhostpy", run(5))
    part.done(other)
    assert len(list(tmp_path.glob("*.json"))) == 1
    (table,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert "| a case | testpmd | 10.00" in table and "| another case | vhostpy | 5.00" in table


@pytest.mark.parametrize("commit", ["def", "abc-dirty"])
def test_what_other_code_gave_is_left_alone(tmp_path, commit):
    for written in ("abc", "abc-dirty"):
        results([run(30)], [run(10)], commit=written).write(tmp_path)
    part = results([], [], CASE, tmp_path, commit)
    part.resume()
    assert not part.runs


def test_the_readme_shows_the_newest_whole_results(tmp_path):
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.update(text, tmp_path, tmp_path) == text
    for commit, ours, names in (("a", 30, readme.NET), ("b", 40, ["64B-header"])):
        made = Results("net", "2000-01-01", net.CASES)
        made.commit = commit
        for name in names:
            made.add(made.cases[name], "vhostpy", run(ours))
        made.write(tmp_path)
    shown = readme.update(text, tmp_path, tmp_path)
    assert shown.startswith("before\n") and shown.endswith("\nafter\n")
    assert "headers touched (caches apart) | 30.0 Mpps (0%), 70 cycles a packet |" in shown
    assert "old" not in shown
    assert "2000-01-01-a-net.md" in shown and "40.0" not in shown
    assert readme.update(shown, tmp_path, tmp_path) == shown


def test_where_one_placement_is_shown_it_is_the_one_of_two_cores_with_most_runs():
    near, one = {"line_ticks_dependent": 70.0}, {"line_ticks_dependent": 15.0}
    made = results_of(
        [run(30), *[run(40, **near)] * 2, *[run(50, **one)] * 3],
        [run(10), *[run(20, **near)] * 2, *[run(30, **one)] * 3],
    )
    assert {row["cores"] for row in best_known(made.rows())} == {"near"}


def test_the_readme_is_up_to_date():
    text = readme.README.read_text()
    assert readme.update(text, RESULTS, readme.README.parent) == text


def test_the_chart_is_a_picture_of_each_device():
    picture = ElementTree.fromstring(chart.draw(results([run(30)], [run(10)]).rows(), "net"))
    names = {element.text for element in picture.iter() if element.tag.endswith("text")}
    assert {"vhostpy", "testpmd", "Mpps", "64"} <= names
    assert chart.draw([], "net") == ""


def test_disks_have_a_chart_of_rates_and_one_of_latencies():
    times = {"latency_p50_us": 2.0, "latency_p99_us": 30.0}
    rows = results([run(900, **times)], [run(20, **times)]).rows()
    picture = ElementTree.fromstring(chart.draw(rows, "blk"))
    names = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert names.count("vhostpy") == 2 and {"kIOPS", "us", "1000", "100"} <= set(names)


def test_names_of_cases_are_their_own():
    names = [case.name for case in (*net.CASES, *blk.CASES)]
    assert len(set(names)) == len(names)


def test_the_readme_asks_for_cases_that_there_are():
    assert readme.NET.keys() <= {case.name for case in net.CASES}
    assert readme.BLK.keys() <= {case.name for case in blk.CASES}
