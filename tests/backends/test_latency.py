"""Latency histograms: where a time is counted, and what is read off."""

from hypothesis import given
from hypothesis import strategies as st

from tests.backends.guest import DISCARD, FLUSH, IN, OK, OUT, eventually
from tests.backends.machine import Machine
from tests.gate import GateStorage
from vhostpy.backends.blk import latency


@given(st.integers(0, 2**64 - 1))
def test_a_bin_holds_times_of_its_quarter_of_a_power_of_two(ticks):
    index = latency.bin_of_ticks(ticks)
    assert 0 <= index < 252
    top_us = latency.top_us(index) + 0.001  # rounded to that
    rate = 1 / (latency.top_us(latency.bin_of_ticks(1 << 40)) / (1.25 * (1 << 40)))
    assert ticks / rate <= top_us * 1.0001
    assert latency.top_us(index) <= max(ticks, 1) / rate * 1.251 + 0.001 or ticks < 4
    assert latency.bin_of_ticks(max(ticks - 1, 0)) in (index, index - 1)


def test_percentiles_are_those_of_the_counts():
    slow, fast = latency.bin_of_ticks(1 << 30), latency.bin_of_ticks(1 << 10)
    bins = {"read": {fast: 990, slow: 10}}
    latency.add_bins(bins, {"read": {fast: 1}, "flush": {slow: 1}})
    read = latency.summary(bins)["read"]
    assert read["count"] == 1001
    assert read["p50_us"] == read["p99_us"] == latency.top_us(fast)
    assert read["p99_9_us"] == read["max_us"] == latency.top_us(slow)
    assert read["histogram_us"] == [[latency.top_us(fast), 991], [latency.top_us(slow), 10]]
    assert list(latency.summary(bins)) == ["read", "flush"]


def test_each_operation_is_counted_and_outlives_its_ring():
    storage = GateStorage(1 << 20)
    with Machine(storage) as machine:
        waiting = machine.guest.request(IN, space=512)
        eventually(lambda: machine.counters()["inflight"] == 1)
        storage.open()
        assert waiting.wait() == OK
        for _ in range(2):
            assert machine.guest.request(OUT, data=bytes(512)).wait() == OK
        assert machine.guest.request(FLUSH).wait() == OK
        assert machine.guest.request(DISCARD, data=bytes(8) + b"\x08" + bytes(7)).wait() == OK
        expected = {"read": 1, "write": 2, "flush": 1, "discard": 1}
        assert {op: row["count"] for op, row in machine.disk.latency().items()} == expected
        _, base = machine.stop()
        machine.start(base=base)
        assert machine.guest.request(FLUSH).wait() == OK
        expected["flush"] = 2
        assert {op: row["count"] for op, row in machine.disk.latency().items()} == expected
