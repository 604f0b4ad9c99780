"""Workers: who is polled, who sleeps, and when control may free what they used."""

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from tests.probe import Probe
from vhostpy.errors import ConfigError, ProtocolError
from vhostpy.runtime.pool import Workers

DEADLINE_S = 10


@contextmanager
def running(*arguments, **options):
    workers = Workers(*arguments, **options)
    workers.start()
    try:
        yield workers
    finally:
        workers.stop()


@contextmanager
def kick():
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def eventually(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.0005)


def worker_tids():
    tids = []
    for tid in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{tid}/comm") as comm:
            if comm.read().startswith("vhostpy-w"):
                tids.append(int(tid))
    return tids


def worker_cpu_s():
    """CPU seconds of the worker threads."""
    total = 0.0
    for tid in worker_tids():
        with open(f"/proc/self/task/{tid}/schedstat") as stat:
            total += int(stat.read().split()[0]) / 1e9
    return total


# Who is polled -----------------------------------------------------------------------


@pytest.mark.parametrize("poll", ["adaptive", "busy", "interrupt"])
def test_work_is_found_without_a_kick(poll):
    with running(poll=poll) as workers:
        probe = Probe()
        workers.add(probe, [])  # nobody would wake it
        for _ in range(100):
            probe.give()
            eventually(lambda: probe.idle)
        assert probe.arms == 0 and not probe.is_parked


@pytest.mark.parametrize("poll", ["adaptive", "busy", "interrupt"])
def test_an_idle_pollable_parks_and_a_kick_brings_it_back(poll):
    with running(poll=poll) as workers, kick() as fd:
        probe = Probe()
        workers.add(probe, [fd])
        for round_ in range(50):
            eventually(lambda: probe.is_parked)
            assert probe.disarms == round_, "each kick wakes it once"
            probe.give()
            os.eventfd_write(fd, 1)
            eventually(lambda: probe.idle)
        assert os.eventfd_read(fd) == 50, "kicks are never read by us"


def test_interrupt_mode_parks_at_the_first_empty_poll():
    with running(poll="interrupt") as workers, kick() as fd:
        probe = Probe()
        workers.add(probe, [fd])
        eventually(lambda: probe.is_parked)
        assert probe.polls == 1


@pytest.mark.parametrize("poll", ["adaptive", "interrupt"])
def test_work_that_comes_while_it_parks_is_not_lost(poll):
    with running(poll=poll) as workers, kick() as fd:
        probe = Probe()
        probe.give()
        workers.add(probe, [fd])
        for _ in range(5000):
            probe.give()
            os.eventfd_write(fd, 1)
        eventually(lambda: probe.idle)


def test_kicks_reach_only_their_pollable():
    with running() as workers, kick() as one, kick() as two:
        first, second = Probe(), Probe()
        workers.add(first, [one])
        workers.add(second, [two])
        eventually(lambda: first.is_parked and second.is_parked)
        woken, polls = first.disarms, second.polls
        os.eventfd_write(one, 1)
        eventually(lambda: first.disarms > woken and first.is_parked)
        assert second.polls == polls


def test_a_parked_one_wakes_while_another_is_busy():
    with running(poll="busy") as workers, kick() as fd:
        busy, parked = Probe(), Probe()
        workers.add(busy, [])
        workers.add(parked, [fd])
        eventually(lambda: parked.is_parked)
        parked.give()
        os.eventfd_write(fd, 1)
        eventually(lambda: parked.idle)


def test_nudge_makes_all_look_again():
    with running(2) as workers, kick() as one, kick() as two:
        probes = [Probe(), Probe()]
        workers.add(probes[0], [one])
        workers.add(probes[1], [two])
        eventually(lambda: all(probe.is_parked for probe in probes))
        for probe in probes:
            probe.give()
        workers.nudge()
        eventually(lambda: all(probe.idle for probe in probes))


def test_a_watched_fd_wakes_until_it_is_unwatched():
    with running() as workers, kick() as one, kick() as two:
        probe = Probe()
        workers.add(probe, [one])
        workers.watch(probe, two)
        eventually(lambda: probe.is_parked)
        probe.give()
        os.eventfd_write(two, 1)
        eventually(lambda: probe.idle)
        workers.unwatch(probe, two)
        eventually(lambda: probe.is_parked)
        polls = probe.polls
        os.eventfd_write(two, 1)
        os.eventfd_write(one, 1)
        eventually(lambda: probe.polls > polls)
        eventually(lambda: probe.is_parked)
        workers.unwatch(probe, one)
        eventually(lambda: not probe.is_parked)  # nobody would wake it now


