"""Disks whose rings stop and start, whose memory changes, and whose storage hangs."""

import asyncio
import os

import pytest

from tests.backends.guest import FLUSH, IN, OK, OUT, UNTOUCHED, Guest, eventually
from tests.backends.machine import SIZE, STORAGES, Machine, each_layout
from tests.gate import GateStorage
from tests.rings import base_of
from vhostpy._spec import Feature
from vhostpy.backends.blk.queue import DiskQueue
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import GuestError


@each_layout
def test_a_stopped_ring_starts_again_where_it_was(features):
    with Machine(RamStorage(SIZE), guest=Guest(features=features, queue_size=16)) as machine:
        for round_ in range(10):
            assert machine.guest.request(OUT, round_, data=bytes([round_]) * 512).wait() == OK
            drained, base = machine.stop()
            if features >> Feature.RING_PACKED & 1:
                slots = 2 * (2 * round_ + 1)  # a request's header and data, and its answer
                assert drained and base == base_of("packed", 16, slots)
            else:
                assert drained and base == 2 * round_ + 1
            sent = machine.guest.request(IN, round_, space=512)
            assert not sent.is_done()
            machine.start(base=base)
            assert (sent.wait(), sent.data) == (OK, bytes([round_]) * 512)
        assert machine.counters()["reads"] == 10, "counters outlive the ring"


def test_drain_waits_for_what_is_under_way_and_takes_nothing_more():
    storage = GateStorage(SIZE)
    with Machine(storage) as machine:
        sent = [machine.guest.request(OUT, i, data=b"x" * 512) for i in range(5)]
        eventually(lambda: machine.counters()["inflight"] == 5)
        assert machine.guest.memory.in_use == 5

        async def drain():
            waiting = asyncio.create_task(machine.disk.ring_drain(0, 10))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            late = machine.guest.request(OUT, 9, data=b"y" * 512)
            storage.open()
            assert await waiting
            return late

        late = asyncio.run(drain())
        assert all(request.is_done() and request.status == OK for request in sent)
        assert not late.is_done()
        assert machine.guest.memory.in_use == 0
        _, base = machine.stop()
        assert base == 5
        machine.start(base=base)
        assert late.wait() == OK


@pytest.mark.parametrize("answers_late", [True, False])
def test_a_hung_storage_ends_the_drain_at_its_deadline_and_keeps_the_memory(answers_late):
    storage = GateStorage(SIZE, capacity=2)
    with Machine(storage) as machine:
        guest = machine.guest
        sent = [guest.request(IN, i, space=512, kick=False) for i in range(4)]
        guest.drivers[0].kick()
        eventually(lambda: machine.counters()["inflight"] == 4)
        drained, _ = machine.stop(deadline_s=0.05)
        assert not drained
        # Two never reached the storage; two hang, and name guest memory.
        eventually(lambda: machine.disk.status()["hung_requests"] == 2)
        assert guest.memory.in_use == 2
        if answers_late:
            storage.open()
            eventually(lambda: machine.disk.status()["hung_requests"] == 0)
            assert guest.memory.in_use == 0
        assert not any(request.is_done() for request in sent), "the ring is not ours any more"
        assert all(request.status == UNTOUCHED for request in sent)
        if not answers_late:
            storage.open()  # only so that this process ends tidily
            eventually(lambda: machine.disk.status()["hung_requests"] == 0)


def test_rings_that_hang_are_not_left_behind_without_end():
    """By a guest that starts its ring again and again, while the storage hangs."""
    storage = GateStorage(SIZE)
    with Machine(storage, queues=3) as machine:
        for hung in range(1, 4):
            machine.guest.request(IN, space=512)
            eventually(lambda: machine.counters()["inflight"] == 1)
            _, base = machine.stop(deadline_s=0)
            assert machine.disk.status()["hung_requests"] == hung
            if hung < 3:
                machine.start(base=base)
        with pytest.raises(GuestError, match="3 rings of sessions before still hang"):
            machine.start(base=base)
        storage.open()
        eventually(lambda: machine.disk.status()["hung_requests"] == 0)
        machine.start(base=base)
        assert machine.guest.request(IN, space=512).wait() == OK


def test_requests_survive_a_change_of_the_memory_map():
    storage = GateStorage(SIZE)
    with Machine(storage) as machine:
        guest = machine.guest
        sent = [guest.request(OUT, i, data=bytes([i]) * 512) for i in range(3)]
        eventually(lambda: machine.counters()["inflight"] == 3)
        old, new = guest.memory, guest.map()
        with machine.held():
            machine.rings[0].remap(new)
            storage.open()  # they complete while nobody may touch the ring
        guest.memory = new
        assert [request.wait() for request in sent] == [OK] * 3
        assert (old.in_use, new.in_use) == (0, 0)
        assert guest.request(IN, space=512).wait() == OK


def test_a_session_that_ends_in_a_change_waits_for_requests_but_answers_none():
    storage = GateStorage(SIZE)
    with Machine(storage) as machine:
        sent = machine.guest.request(OUT, data=b"x" * 512)
        eventually(lambda: machine.counters()["inflight"] == 1)
        machine.rings[0].set_live(False)
        machine.workers.wait()
        storage.open()
        drained, _ = machine.stop()
        assert drained and not sent.is_done()
        assert machine.guest.memory.in_use == 0


@pytest.mark.parametrize("kind", ["file", "uring"])
def test_fds_and_threads_are_as_before(tmp_path, kind):
    def fds():
        return len(os.listdir("/proc/self/fd"))

    before = fds()
    for _ in range(3):
        with Machine(STORAGES[kind](tmp_path), guest=Guest(queues=3)) as machine:
            assert machine.guest.request(FLUSH, index=2).wait() == OK
    del machine
    assert fds() == before


def test_a_queue_with_requests_under_way_does_not_close():
    storage = GateStorage(SIZE)
    with Guest() as guest:
        queue = DiskQueue(guest.virtqueue(), storage)
        queue.virtqueue.set_live(True)
        sent = guest.request(FLUSH)
        assert queue.step() > 0
        with pytest.raises(RuntimeError, match="1 requests"):
            queue.close()
        storage.open()
        queue.step()
        assert sent.wait() == OK
        queue.close()
