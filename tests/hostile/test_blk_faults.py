"""Chains of a disk that nobody can use: answered with an error, or still the driver's.

None goes back as it came. A driver that offers the same memory again finds in its status
byte what was there before: 0, which is OK.
"""

import os
from collections import Counter
from contextlib import contextmanager

import pytest

from tests.gate import GateStorage
from tests.hostile.attacker import (
    FEATURES,
    GOOD,
    INDIRECT,
    NEXT,
    STATUS,
    WRITE,
    Attacker,
    each_layout,
)
from tests.hostile.victim import eventually
from tests.rings import BORDER, DESC, END, GPA, TABLES, USED, base_of
from tests.serving import serving
from tests.vhostpy.test_inflight import SIZE, marked
from vhostpy._spec import Feature
from vhostpy.backends.blk.device import Disk
from vhostpy.memory.guest import DirtyLog
from vhostpy.ring.inflight import region_bytes
from vhostpy.runtime.pool import Workers
from vhostpy.server.listen import Server
from vhostpy.system.fds import OwnedFd

HEADER = (STATUS, 16)
AT = STATUS + 16  # where the status byte is
ANSWER = (AT, 1, WRITE)
SPACE = (GOOD, 512, WRITE)
OK, IOERR = 0, 1
# Eight regions of a page, each beside the one before: a piece over all has 8 segments.
PAGES = 8
STRIP = (END, PAGES * 4096, WRITE)
BIG = 1 << 40
LAYOUT = (
    (GPA, 2 << 20),
    (BORDER, 2 << 20),
    *((END + 4096 * i, 4096) for i in range(PAGES)),
    (BIG, 1 << 30),
)
each_way = pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])


class Place:
    """A disk on a real socket, and a guest with its hands free on its ring."""

    def __init__(self, loop, server, attacker):
        self.loop, self.server, self.attacker = loop, server, attacker
        self.memory, self.ring = attacker.memory, attacker.ring

    def offer(self, pieces, id, indirect=False):
        self.memory.write(STATUS, bytes(16) + bytes([OK, 0xEE]))
        if indirect:
            size = self.ring.write_table(TABLES, *pieces)
            pieces = [(TABLES, size, INDIRECT)]
        self.ring.offer_chain(*pieces, id=id)

    def under_way(self):
        """Ids that are marked for whoever comes after us."""
        region = os.pread(self.attacker.end.inflight[1].fileno(), region_bytes(SIZE), 0)
        return marked(region, "packed" if self.attacker.packed else "split")

    def status(self):
        async def look():
            return self.server.status()

        return self.loop.run(look())

    def counters(self):
        (queue,) = self.status()["device"]["queues"]
        return Counter({key: queue[key] for key in ("bad_chains", "reads", "inflight")}) + Counter(
            queue["chain_faults"]
        )


@contextmanager
def place(tmp_path, layout, *, opened=True, size=SIZE, features=FEATURES, start=True):
    storage = GateStorage(1 << 20)
    if opened:
        storage.open()
    workers = Workers(1)
    workers.start()
    server = Server(Disk("vb0", storage, workers, queues=1), path=str(tmp_path / "s"))
    try:
        with (
            serving(server) as loop,
            Attacker(
                server.path, kind=layout, size=size, layout=LAYOUT, start=False, features=features
            ) as attacker,
        ):
            attacker.end.get_inflight(1, size)
            attacker.end.set_inflight()
            if start:
                attacker.start()
            try:
                yield Place(loop, server, attacker)
            finally:
                storage.open()
    finally:
        workers.stop()


# Answered ----------------------------------------------------------------------------------

ANSWERED = {
    "data outside memory": ("unmapped", [HEADER, (0, 512, WRITE), ANSWER]),
    "data to be read outside memory": ("unmapped", [HEADER, (0, 512), ANSWER]),
    "data that ends outside memory": (
        "unmapped", [HEADER, (END + 4096 * PAGES - 8, 16, WRITE), ANSWER],
    ),
    "data that wraps at 2**64": ("unmapped", [HEADER, (2**64 - 8, 16, WRITE), ANSWER]),
    "no header in memory": ("unmapped", [(0, 16), SPACE, ANSWER]),
    "data and status from outside into memory": ("unmapped", [HEADER, (BIG - 511, 512, WRITE)]),
    "an empty piece": ("zero_length", [HEADER, (GOOD, 0), ANSWER]),
    "an empty header": ("zero_length", [(GOOD, 0), ANSWER]),
    "an empty writable piece": ("zero_length", [HEADER, (GOOD, 0, WRITE), ANSWER]),
    "read behind write": ("bad_order", [HEADER, ANSWER, (GOOD, 512)]),
    "a header behind all": ("bad_order", [SPACE, ANSWER, HEADER]),
    "the status behind what is out of order": ("bad_order", [SPACE, HEADER, ANSWER]),
    "all of it": ("unmapped", [(0, 16), (GOOD, 0), SPACE, HEADER, ANSWER, (8, 8)]),
    "more than 2**32 bytes": ("too_long", [HEADER, *[(BIG + 1, (1 << 30) - 1, WRITE)] * 5, ANSWER]),
    "more pieces than anybody holds": ("too_many_segments", [HEADER, *[STRIP] * 600, ANSWER]),
}  # fmt: skip