def test_a_thousand_parked_ones_cost_nothing_and_each_still_wakes():
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(1000)]
    try:
        with running(poll="busy") as workers:
            probes = [Probe() for _ in fds]
            for probe, fd in zip(probes, fds, strict=True):
                workers.add(probe, [fd])
            eventually(lambda: all(probe.is_parked for probe in probes))
            busy = Probe()
            workers.add(busy, [])
            eventually(lambda: busy.polls and all(probe.is_parked for probe in probes))
            polls = sum(probe.polls for probe in probes)
            seen = busy.polls
            eventually(lambda: busy.polls > seen + 10_000)
            assert sum(probe.polls for probe in probes) == polls
            for probe, fd in list(zip(probes, fds, strict=True))[::50]:
                probe.give()
                os.eventfd_write(fd, 1)
            eventually(lambda: all(probe.idle for probe in probes))
    finally:
        for fd in fds:
            os.close(fd)


# Quiescence --------------------------------------------------------------------------


def test_what_was_removed_is_never_polled_again():
    with running(2) as workers, kick() as fd:
        others = [Probe() for _ in range(3)]
        for other in others:
            workers.add(other)
        for round_ in range(300):
            probe = Probe()
            workers.add(probe, [fd] if round_ % 2 else [])
            eventually(lambda probe=probe: probe.polls > 0)
            os.eventfd_write(fd, 1)
            workers.remove(probe)
            seen = (probe.polls, probe.arms, probe.disarms)
            polls = [other.polls for other in others]
            eventually(
                lambda polls=polls: all(
                    other.polls > before + 2 for other, before in zip(others, polls, strict=True)
                )
            )
            assert (probe.polls, probe.arms, probe.disarms) == seen


def test_a_late_kick_of_a_removed_one_does_not_reach_its_slot_s_next():
    with running(poll="interrupt") as workers, kick() as old, kick() as new:
        first = Probe()
        workers.add(first, [old])
        workers.remove(first)
        second = Probe()
        workers.add(second, [new])
        eventually(lambda: second.is_parked)
        polls = second.polls
        os.eventfd_write(old, 1)
        second.give()
        os.eventfd_write(new, 1)
        eventually(lambda: second.idle)
        eventually(lambda: second.is_parked)
        assert second.polls <= polls + 2


def test_wait_returns_at_once_when_all_sleep():
    with running(2) as workers:
        eventually(lambda: all(load["sleeps"] for load in workers.loads()))
        for _ in range(1000):
            workers.wait()


def test_a_turn_stuck_in_a_system_call_is_interrupted():
    # A front-end may make the call fd that we write to blocking again, and full.
    with running() as workers:
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        os.eventfd_write(fd, 2**64 - 2)
        probe = Probe()
        workers.add(probe)
        probe.jam(fd)
        time.sleep(0.01)  # it may now sit in the write; if not, wait() has less to do
        workers.wait()
        eventually(lambda: probe.jam_errno == 4)
        workers.remove(probe)
        os.close(fd)


