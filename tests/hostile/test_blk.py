"""Requests that a hostile guest makes of its disk.

Each ends in the right status byte (IOERR, UNSUPP); nothing is read or written on its behalf;
and the disk serves on. Chains that nobody can use: test_blk_faults.py.
"""

import mmap
import os
import random
import struct

import pytest

from tests.backends.guest import (
    DISCARD,
    FLUSH,
    GET_ID,
    GPA,
    IN,
    IOERR,
    OK,
    OUT,
    SECURE_ERASE,
    UNSUPP,
    UNTOUCHED,
    WRITE_ZEROES,
    Guest,
    eventually,
)  # fmt: skip
from tests.backends.machine import SECTORS, SIZE, Machine, image
from tests.gate import GateStorage
from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.backends.storage.storage import Op
from vhostpy.backends.storage.uring import UringStorage

CONTENT = b"precious" * (SIZE // 8)
CLEARS = (DISCARD, WRITE_ZEROES, SECURE_ERASE)


@pytest.fixture
def machine():
    with Machine(RamStorage(SIZE)) as machine:
        for sector in range(0, SECTORS, 256):
            data = CONTENT[sector * 512 : (sector + 256) * 512]
            assert machine.guest.request(OUT, sector, data=data).wait() == OK
        yield machine


def content(machine):
    got = b""
    for sector in range(0, SECTORS, 256):
        read = machine.guest.request(IN, sector, space=256 * 512)
        assert read.wait() == OK
        got += read.data
    return got


def refused(machine, status, counter, *arguments, **options):
    before = machine.counters()[counter]
    sent = machine.guest.request(*arguments, **options)
    assert sent.wait() == status
    assert sent.data == bytes([UNTOUCHED]) * sent.space
    assert machine.counters()[counter] == before + 1
    assert machine.counters()["inflight"] == 0


@pytest.mark.parametrize(
    "sector",
    [SECTORS, SECTORS - 7, SECTORS + 1, 1 << 55, (1 << 64) // 512, (1 << 64) - 8, (1 << 64) - 1,
     (1 << 63) + SECTORS - 8],
)  # fmt: skip
def test_sectors_past_the_end_are_ioerr_whatever_they_wrap_to(machine, sector):
    refused(machine, IOERR, "bad_requests", IN, sector, space=4096)
    refused(machine, IOERR, "bad_requests", OUT, sector, data=b"x" * 4096)
    for kind in CLEARS:
        ranges = struct.pack("<QII", sector, 8, 0)
        refused(machine, IOERR, "bad_requests", kind, data=ranges)
    assert content(machine) == CONTENT


def test_lengths_that_are_no_multiple_of_512_are_ioerr(machine):
    for length in (1, 511, 513, 1000):
        refused(machine, IOERR, "bad_requests", IN, 0, space=length)
        refused(machine, IOERR, "bad_requests", OUT, 0, data=b"x" * length)
    assert content(machine) == CONTENT


def test_unknown_types_are_unsupp(machine):
    for kind in (2, 3, 5, 7, 9, 10, 12, 15, 16, 0x80000000, 0xFFFFFFFF):
        refused(machine, UNSUPP, "unsupported", kind, 0, space=512, cuts=[16])
        refused(machine, UNSUPP, "unsupported", kind, 0, data=b"x" * 512)
    assert content(machine) == CONTENT


def test_ranges_to_clear_are_checked_before_any_is_cleared(machine):
    good = struct.pack("<QII", 0, 8, 0)
    for kind in CLEARS:
        for bad in (
            b"",
            good[:15],
            good + good[:1],
            good * 33,  # more than we offer
            good + struct.pack("<QII", SECTORS, 1, 0),
            good + struct.pack("<QII", 0, (1 << 32) - 1, 0),
            good + struct.pack("<QII", (1 << 64) - 1, 2, 0),
        ):
            refused(machine, IOERR, "bad_requests", kind, data=bad, cuts=[16, 30, 60])
        for flags in (2, 3, 0x80000000) + (() if kind == WRITE_ZEROES else (1,)):
            bad = good + struct.pack("<QII", 0, 8, flags)
            refused(machine, UNSUPP, "unsupported", kind, data=bad)
    assert content(machine) == CONTENT


def test_get_id_fills_a_short_buffer_and_not_more():
    with Machine(RamStorage(SIZE), serial="0123456789abcdefghij") as machine:
        for space in (0, 1, 19, 20, 21, 4096):
            sent = machine.guest.request(GET_ID, space=space, cuts=[1, 7])
            assert sent.wait() == OK
            filled = min(space, 20)
            assert sent.data[:filled] == b"0123456789abcdefghij"[:filled]
            assert sent.data[filled:] == bytes([UNTOUCHED]) * (space - filled)
            assert sent.length == filled + 1


def test_a_read_only_disk_is_not_written():
    with Machine(RamStorage(SIZE), read_only=True) as machine:
        refused(machine, IOERR, "bad_requests", OUT, 0, data=b"x" * 512)
        for kind in CLEARS:
            refused(machine, IOERR, "bad_requests", kind, data=struct.pack("<QII", 0, 8, 0))
        assert machine.guest.request(FLUSH).wait() == OK
        assert content(machine) == bytes(SIZE)


# Chains of the wrong shape -----------------------------------------------------------


def given_back(machine, readable, writable):
    """Sends a chain; the length it comes back with."""
    guest = machine.guest
    id_ = guest.send(readable, writable)

    def is_back():
        guest.collect()
        return id_ in guest.done[0]

    eventually(is_back)
    return guest.done[0].pop(id_)


def test_a_chain_shorter_than_the_header_is_ioerr(machine):
    guest = machine.guest
    for length in (1, 15):
        header = guest.put(struct.pack("<IIQ", IN, 0, 0)[:length])
        back = guest.put(bytes([UNTOUCHED]) * 513)
        assert given_back(machine, [(header, length)], [(back, 513)]) == 1
        assert guest.memory.read(back, 513) == bytes([UNTOUCHED]) * 512 + bytes([IOERR])
    back = guest.put(bytes([UNTOUCHED]) * 513)
    assert given_back(machine, [], [(back, 513)]) == 1
    assert guest.memory.read(back + 512, 1) == bytes([IOERR])
    assert machine.counters()["bad_requests"] == 3


def test_a_header_a_byte_a_descriptor_is_a_header(machine):
    sent = machine.guest.request(IN, 8, space=512, cuts=range(1, 16))
    assert sent.wait() == OK
    assert sent.data == CONTENT[:512]


def test_more_pieces_than_a_request_may_have_are_ioerr():
    guest = Guest(queue_size=512)
    with Machine(RamStorage(SIZE), guest=guest) as machine:
        back = guest.allocate(600 * 512)
        header = guest.put(struct.pack("<IIQ", IN, 0, 0))
        status = guest.put(bytes([UNTOUCHED]))
        pieces = [(back + 512 * i, 512) for i in range(255)]
        assert given_back(machine, [(header, 16)], [*pieces, (status, 1)]) == 1
        assert guest.memory.read(status, 1) == bytes([IOERR])
        assert given_back(machine, [(header, 16)], [*pieces[:254], (status, 1)]) == 254 * 512 + 1
        assert guest.memory.read(status, 1) == bytes([OK])


def test_a_gigantic_request_is_ioerr_or_done_in_bounded_turns():
    # The same 4 MiB of guest memory a hundred times: 400 MiB in one request.
    guest = Guest(16 << 20, queue_size=256)
    with Machine(RamStorage(1 << 30), guest=guest) as machine:
        big = guest.allocate(4 << 20)
        header = guest.put(struct.pack("<IIQ", OUT, 0, 0))
        status = guest.put(bytes([UNTOUCHED]))
        turns = machine.workers.loads()[0]["busy_turns"]
        guest.send([(header, 16), *[(big, 4 << 20)] * 100], [(status, 1)])
        eventually(lambda: guest.memory.read(status, 1) == bytes([OK]))
        assert machine.workers.loads()[0]["busy_turns"] > turns + 400


def test_an_index_that_jumps_breaks_the_ring_and_nothing_else():
    guest = Guest(queues=2)
    with Machine(RamStorage(SIZE), guest=guest) as machine:
        guest.memory.write(guest.places[0][1] + 2, struct.pack("<H", 1000))
        os.eventfd_write(guest.kicks[0], 1)
        eventually(lambda: machine.rings[0].broken)
        eventually(lambda: machine.counters(0)["parked"])
        assert os.eventfd_read(machine.workers.bell_fd) == 1
        assert guest.request(IN, space=512, index=1).wait() == OK


def test_heads_that_are_offered_again_while_we_have_them():
    """More than its ring has places: it is broken, and what is under way is answered."""
    storage = GateStorage(SIZE)
    guest = Guest(queue_size=4)
    with Machine(storage, guest=guest) as machine:
        driver, avail = guest.drivers[0], guest.places[0][1]
        sent = [guest.request(FLUSH, kick=False, cuts=()) for _ in range(2)]
        driver.kick()
        eventually(lambda: machine.counters()["inflight"] == 2)
        heads = [request.id for request in sent]
        for i in range(2, 5):
            guest.memory.write(avail + 4 + 2 * (i % 4), struct.pack("<H", heads[i % 2]))
        guest.memory.write(avail + 2, struct.pack("<H", 5))
        os.eventfd_write(guest.kicks[0], 1)
        eventually(lambda: machine.rings[0].broken)
        storage.open()
        eventually(lambda: machine.counters()["flushes"] == 2)
        assert machine.counters()["inflight"] == 0


# Memory that changes or goes away ----------------------------------------------------


STORAGES = {
    "ram": lambda tmp_path: RamStorage(SIZE),
    "file": lambda tmp_path: FileStorage(image(tmp_path / "disk.img")),
    "uring": lambda tmp_path: UringStorage(image(tmp_path / "disk.img")),
    "uring, O_DIRECT": lambda tmp_path: UringStorage(image(tmp_path / "disk.img"), direct=True),
}


@pytest.mark.parametrize("kind", STORAGES)
def test_guest_memory_truncated_under_a_request_poisons_it_and_answers(tmp_path, kind):
    storage = STORAGES[kind](tmp_path)
    innocent = RamStorage(SIZE)
    with Machine(storage) as machine, Machine(innocent) as neighbour:
        guest = machine.guest
        assert neighbour.guest.request(OUT, data=b"n" * 512).wait() == OK
        header = guest.put(struct.pack("<IIQ", IN, 0, 0))
        status = guest.put(bytes([UNTOUCHED]))
        gone = guest.border + 65536
        os.ftruncate(guest.fd, guest.size // 2)
        guest.send([(header, 16)], [(gone, 4096), (status, 1)])
        eventually(lambda: guest.memory.read(status, 1) != bytes([UNTOUCHED]))
        assert guest.memory.read(status, 1) == bytes([OK if kind == "ram" else IOERR])
        eventually(lambda: guest.memory.poisoned)
        assert not neighbour.guest.memory.poisoned
        read = neighbour.guest.request(IN, space=512)
        assert (read.wait(), read.data) == (OK, b"n" * 512)


@pytest.mark.parametrize("kind", STORAGES)
def test_holes_punched_into_guest_memory_lose_no_byte(tmp_path, kind):
    # Balloon, free-page reporting: a buffer's page is dropped while its request runs.
    storage = STORAGES[kind](tmp_path)
    channel = storage.channel()
    channel.run(Op.WRITE, 0, SIZE, CONTENT)
    channel.close()
    with Machine(storage) as machine:
        guest = machine.guest
        random_ = random.Random(1)
        with mmap.mmap(guest.fd, guest.size) as memory:
            for _ in range(200):
                read = guest.request(IN, 0, space=8192)
                page = -((GPA - read.back) // 4096) * 4096  # wholly in its buffer
                if random_.random() < 0.5:
                    memory.madvise(mmap.MADV_REMOVE, page, 4096)  # under the request
                assert read.wait() == OK
                again = guest.request(IN, 0, space=8192)
                assert again.wait() == OK
                assert again.data == CONTENT[:8192]


def test_headers_that_change_while_they_are_read_do_no_harm():
    guest = Guest()
    with Machine(RamStorage(SIZE), guest=guest) as machine:
        for _ in range(300):
            sent = guest.request(IN, 0, space=512)
            # The header lies just before the answer.
            guest.memory.write(sent.back - 16, struct.pack("<IIQ", OUT, 0, (1 << 64) - 1))
            assert sent.wait() in (OK, IOERR)
        assert content(machine) == bytes(SIZE)


# Noise -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_random_chains_never_harm_the_disk_s_other_half(seed):
    """Valid rings, senseless chains; a neighbour's requests on the same storage are right."""
    random_ = random.Random(seed)
    guest = Guest(queues=2, queue_size=128)
    with Machine(RamStorage(SIZE), guest=guest):
        assert guest.request(OUT, SECTORS - 8, data=b"n" * 4096, index=1).wait() == OK
        for _ in range(60):
            for _ in range(random_.randrange(1, 5)):
                kind = random_.choice([IN, OUT, FLUSH, GET_ID, 11, 13, random_.getrandbits(32)])
                sector = random_.choice([0, SECTORS - 9, random_.getrandbits(64)])
                out = struct.pack("<IIQ", kind, 0, sector)
                out += struct.pack("<QII", random_.randrange(64), random_.randrange(64), 0)
                out = out[: random_.randrange(1, len(out) + 1)]
                gpa = guest.put(out)
                back = guest.allocate(random_.randrange(1, 2048))
                readable = [(gpa, len(out))]
                writable = [(back, random_.randrange(1, 2048))]
                if random_.random() < 0.3:
                    at = random_.randrange(2)
                    piece = (random_.getrandbits(64), random_.getrandbits(31) + 1)
                    [readable, writable][at].insert(0, piece)
                guest.send(readable, writable)
            eventually(lambda: guest.collect() or guest.drivers[0].free == 128)
            read = guest.request(IN, SECTORS - 8, space=4096, index=1)
            assert (read.wait(), read.data) == (OK, b"n" * 4096)
