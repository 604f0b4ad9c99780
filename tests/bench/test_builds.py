"""What `make bench-builds` makes of its turns, and how it gets at the other build."""

import io
import os
import subprocess
import sys
import tarfile

import pytest

from bench import builds
from bench.builds import CASES, Turn, row_of, table
from bench.checkout import lay_out

CASE = CASES[0]
WORK = [((1000, 10), (600, 5)), ((2000, 10), (600, 5))]


def pairs(*rates, share=1.0):
    return [(Turn(a), Turn(b, generator_share=share)) for a, b in rates]


def test_the_ratio_is_of_neighbouring_turns_whatever_the_machine_does_meanwhile():
    # A machine that gets slower: medians of all turns would say 1.0 or less.
    row = row_of(CASE, pairs((40, 42), (20, 21), (10, 10.5), (4, 4.4)), 4, WORK)
    assert (row.ratio.low, row.ratio.median) == (pytest.approx(1.05), pytest.approx(1.05))
    assert row.ratio.high == pytest.approx(1.0625)
    assert (row.a.median, row.b.median) == (15, 15.75)


def test_cycles_are_of_all_starts_together():
    row = row_of(CASE, pairs((1, 1)), 1, WORK)
    assert (row.a_cycles, row.b_cycles) == (150, 120)
    assert row_of(CASE, pairs((1, 1)), 1, [((5, 0), (5, 0))]).a_cycles is None


def test_a_disturbed_turn_is_left_out_with_its_neighbour():
    turns = pairs((10, 11), (10, 11)) + pairs((10, 3), share=0.5)
    row = row_of(CASE, turns, 3, WORK)
    assert (row.ratio.low, row.ratio.high, row.pairs) == (1.1, 1.1, 2)
    assert row.undisturbed


def test_where_nearly_all_were_disturbed_all_count_and_it_is_said():
    turns = pairs((10, 11)) + pairs((10, 9), (10, 9), (10, 0), share=0.5)
    row = row_of(CASE, turns, 4, WORK)
    assert (row.ratio.median, row.pairs, row.undisturbed) == (0.9, 3, False)
    assert "disturbed" in table([row], "main", "this tree")


def test_a_device_that_does_nothing_is_no_ratio():
    with pytest.raises(RuntimeError, match="nothing was done in 1 turns"):
        row_of(CASE, pairs((10, 0), share=0.0), 1, WORK)


def test_each_start_has_its_part_of_the_turns_and_another_build_first(monkeypatch):
    seen = []

    def start(case, trees, wanted):
        seen.append((trees[0], wanted))
        rate = {"old": 10.0, "new": 20.0}
        first, second = (Turn(rate[tree]) for tree in trees)
        ticks = {"old": (100, 1), "new": (50, 1)}
        return [(first, second)] * wanted, tuple(ticks[tree] for tree in trees)

    monkeypatch.setattr(builds, "_from_start_to_end", start)
    row = builds.measure(CASE, ["old", "new"], 10)
    assert seen == [("old", 2), ("new", 3), ("old", 2), ("new", 3)]
    assert (row.ratio.low, row.ratio.high, row.pairs) == (2, 2, 10)
    assert (row.a_cycles, row.b_cycles) == (100, 50)


@pytest.fixture
def like(tmp_path):
    """A tree that is built, as this one is."""
    tree = tmp_path / "like"
    for name in ("setup.py", "p/same.pyx", "p/changed.pyx", "p/gone.pyx"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
        os.utime(tree / name, (1000, 1000))
    for name in ("p/same.c", "p/changed.c", "p/gone.c", "build/lib/p/same.so"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("built")
        os.utime(tree / name, (2000, 2000))
    (tree / ".venv").mkdir()
    (tree / ".venv" / ".built").write_text("release\n")
    return tree


def archive(**changed):
    """Of the same tree with other files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("setup.py", "p/same.pyx", "p/changed.pyx"):
            content = changed.get(name.rpartition("/")[2].partition(".")[0], name).encode()
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def is_older(path, than):
    return path.stat().st_mtime < than.stat().st_mtime


def test_only_what_differs_from_this_tree_is_compiled_again(like, tmp_path):
    tree = tmp_path / "tree"
    lay_out(archive(changed="other"), tree, like)
    assert (tree / "p/changed.pyx").read_text() == "other"
    assert is_older(tree / "p/same.pyx", tree / "p/same.c")
    assert is_older(tree / "p/changed.c", tree / "p/changed.pyx")
    assert (tree / "build/lib/p/same.so").exists()
    assert not (tree / "p/gone.c").exists()


@pytest.mark.parametrize("why", ["setup.py", "mode"])
def test_what_is_built_in_another_way_is_compiled_from_the_start(like, tmp_path, why):
    if why == "mode":
        (like / ".venv" / ".built").write_text("debug\n")
    tree = tmp_path / "tree"
    lay_out(archive(**({"setup": "-O3"} if why == "setup.py" else {})), tree, like)
    assert not (tree / "p/same.c").exists()
    assert not (tree / "build").exists()


def test_an_unknown_revision_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "bench.builds", "--a", "no-such-revision"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no-such-revision" in done.stderr