@each_layout
@each_way
@pytest.mark.parametrize(("fault", "pieces"), ANSWERED.values(), ids=ANSWERED.keys())
def test_what_cannot_be_done_is_ioerr_in_its_status_byte(tmp_path, layout, indirect, fault, pieces):
    size = SIZE if len(pieces) < SIZE or indirect else 1024
    at = BIG if pieces[-1] == (BIG - 511, 512, WRITE) else AT
    with place(tmp_path, layout, size=size) as p:
        p.memory.write(GOOD, b"\xff" * 4096)
        p.memory.write(BIG, b"\0\xff")
        for i in range(1, 4):
            p.offer(pieces, 1, indirect)
            p.attacker.kick()
            assert p.attacker.comes_back() == [(1, 1)]
            assert p.memory.read(at, 1) == bytes([IOERR])
            # And nothing else.
            p.memory.write(at, bytes(1))
            assert p.memory.read(GOOD, 4096) == b"\xff" * 4096
            assert p.memory.read(BIG, 2) == b"\0\xff"
            assert p.memory.read(STATUS, 18) == bytes(17) + b"\xee"
            assert p.counters() == {fault: i}
            assert size > SIZE or eventually(lambda: p.under_way() == [])
        assert p.attacker.request() == OK
        assert p.status()["waits_for"] == ""


@each_layout
@each_way
def test_the_page_of_such_an_answer_is_logged(tmp_path, layout, indirect):
    features = FEATURES | 1 << Feature.LOG_ALL
    with (
        place(tmp_path, layout, features=features, start=False) as p,
        OwnedFd(os.memfd_create("log")) as log,
    ):
        os.ftruncate(log.fileno(), size := 1 << 20)
        p.attacker.end.set_log(log, size)
        p.attacker.start()
        p.offer([HEADER, (0, 512, WRITE), ANSWER], 1, indirect)
        p.attacker.kick()
        assert p.attacker.comes_back() == [(1, 1)]
        assert DirtyLog(log.fileno(), 0, size).pages() == [AT >> 12]


# Not answered ------------------------------------------------------------------------------


def chain(*pieces, table=()):
    """(Address, length, flags) of each descriptor, and those of an indirect table."""

    def offer(p):
        if table:
            p.ring.write_table(TABLES, *table)
        p.offer(pieces, 4)

    return offer


def split(*descriptors, table=()):
    """As they stand in a split ring, from the fourth on: (address, length, flags, next)."""

    def offer(p):
        for where, first, entries in ((DESC, 4, descriptors), (TABLES, 0, table)):
            for i, entry in enumerate(entries):
                p.ring.descriptor(first + i, *entry, table=where)
        p.ring.offer(4)

    return offer


