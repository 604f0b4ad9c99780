"""What the log makes of texts that others made up, and of too many of them."""

import io
import logging
import re

import pytest

from vhostpy.errors import ProtocolError
from vhostpy.system.lines import BURST, REFILL_S, Budget, Lines, Talk

EVIL = "x\x1b[2J\x1b]0;owned\x07\r\nvhostpy net: vu1: forged \u202e \x9b31m \udcff"
HARMLESS = (
    r"x\x1b[2J\x1b]0;owned\x07\r\nvhostpy net: vu1: forged \u202e \x9b31m \udcff"  # as it is shown
)


def record_of(text, *args, level=logging.INFO, error=None, logger="vhostpy"):
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord(logger, level, "", 0, text, args, info)


def shown(text, *args, **more):
    return Lines("vhostpy net").format(record_of(text, *args, **more)).split("\n")


def raised(error, before=None):
    try:
        try:
            if before is not None:
                raise before
        finally:
            raise error
    except Exception as caught:
        return caught


def test_what_comes_from_outside_is_shown_in_one_line():
    assert shown("%s: is %s", EVIL, EVIL) == [f"vhostpy net: {HARMLESS}: is {HARMLESS}"]
    assert shown("%s: %d bytes", OSError(2, EVIL, EVIL), 5)[0].startswith("vhostpy net: [Errno 2]")
    assert shown("%(a)s", {"a": EVIL}) == [f"vhostpy net: {HARMLESS}"]


def test_line_breaks_of_our_own_stay():
    error = ProtocolError(f"no {EVIL}", f"give {EVIL}")
    assert shown("%s: over\n  then: %s", "vu0", error, level=logging.ERROR) == [
        "vhostpy net: error: vu0: over",
        f"  then: no {HARMLESS}",
        f"  next: give {HARMLESS}",
    ]


def test_an_exception_is_shown_with_its_frames_and_its_text_in_one_line():
    lines = shown("%s: a defect", "vu0", error=raised(ValueError(EVIL), KeyError(EVIL)))
    assert lines[0] == "vhostpy net: vu0: a defect"
    assert lines.count("Traceback (most recent call last):") == 2
    assert "which led to:" in lines and any(", in raised" in line for line in lines)
    assert lines[-1] == f"ValueError: {HARMLESS}"
    assert not any(line.startswith("vhostpy net: vu1") for line in lines)


def test_what_another_library_has_put_together_has_no_control_characters():
    lines = shown("Unhandled\nrepr: \x1b[2J", logger="asyncio", level=logging.ERROR)
    assert lines == ["vhostpy net: error: Unhandled", r"repr: \x1b[2J"]


def test_a_flood_is_cut_and_counted_by_socket_and_kind():
    budget, now = Budget(), 100.0
    said = [budget.take(record_of("%s: connected", "vu0"), now) for _ in range(1000)]
    assert sum(said) == BURST
    # Neither another socket nor another kind is the worse for it.
    assert budget.take(record_of("%s: connected", "vu1"), now)
    assert budget.take(record_of("%s: refused: %s", "vu0", "why"), now)
    assert budget.due(now) == []
    later = record_of("%s: connected", "vu0")
    assert budget.take(later, now + REFILL_S)
    assert later.left_out == 1000 - BURST
    assert budget.due(now + 2 * REFILL_S) == []


def test_what_was_left_out_is_told_though_nothing_follows():
    budget, now = Budget(), 100.0
    for i in range(1234 + BURST + 1):
        budget.take(record_of("%s: ring %d", "vu0", i), now)
    assert budget.due(now + REFILL_S / 2) == []
    (last,) = budget.due(now + REFILL_S)
    assert Lines("p").format(last) == f"p: vu0: ring {1234 + BURST} … 1,234 more like this"
    assert budget.due(now + 20 * REFILL_S) == [] and not budget._kinds


def test_many_made_up_names_are_one_kind(monkeypatch):
    monkeypatch.setattr("vhostpy.system.lines.KINDS_MAX", 5)
    budget = Budget()
    said = [budget.take(record_of("%s: hm", f"name {i}"), 1.0) for i in range(1000)]
    assert sum(said) == 5 + BURST


@pytest.mark.parametrize("count", [1, BURST, BURST + 1, 100])
def test_what_is_said_and_what_is_left_out_add_up(count):
    stream = io.StringIO()
    talk = Talk(stream, "p")
    for _ in range(count):
        talk.handle(record_of("%s: hello\n  next: nothing", "vu0"))
    talk.close()
    lines = re.findall(r"^p: vu0: hello(?: … (\d+) more like this)?$", stream.getvalue(), re.M)
    assert len(lines) + sum(int(more or 0) for more in lines) == count
    assert len(lines) <= BURST + 1
