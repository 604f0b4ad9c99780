"""I/O limits: the arithmetic by a clock of our own, then disks that wait and sleep."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.guest import IN, OK, OUT, Guest, eventually
from tests.backends.machine import Machine
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import ConfigError
from vhostpy.runtime.limits import Limits, Settings

SECOND = 1_000_000  # ticks of the clock in these tests


def limits(requests=None, size=None, burst_s=0.0, now=0):
    made = Limits(ticks_per_s=SECOND)
    made.set(Settings(requests, size, burst_s), now=now)
    return made


def test_a_disk_without_limits_has_none():
    assert Limits(ticks_per_s=SECOND).take(0, [1 << 30] * 100) == 100
    assert Limits(ticks_per_s=SECOND).wait(0) == 0


def test_requests_pass_one_by_one_at_their_time():
    limit = limits(requests=1000)
    for second in range(3):
        for millisecond in range(1000):
            now = second * SECOND + millisecond * 1000
            assert limit.take(now, [512] * 64) == 1
            assert limit.take(now + 999, [512] * 64) == 0
            assert limit.wait(now + 900) in (100_000, 100_001)


def test_an_idle_disk_saves_up_its_burst_and_no_more():
    limit = limits(requests=1000, burst_s=0.1)
    assert limit.take(0, [512] * 256) == 1, "nothing was saved before the limit"
    assert limit.take(100 * SECOND, [512] * 256) == 101
    assert limit.take(100 * SECOND, [512] * 256) == 0


@given(
    gaps=st.lists(st.integers(0, 20_000), min_size=50, max_size=400),
    size=st.integers(512, 1 << 20),
    rate=st.sampled_from([10_000, 1 << 20, 100 << 20]),
)
def test_bytes_over_time_are_exact_whatever_comes_when(gaps, size, rate):
    limit = limits(size=rate, burst_s=0.05)
    now = passed = 0
    for gap in gaps:
        now += gap
        passed += size * limit.take(now, [size] * 64)
    # The last request of each look may be larger than what was left: once, as a debt.
    assert passed <= rate * (now / SECOND + 0.05) * 1.000001 + size + 2
    if limit.take(now, [size]) == 0:
        # It has not passed less either, had it not been idle.
        free = now + limit.wait(now) // 1000 + 1
        assert limit.take(free, [size]) == 1
        assert passed + size >= rate * (free / SECOND - sum(g for g in gaps if g > 0) / SECOND)


def test_always_busy_it_reaches_its_limits_exactly():
    limit = limits(requests=5000, size=5000 * 4096 // 2, burst_s=0.1)
    passed, now = 0, 0
    while now < 10 * SECOND:
        passed += limit.take(now, [4096] * 64)
        now += max(limit.wait(now) // 1000, 1)
    assert abs(passed - 10 * 2500) <= 2, "the stricter of the two"


def test_a_large_request_passes_and_the_next_wait_for_it():
    limit = limits(size=1 << 20)
    assert limit.take(0, [4 << 20, 512]) == 1
    assert limit.take(4 * SECOND - 1, [512]) == 0
    assert limit.take(4 * SECOND + 1, [512]) == 1


def test_a_new_limit_forgives_what_the_one_before_was_owed():
    limit = limits(size=1)
    assert limit.take(0, [1 << 20]) == 1
    limit.set(Settings(bytes_per_s=1 << 30), now=10)
    assert limit.take(10, [512]) == 1
    limit.set(Settings(), now=10)
    assert limit.take(10, [1 << 30] * 64) == 64


@pytest.mark.parametrize(
    "settings", [Settings(-1), Settings(0), Settings(None, 1 << 50), Settings(1, 1, -1.0)]
)
def test_what_makes_no_sense_is_refused(settings):
    with pytest.raises(ConfigError):
        Limits().set(settings)


# A disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_limited_disk_sleeps_until_its_time_and_loses_nothing(workers):
    """Two a second: the worker's turns tell that it slept, not that time passed."""
    guest = Guest(queues=2)
    with Machine(RamStorage(1 << 20), guest=guest, workers=workers) as machine:
        machine.disk.set_limits(Settings(requests_per_s=2, burst_s=0))
        sent = [guest.request(OUT, n, data=bytes([n]) * 512, index=n % 2) for n in range(3)]
        # Two workers may both find the first second free: a debt that the third waits for.
        eventually(lambda: any(request.is_done() for request in sent), "the first")
        eventually(lambda: all(q["parked"] for q in machine.disk.status()["queues"]), "sleep")
        turns = sum(load["turns"] for load in machine.workers.loads())
        assert [request.wait() for request in sent] == [OK] * 3
        # A second of spinning would be a million of them.
        assert sum(load["turns"] for load in machine.workers.loads()) - turns < 100_000
        for n in range(3):
            machine.disk.set_limits(Settings())
            read = guest.request(IN, n, space=512, index=n % 2)
            assert (read.wait(), read.data) == (OK, bytes([n]) * 512)


def test_lifting_a_limit_wakes_who_sleeps_for_it():
    with Machine(RamStorage(1 << 20)) as machine:
        machine.disk.set_limits(Settings(bytes_per_s=1, burst_s=0))
        assert machine.guest.request(IN, space=65536).wait() == OK
        waiting = machine.guest.request(IN, space=512)  # its turn is in 18 hours
        eventually(lambda: machine.counters()["parked"], "sleep")
        assert not waiting.is_done()
        machine.disk.set_limits(Settings())
        assert waiting.wait() == OK
        assert machine.disk.status()["limits"]["bytes_per_s"] is None


def test_a_limited_ring_stops_at_once():
    with Machine(RamStorage(1 << 20)) as machine:
        machine.disk.set_limits(Settings(bytes_per_s=1, burst_s=0))
        assert machine.guest.request(IN, space=65536).wait() == OK
        waiting = machine.guest.request(IN, space=512)
        drained, base = machine.stop()
        assert drained and not waiting.is_done()
        machine.disk.set_limits(Settings())
        machine.start(base=base)
        assert waiting.wait() == OK