@contextmanager
def full_counter():
    """An eventfd that blocks whoever writes to it; and a call that lets one write pass."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(fd, 2**64 - 2)

    def let_pass(probe):
        os.eventfd_read(fd)
        eventually(lambda: not probe.jammed)
        os.eventfd_write(fd, 2**64 - 3)

    yield fd, let_pass
    os.close(fd)


def test_who_blocks_a_worker_twice_is_polled_by_another():
    with running() as workers, full_counter() as (fd, let_pass):
        probe, neighbour = Probe(), Probe()
        workers.add(probe)
        workers.add(neighbour)
        for _ in range(2):
            assert workers.isolate() == []
            probe.jam(fd)
            time.sleep(0.02)
            let_pass(probe)
        eventually(lambda: len(workers.isolate()) == 1)
        assert (probe.worker, neighbour.worker) == (1, 0)
        for _ in range(10):
            probe.jam(fd)
            neighbour.give()
            eventually(lambda: neighbour.idle)
            assert probe.jammed
            let_pass(probe)
        assert workers.isolate() == []
        workers.add(other := Probe())
        assert other.worker == 0, "nobody else goes there"
        for pollable in (probe, neighbour, other):
            workers.remove(pollable)


def test_who_only_takes_long_stays():
    # As one who is the first to touch huge pages: the kernel fills them with zeros.
    with running() as workers:
        probe = Probe()
        workers.add(probe)
        for _ in range(5):
            probe.burn(5)
            eventually(lambda: not probe.jammed)
        assert workers.isolate() == []
        assert len(workers.loads()) == 1
        workers.remove(probe)


def test_control_can_use_workers_from_several_threads():
    with running(2) as workers:

        def churn():
            for _ in range(200):
                probe = Probe()
                workers.add(probe)
                workers.nudge()
                workers.remove(probe)

        threads = [threading.Thread(target=churn) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [load["pollables"] for load in workers.loads()] == [0, 0]


# Sleep and load ----------------------------------------------------------------------


@pytest.mark.parametrize("poll", ["adaptive", "interrupt"])
def test_idle_takes_less_than_a_hundredth_of_a_core(poll):
    with running(2, poll=poll) as workers, kick() as fd:
        probe = Probe()
        workers.add(probe, [fd])
        eventually(lambda: probe.is_parked)
        before = worker_cpu_s()
        time.sleep(1)  # the measured second
        assert worker_cpu_s() - before < 0.01


@pytest.mark.parametrize("under_way", [True, False])
def test_it_spins_less_where_that_never_meets_the_end_of_its_own_work(under_way):
    """Others may have come so late only because it had slept."""
    spin_s = 0.004
    polls = []
    with running(spin_us=int(spin_s * 1e6)) as workers, kick() as fd:
        probe = Probe()
        if under_way:
            probe.begin()
        workers.add(probe, [fd])
        for _ in range(12):
            before = probe.polls
            probe.give()
            os.eventfd_write(fd, 1)
            eventually(lambda: probe.idle and probe.is_parked)
            polls.append(probe.polls - before)
            time.sleep(2 * spin_s)  # the work comes later than any spin
    assert (max(polls[-3:]) < max(polls[:3]) / 4) == under_way


def rests(workers, looks=3):
    """Until a worker has slept so often without having found anything."""
    (before,) = workers.loads()

    def slept():
        (load,) = workers.loads()
        return load["sleeps"] >= before["sleeps"] + looks

    eventually(slept)


@pytest.mark.parametrize("poll", ["adaptive", "interrupt"])
def test_without_kicks_idle_takes_less_than_a_hundredth_of_a_core(poll):
    with running(poll=poll) as workers:
        probe = Probe()
        workers.add(probe, [])
        rests(workers, 110)  # the first ones follow each other sooner
        looks, since_s, used_s = probe.polls, time.monotonic(), worker_cpu_s()
        rests(workers, 200)
        looks, spent_s = probe.polls - looks, time.monotonic() - since_s
        assert looks < 1.05 * spent_s / 0.004 + 3
        assert worker_cpu_s() - used_s < 0.01 * spent_s


@pytest.mark.parametrize("poll", ["adaptive", "interrupt"])
def test_what_rests_has_its_work_found_by_the_next_look(poll):
    with running(poll=poll) as workers:
        probe, other = Probe(), Probe()
        workers.add(probe, [])
        workers.add(other, [])
        for _ in range(20):
            rests(workers)
            seen = probe.polls
            probe.give()
            eventually(lambda: probe.idle)
            # One look may have been under way.
            assert probe.found <= seen + 2


def test_looks_follow_each_other_soon_after_work_was_found():
    """At 50 us, twice that, and so on, up to 1 ms; and to 4 ms when it has rested for long."""
    with running(poll="interrupt") as workers:
        probe = Probe()
        workers.add(probe, [])
        sooner = 0
        for _ in range(100):
            rests(workers, 6)
            probe.give()
            eventually(lambda: probe.idle)
            since_s = time.monotonic()
            before = probe.found
            eventually(lambda before=before: probe.polls >= before + 4)
            sooner += time.monotonic() - since_s < 0.003
        assert sooner > 10, "four looks at the longest rest would have taken 16 ms"


def test_busy_workers_poll_what_gives_no_kicks_all_the_time():
    with running(poll="busy") as workers:
        probe = Probe()
        workers.add(probe, [])
        eventually(lambda: probe.polls > 100_000)
        assert workers.loads()[0]["sleeps"] == 0


def test_what_rests_is_looked_at_while_another_is_busy_and_no_more_once_removed():
    with running() as workers, kick() as fd:
        resting, busy = Probe(), Probe()
        workers.add(resting, [])
        workers.add(busy, [fd])
        rests(workers)

        def look(wanted):
            """As often, while the other one is kept busy."""
            before = resting.polls

            def done():
                busy.give()
                os.eventfd_write(fd, 1)
                return resting.polls >= before + wanted

            eventually(done)

        look(10)
        resting.give()
        look(2)
        assert resting.idle
        workers.remove(resting)
        polls = resting.polls
        for _ in range(50):
            eventually(lambda: busy.is_parked)
            busy.give()
            os.eventfd_write(fd, 1)
            eventually(lambda: busy.idle)
        assert resting.polls == polls


def test_loads_count_only_polls_that_found_work():
    with running(poll="busy") as workers:
        probe = Probe()
        workers.add(probe)
        workers.loads()
        eventually(lambda: probe.polls > 1000)
        (idle,) = workers.loads()
        assert idle["busy_ticks"] == 0 and idle["busy_share"] == 0 and idle["turns"] > 1000
        assert idle["items_per_poll"] is idle["cycles_per_item"] is None
        for count in (1, 2):
            probe.give()
            eventually(lambda: probe.idle)
            workers.wait()
            (load,) = workers.loads()
            assert load["busy_turns"] == load["busy_polls"] == load["items"] == count
            assert 0 < load["busy_ticks"] < load["total_ticks"]
            assert load["busy_ticks"] + load["idle_ticks"] == load["total_ticks"]
            # Of the time since the call before, not of all.
            assert load["items_per_poll"] == 1
            assert load["cycles_per_item"] == load["busy_ticks"] - idle["busy_ticks"]
            idle = load


def test_the_least_loaded_worker_gets_the_next():
    with running(3) as workers:
        assert [workers.add(Probe()) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
        assert workers.add(Probe(), worker=2) == 2
        assert workers.add(Probe()) == 0


def test_busy_workers_are_pinned_within_the_inherited_mask():
    allowed = os.sched_getaffinity(0)
    assert {load["cpu"] for load in Workers(poll="busy").loads()} <= allowed
    assert [load["cpu"] for load in Workers(2).loads()] == [None, None]
    cpu = min(allowed)
    with running(cpus=[cpu]):
        eventually(lambda: [os.sched_getaffinity(tid) for tid in worker_tids()] == [{cpu}])


# Errors and ends ---------------------------------------------------------------------


def test_bad_arguments_are_the_operator_s():
    with pytest.raises(ConfigError, match="0 workers"):
        Workers(0)
    with pytest.raises(ConfigError, match="fast"):
        Workers(poll="fast")
    with pytest.raises(ConfigError, match="CPU 4095"):
        Workers(cpus=[4095])


def test_an_fd_that_cannot_be_watched_is_refused_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").touch()
    with running() as workers, kick() as fd, open(tmp_path / "file") as file:
        probe = Probe()
        with pytest.raises(ProtocolError, match="cannot be watched"):
            workers.add(probe, [fd, file.fileno()])
        assert probe.worker is None
        workers.add(probe, [fd])
        workers.remove(probe)
        workers.remove(probe)


def test_start_and_stop_leave_no_thread_and_no_fd():
    threads, fds = threading.active_count(), os.listdir("/proc/self/fd")
    for poll in ("adaptive", "busy", "interrupt"):
        workers = Workers(2, poll=poll)
        workers.start()
        probe = Probe()
        workers.add(probe)
        workers.stop()
        polls = probe.polls
        workers.remove(probe)
        workers.stop()
        assert probe.polls == polls
        del workers
    assert threading.active_count() == threads
    assert os.listdir("/proc/self/fd") == fds


def test_a_process_ends_though_nobody_stopped_its_workers():
    program = (
        "from tests.probe import Probe\n"
        "from vhostpy.runtime.pool import Workers\n"
        "workers = Workers(2, poll='busy'); workers.start(); workers.add(Probe())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=DEADLINE_S)


def test_a_forked_child_does_not_wait_for_its_parent_s_threads():
    with running() as workers:
        child = os.fork()
        if child == 0:
            workers.stop()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        probe = Probe()
        workers.add(probe)
        eventually(lambda: probe.polls > 0)