UNANSWERED = {
    "nothing writable": ("bad_chains", chain(HEADER, (GOOD, 512))),
    "nothing writable, and outside memory": ("unmapped", chain(HEADER, (0, 512))),
    "status outside memory": ("unmapped", chain(HEADER, SPACE, (0, 1, WRITE))),
    "status behind 2**64": ("unmapped", chain(HEADER, SPACE, (2**64 - 8, 16, WRITE))),
    "all outside memory": ("unmapped", chain((0, 16), (0, 512, WRITE), (0, 1, WRITE))),
    "an empty status": ("zero_length", chain(HEADER, SPACE, (AT, 0, WRITE))),
    "table outside memory": ("unmapped", chain((0, 48, INDIRECT))),
    "table that ends outside memory": ("unmapped", chain((BIG - 16, 32, INDIRECT))),
    "table of a part": ("bad_indirect", chain((TABLES, 47, INDIRECT), table=[HEADER, ANSWER])),
    "table of nothing": ("bad_indirect", chain((TABLES, 0, INDIRECT))),
    "table of more than anybody makes": (
        "too_long", chain((TABLES, 16 * 1025, INDIRECT), table=[HEADER, *[SPACE] * 1023, ANSWER]),
    ),
    "table with NEXT": ("bad_indirect", chain((TABLES, 32, INDIRECT), ANSWER)),
}  # fmt: skip
UNANSWERED_SPLIT = {
    "loop of one": ("too_long", split((GOOD, 8, NEXT | WRITE, 4))),
    "loop behind a status": ("bad_order", split((*HEADER, NEXT, 5), (AT, 1, NEXT | WRITE, 4))),
    "loop behind another fault": (
        "unmapped", split((0, 16, NEXT, 5), (AT, 1, WRITE | NEXT, 5)),
    ),
    "next beyond the ring": ("bad_index", split((*HEADER, NEXT, 5), (AT, 1, NEXT | WRITE, SIZE))),
    "next beyond the ring, behind another fault": (
        "zero_length", split((STATUS, 0, NEXT, 5), (AT, 1, NEXT | WRITE, 65535)),
    ),
    "table: loop": (
        "too_long",
        split((TABLES, 32, INDIRECT, 0), table=[(*HEADER, NEXT, 1), (AT, 1, NEXT | WRITE, 0)]),
    ),
    "table: next beyond it": (
        "bad_index",
        split((TABLES, 32, INDIRECT, 0), table=[(*HEADER, NEXT, 1), (AT, 1, NEXT | WRITE, 2)]),
    ),
    "table in a table": (
        "bad_indirect",
        split((TABLES, 32, INDIRECT, 0), table=[(*HEADER, NEXT, 1), (TABLES, 32, INDIRECT, 0)]),
    ),
}  # fmt: skip
each_unanswered = pytest.mark.parametrize(
    ("layout", "fault", "offer"),
    [
        pytest.param(layout, *bad, id=f"{layout}: {name}")
        for layout, chains in (
            ("split", UNANSWERED | UNANSWERED_SPLIT),
            ("packed", UNANSWERED),
        )
        for name, bad in chains.items()
    ],
)


@each_unanswered
def test_what_cannot_be_answered_stays_the_driver_s_and_breaks_its_ring(
    tmp_path, layout, fault, offer, caplog
):
    with place(tmp_path, layout, opened=False) as p:
        disk, attacker = p.server.device, p.attacker
        p.offer([HEADER, SPACE, ANSWER], 0)
        attacker.kick()
        eventually(lambda: p.counters()["inflight"])
        offer(p)
        p.ring.offer_chain((STATUS + 64, 16), (STATUS + 81, 1, WRITE), id=10)
        attacker.kick()
        assert attacker.queue.wait_err()
        assert p.counters() == {fault: 1, "inflight": 1}
        assert p.under_way() == [0]
        # What is under way is answered.
        disk.storage.open()
        assert attacker.comes_back() == [(0, 513)]
        assert p.memory.read(AT, 1) == bytes([OK])
        eventually(lambda: p.under_way() == [])

        status = p.status()
        assert status["handshake"] == "broken: rings 0"
        for said in (status["waits_for"], status["rings"][0]["broken"], caplog.text):
            assert "a request cannot be answered" in said
            assert "reset the device" in said
            assert ("share=on" in said) == (fault == "unmapped")

        # It is the first that whoever comes next takes: not the chain behind it.
        base = attacker.end.stop_queue(0)
        assert base == base_of(layout, SIZE, 1 if layout == "split" else 3)
        assert p.ring.collect() == []
        attacker.start_empty(base)
        assert attacker.request() == OK
        assert p.status()["handshake"] == "ready: rings 0 run"
        assert p.status()["rings"][0]["broken"] == ""


def test_a_request_done_again_that_breaks_its_ring_leaves_it_asleep_and_stops_at_once(tmp_path):
    """It stays marked: where in the ring it stood, nobody knows any more."""
    with place(tmp_path, "split", opened=False) as p:
        attacker, disk = p.attacker, p.server.device
        p.offer([HEADER, SPACE, ANSWER], 4)
        attacker.kick()
        eventually(lambda: p.under_way() == [4])
        inflight = attacker.end.inflight[1].fileno()
        killed = os.pread(inflight, region_bytes(SIZE), 0)
        disk.storage.open()
        attacker.comes_back()
        attacker.end.stop_queue(0)
        # As a kill leaves it; and the guest takes the status byte away meanwhile.
        os.pwrite(inflight, killed, 0)
        p.ring.put_u16(USED + 2, 0)
        p.ring.descriptor(6, 0, 1, WRITE)
        attacker.end.set_inflight()
        attacker.start(0)
        assert attacker.queue.wait_err()
        eventually(lambda: p.status()["device"]["queues"][0]["parked"])
        assert attacker.end.stop_queue(0) == 1
        assert p.under_way() == [4]
        # It is there again, and its status too.
        p.ring.descriptor(6, AT, 1, WRITE)
        p.ring.restart(0)
        p.memory.write(AT, b"\xee")
        attacker.start(1)
        assert attacker.comes_back() == [(4, 513)]
        assert p.memory.read(AT, 1) == bytes([OK])
