"""The forwarding table: learning, ageing, limits, fairness."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostpy.errors import ConfigError
from vhostpy.vswitch.fdb import ForwardingTable


def mac(number: int) -> bytes:
    return b"\x02\x00" + number.to_bytes(4, "big")


def table(limit: int = 64, age_s: int = 300) -> ForwardingTable:
    fdb = ForwardingTable(limit, age_s)
    fdb.tick(1000)
    return fdb


def fill(fdb: ForwardingTable, port: int, first: int, count: int) -> None:
    for number in range(first, first + count):
        fdb.seen(mac(number), port)


def known(fdb: ForwardingTable, port: int) -> int:
    return sum(entry[2] == port for entry in fdb.entries())


def test_an_address_is_behind_the_port_where_it_was_seen():
    fdb = table()
    assert fdb.port_behind(mac(1)) is None
    fdb.seen(mac(1), 3)
    assert fdb.port_behind(mac(1)) == 3
    assert fdb.entries() == [(0, mac(1), 3, 0)]


def test_the_address_of_zeros_is_a_key_like_any_other():
    fdb = table()
    assert fdb.port_behind(bytes(6)) is None
    fdb.seen(bytes(6), 2)
    assert fdb.port_behind(bytes(6)) == 2


def test_an_address_moves_with_the_port_where_it_is_seen():
    fdb = table()
    fdb.seen(mac(1), 0)
    fdb.seen(mac(1), 1)
    assert fdb.port_behind(mac(1)) == 1
    assert (fdb.count, fdb.learned, fdb.moved) == (1, 1, 1)


def test_the_same_address_on_another_vlan_is_another_key():
    fdb = table()
    fdb.seen(mac(1), 0, vlan=1)
    fdb.seen(mac(1), 1, vlan=4095)
    assert fdb.port_behind(mac(1), vlan=1) == 0
    assert fdb.port_behind(mac(1), vlan=4095) == 1
    assert fdb.port_behind(mac(1)) is None
    assert sorted(fdb.entries()) == [(1, mac(1), 0, 0), (4095, mac(1), 1, 0)]


@pytest.mark.parametrize("group", [b"\xff" * 6, b"\x01\x00\x5e\x00\x00\x01"])
def test_a_group_address_is_never_learned(group):
    fdb = table()
    fdb.seen(group, 0)
    assert fdb.count == 0
    assert fdb.port_behind(group) is None


def test_an_entry_ages_out_in_the_second_when_it_gets_old():
    fdb = table(age_s=10)
    fdb.seen(mac(1), 0)
    fdb.tick(1009)
    assert fdb.port_behind(mac(1)) == 0
    assert fdb.entries() == [(0, mac(1), 0, 9)]
    fdb.tick(1010)
    assert fdb.port_behind(mac(1)) is None
    assert fdb.entries() == []
    assert (fdb.count, fdb.aged) == (0, 1)


def test_an_entry_that_is_seen_again_stays():
    fdb = table(age_s=10)
    fdb.seen(mac(1), 0)
    fdb.tick(1009)
    fdb.seen(mac(1), 0)
    fdb.tick(1018)
    assert fdb.port_behind(mac(1)) == 0
    assert (fdb.learned, fdb.aged) == (1, 0)


def test_a_large_table_holds_all_it_may_and_forgets_it_in_the_second_when_it_gets_old():
    fdb = table(limit=65536, age_s=10)
    fill(fdb, 3, 0, 65536)
    assert (fdb.count, fdb.refused) == (65536, 0)
    assert {entry[:3] for entry in fdb.entries()} == {(0, mac(n), 3) for n in range(65536)}
    assert all(fdb.port_behind(mac(n)) == 3 for n in range(65536))
    fdb.tick(1010)
    assert (fdb.count, fdb.aged) == (0, 65536)


def test_flushing_a_port_forgets_its_entries_only():
    fdb = table()
    fill(fdb, 0, 0, 5)
    fill(fdb, 1, 100, 7)
    assert fdb.flush(0) == 5
    assert (known(fdb, 0), known(fdb, 1), fdb.count) == (0, 7, 7)
    assert fdb.flush() == 7
    assert fdb.count == 0


def test_a_full_table_refuses_and_counts():
    fdb = table(limit=64)
    fill(fdb, 0, 0, 100)
    assert (fdb.count, fdb.refused) == (64, 36)
    assert known(fdb, 0) == 64
    assert all(fdb.port_behind(mac(n)) == 0 for n in range(64))


@pytest.mark.parametrize("limit", [1, 2, 7, 64, 8192])
def test_the_limit_can_be_reached_and_not_passed(limit):
    fdb = table(limit=limit)
    fill(fdb, 0, 0, 2 * limit)
    assert fdb.count == limit


def test_a_hostile_port_does_not_keep_others_out():
    fdb = table(limit=1024)
    fill(fdb, 0, 0, 5000)
    assert known(fdb, 0) == 1024
    fill(fdb, 1, 100_000, 300)
    fill(fdb, 2, 200_000, 300)
    assert known(fdb, 1) == 300
    assert known(fdb, 2) == 300
    assert fdb.count <= 1024
    assert fdb.evicted == 600


def test_a_hostile_port_does_not_push_others_out():
    fdb = table(limit=1024)
    fill(fdb, 1, 100_000, 300)
    fill(fdb, 2, 200_000, 300)
    fill(fdb, 0, 0, 20_000)
    assert known(fdb, 1) == 300
    assert known(fdb, 2) == 300
    assert fdb.count <= 1024


@pytest.mark.parametrize("limit", [2, 10, 1000])
def test_no_port_gets_beyond_its_share_by_evicting(limit):
    fdb = table(limit=limit)
    fill(fdb, 0, 0, 5 * limit)
    fill(fdb, 1, 100_000, 5 * limit)
    assert (known(fdb, 0), known(fdb, 1)) == (limit / 2, limit / 2)


def test_room_comes_back_when_entries_age_out():
    fdb = table(limit=64, age_s=10)
    fill(fdb, 0, 0, 64)
    fdb.tick(1010)
    fill(fdb, 0, 1000, 64)
    assert fdb.count == 64
    assert fdb.port_behind(mac(1063)) == 0


@pytest.mark.parametrize("arguments", [(0, 300), (65537, 300), (64, 0)])
def test_senseless_limits_are_refused(arguments):
    with pytest.raises(ConfigError):
        ForwardingTable(*arguments)


@pytest.mark.parametrize(
    ("address", "vlan", "port"),
    [(b"\x02" * 5, 0, 0), (b"\x02" * 6, 4096, 0), (b"\x02" * 6, 0, 4096), (b"\x02" * 6, 0, -1)],
)
def test_the_doors_check_what_they_are_given(address, vlan, port):
    with pytest.raises(ValueError):
        table().seen(address, port, vlan=vlan)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("seen"), st.integers(0, 40), st.integers(0, 3)),
        st.tuples(st.just("tick"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("flush"), st.integers(0, 3), st.just(0)),
    ),
    max_size=80,
)


@given(OPERATIONS)
def test_below_its_limit_the_table_is_a_dict(operations):
    fdb = table(limit=64, age_s=10)
    model: dict[bytes, tuple[int, int]] = {}
    now = 1000
    for what, a, b in operations:
        if what == "seen":
            fdb.seen(mac(a), b)
            model[mac(a)] = (b, now)
        elif what == "tick":
            now += a
            fdb.tick(now)
        else:
            fdb.flush(a)
            model = {m: v for m, v in model.items() if v[0] != a}
        young = {m: p for m, (p, seen) in model.items() if now - seen < 10}
        assert {m: p for _, m, p, _ in fdb.entries()} == young
        for number in range(41):
            assert fdb.port_behind(mac(number)) == young.get(mac(number))
