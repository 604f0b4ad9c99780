"""Chains as no sane driver makes them, against a bytearray that says what each must do.

Header, data and status are cut into descriptors at any byte, share them, cross regions, are
direct or in a table; sectors, lengths, types and ranges are right or wrong. What is answered,
what is written, and what is not, is the same whatever the pieces.
"""

import itertools
import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.guest import (
    DISCARD,
    FEATURES,
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
from tests.backends.machine import Machine, image
from vhostpy._spec import Feature
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.backends.storage.uring import UringStorage

SIZE = 256 << 10
SECTORS = SIZE // 512
SERIAL = b"vb-1".ljust(20, b"\0")
PIECES_MAX = 254  # of a request's data; a chain of more is refused, not cut short
RANGES_MAX = 32
CLEARS = (DISCARD, WRITE_ZEROES, SECURE_ERASE)
DESCRIPTORS_MAX = 400  # of a chain here
GUARD = bytes([UNTOUCHED]) * 16

STORAGES = {
    "ram": lambda folder: RamStorage(SIZE),
    "uring": lambda folder: UringStorage(image(folder / "disk.img", SIZE)),
    "uring, O_DIRECT": lambda folder: UringStorage(image(folder / "disk.img", SIZE), direct=True),
}


# What a driver asks ------------------------------------------------------------------------


@dataclass
class Asked:
    """The bytes of a chain, and where they are cut."""

    readable: bytes
    writable: int
    readable_cuts: list[int] = field(default_factory=list)
    writable_cuts: list[int] = field(default_factory=list)
    indirect: bool = False
    spoilt: str = ""  # a piece more, before the status: "empty" or "unmapped"
    spoilt_at: int = 0  # of so many, from the end


sectors = st.one_of(
    st.integers(0, SECTORS - 1),
    st.sampled_from([SECTORS - 1, SECTORS, SECTORS + 1, 1 << 55, (1 << 64) - 1, (1 << 63) + 1]),
)
counts = st.one_of(st.integers(0, 8), st.integers(0, 64))
# Mostly whole sectors.
sizes = st.builds(
    lambda count, odd: max(count * 512 + odd, 0), counts, st.sampled_from([0] * 6 + [-1, 1, 100])
)
fills = st.integers(0, 255)


def payload(size, fill):
    return bytes((fill + i) % 253 for i in range(size))


def header(type_, sector):
    return struct.pack("<IIQ", type_, 0, sector)


ranges = st.lists(
    st.tuples(sectors, counts, st.sampled_from([0] * 5 + [1, 2, 1 << 31])), max_size=4
).map(lambda parts: b"".join(struct.pack("<QII", *part) for part in parts))
clears = st.one_of(
    ranges,
    ranges,
    ranges.map(lambda data: data + b"\0"),
    # One more than there may be, or as many.
    st.integers(RANGES_MAX - 1, RANGES_MAX + 1).map(lambda n: struct.pack("<QII", 3, 1, 0) * n),
)
bodies = st.one_of(
    st.builds(lambda s, n: (header(IN, s), n + 1), sectors, sizes),
    st.builds(lambda s, n, f: (header(OUT, s) + payload(n, f), 1), sectors, sizes, fills),
    # A type and data that do not belong together, or are too many.
    st.builds(
        lambda t, s, n, f, m: (header(t, s) + payload(n, f), m),
        st.sampled_from([IN, OUT, FLUSH, GET_ID]),
        sectors, sizes, fills, sizes.map(lambda n: n + 1),
    ),
    st.builds(
        lambda t, data, m: (header(t, 0) + data, m + 1),
        st.sampled_from(CLEARS), clears, st.sampled_from([0, 0, 0, 700]),
    ),
    st.builds(lambda n: (header(GET_ID, 0), n + 1), st.integers(0, 40)),
    st.just((header(FLUSH, 0), 1)),
    st.builds(
        lambda t, n: (header(t, 0), n + 1),
        st.sampled_from([2, 3, 5, 9, 12, 15, 16, 0x80000000, 0xFFFFFFFF]), st.integers(0, 600),
    ),
    st.builds(lambda n, m: (header(OUT, 0)[:n], m), st.integers(0, 15), st.integers(1, 600)),
)  # fmt: skip
cuts = st.one_of(
    st.just([16]),
    st.lists(st.integers(1, 40), max_size=6),
    st.just(list(range(1, 24))),  # every byte of a header by itself
    st.lists(st.integers(1, SIZE), max_size=12),
    st.builds(lambda step: list(range(step, SIZE, step)), st.integers(300, 5000)),
)
# The status by itself, with data before it, or the data's end in its descriptor.
status_cuts = st.sampled_from([[-1], [-1], [], [-2], [-5, -1]])


@st.composite
def requests(draw):
    readable, writable = draw(bodies)
    asked = Asked(readable, writable, draw(cuts), draw(cuts), draw(st.booleans()))
    if draw(st.integers(0, 60)) == 0:
        # More pieces than one request may have.
        asked.readable_cuts = [16, *range(17, 17 + PIECES_MAX + 10)]
        asked.indirect = True
    asked.writable_cuts = [*asked.writable_cuts, *(writable + at for at in draw(status_cuts))]
    asked.spoilt = draw(st.sampled_from([""] * 12 + ["empty", "unmapped"]))
    asked.spoilt_at = draw(st.integers(1, 20))
    return asked


def edges(length, at):
    return sorted({0, length, *(cut for cut in at if 0 < cut < length)})


def pieces_of(gpa, length, at):
    return [(gpa + a, b - a) for a, b in itertools.pairwise(edges(length, at))]


# What it must get --------------------------------------------------------------------------


@dataclass
class Answer:
    status: int
    length: int
    data: bytes = b""  # what the writable part starts with
    changed: range = range(0)  # sectors


REFUSED = Answer(IOERR, 1)


def parts_of(asked):
    """Sectors of the ranges to be cleared; or a status."""
    kind, data = asked.readable[0], asked.readable[16:]
    if kind == SECURE_ERASE and not data:
        data = bytes([UNTOUCHED]) * (asked.writable - 1)  # where Linux has them
    if not data or len(data) % 16 or len(data) // 16 > RANGES_MAX:
        return IOERR
    parts = []
    for sector, count, flags in struct.iter_unpack("<QII", data):
        if flags not in ((0, 1) if kind == WRITE_ZEROES else (0,)):
            return UNSUPP
        if sector + count > SECTORS:
            return IOERR
        parts.append(range(sector, sector + count))
    return parts


def touched(asked):
    """Sectors that a request may read or change: two that share some are not sent together."""
    if asked.spoilt or len(asked.readable) < 16:
        return set()
    type_, _, sector = struct.unpack_from("<IIQ", asked.readable)
    if type_ in CLEARS:
        parts = parts_of(asked)
        return set().union(*parts) if isinstance(parts, list) else set()
    if type_ not in (IN, OUT):
        return set()
    size = asked.writable - 1 if type_ == IN else len(asked.readable) - 16
    return set(range(sector, min(sector + size // 512 + 1, SECTORS)))


def answer(model, asked, can_erase):
    """What the disk must do, done to the model."""
    if asked.spoilt or len(asked.readable) < 16:
        return REFUSED
    type_, _, sector = struct.unpack_from("<IIQ", asked.readable)
    space = asked.writable - 1
    data = asked.readable[16:]
    if type_ in (IN, OUT):
        size = space if type_ == IN else len(data)
        at = asked.writable_cuts if type_ == IN else [cut - 16 for cut in asked.readable_cuts]
        if size % 512 or sector + size // 512 > SECTORS or len(edges(size, at)) - 1 > PIECES_MAX:
            return REFUSED
        span = slice(sector * 512, sector * 512 + size)
        if type_ == IN:
            return Answer(OK, size + 1, bytes(model[span]))
        model[span] = data
        return Answer(OK, 1)
    if type_ == FLUSH:
        return Answer(OK, 1)
    if type_ == GET_ID:
        return Answer(OK, min(space, 20) + 1, SERIAL[:space])
    if type_ not in CLEARS or (type_ == SECURE_ERASE and not can_erase):
        return Answer(UNSUPP, 1)
    parts = parts_of(asked)
    if not isinstance(parts, list):
        return Answer(parts, 1)
    for part in parts:
        # What was discarded or erased is undefined; ours are zeros, on these file systems too.
        model[part.start * 512 : part.stop * 512] = bytes(len(part) * 512)
    return Answer(OK, 1)


# Both together -----------------------------------------------------------------------------


class Sent:
    """A chain on its way: guarded on both sides of what the device may write."""

    def __init__(self, guest, asked):
        self.guest, self.asked = guest, asked
        out = guest.put(asked.readable)
        self.gpa = guest.put(GUARD + bytes([UNTOUCHED]) * asked.writable + GUARD)
        readable = pieces_of(out, len(asked.readable), asked.readable_cuts)
        writable = pieces_of(self.gpa + len(GUARD), asked.writable, asked.writable_cuts)
        if asked.spoilt:
            bad = (GPA, 0) if asked.spoilt == "empty" else (GPA - 4096, 64)
            at = max(len(readable) + len(writable) - asked.spoilt_at, 0)
            part, at = (readable, at) if at <= len(readable) else (writable, at - len(readable))
            part.insert(at, bad)
        table = None
        if asked.indirect:
            table = guest.allocate(16 * len(readable + writable), 16)
        self.id = guest.drivers[0].add(readable, writable, table)

    def written(self):
        """The used length and the writable part, guards and all."""
        self.guest.collect()
        length = self.guest.done[0].pop(self.id, None)
        if length is None:
            return None
        return length, self.guest.memory.read(self.gpa, self.asked.writable + 2 * len(GUARD))

    def check(self, expected):
        found = []
        eventually(lambda: (got := self.written()) is not None and not found.append(got))
        length, written = found[0]
        space = self.asked.writable
        wanted = bytearray(bytes([UNTOUCHED]) * space)
        wanted[: len(expected.data)] = expected.data
        wanted[-1] = expected.status
        assert written == GUARD + wanted + GUARD
        assert length == expected.length


@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize(
    "features", [FEATURES, FEATURES | 1 << Feature.RING_PACKED], ids=["split", "packed"]
)
@settings(max_examples=40, deadline=None)
@given(mix=st.lists(requests(), max_size=40), start=st.integers(0, 60_000))
def test_chains_of_any_cut_do_what_a_bytearray_does(tmp_path_factory, features, kind, mix, start):
    model = bytearray(SIZE)
    storage = STORAGES[kind](tmp_path_factory.mktemp("disk"))
    guest = Guest(features=features, queue_size=1024)
    with Machine(storage, guest=guest, serial="vb-1") as machine:
        # Buffers soon cross from one region into the next.
        guest.next = guest.border - GPA - start
        under_way, busy = [], set()
        for asked in [*mix, Asked(header(IN, 0), SIZE + 1)]:
            sectors = touched(asked)
            if busy & sectors or guest.drivers[0].free < DESCRIPTORS_MAX:
                together(guest, under_way)
                under_way, busy = [], set()
            busy |= sectors
            under_way.append((Sent(guest, asked), answer(model, asked, kind == "ram")))
        together(guest, under_way)
        counters = machine.counters()
        assert counters["io_errors"] == counters["inflight"] == 0
        assert guest.memory.in_use == 0


def together(guest, under_way):
    """They are under way at once, and end in any order."""
    guest.drivers[0].kick()
    for sent, expected in under_way:
        sent.check(expected)
