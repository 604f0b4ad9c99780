"""Rings whose front-end tells a base that the ring contradicts."""

import logging
import random
import struct

import pytest

from tests.hostile.victim import eventually
from tests.rings import AVAIL, DESC, Rings, exchange
from tests.serving import serving
from tests.talk import open_fds
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.backends.blk.device import Disk
from vhostpy.backends.storage.ram import RamStorage
from vhostpy.errors import GuestError
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.ring.positions import Keeper
from vhostpy.ring.resume import reconcile
from vhostpy.server.listen import Server

SIZE = 64


def started_at(rings, base):
    """The device, held, in another life that begins at `base`."""
    device = rings.start(base)
    device.set_live(False)
    return device


@pytest.mark.parametrize("used", [10, 300, 58656, 65530])
@pytest.mark.parametrize("base", ["first", "behind", "beyond"])
def test_split_ring_that_may_lose_goes_on_where_its_driver_waits(used, base):
    """DPDK's virtio-user in server mode says base 0, whatever the ring has seen."""
    with Rings("split", size=SIZE, used=used) as rings:
        offers = [rings.add([bytes([i])], []) for i in range(5)]
        rings.driver.kick()
        said = {"first": 0, "behind": used - 1, "beyond": (used + 6) % 65536}[base]
        device = started_at(rings, said)
        verdict = reconcile(device, lossy=True)
        assert f"base {said} contradicts the ring, whose used index is {used}" in verdict.text
        device.set_live(True)
        taken = device.take()
        assert [device.read(chain) for chain in taken] == [offer.data for offer in offers]
        device.give([(chain, 0) for chain in taken])
        assert len(rings.driver.used()) == 5


@pytest.mark.parametrize("lossy", [False, True], ids=["disk", "net"])
@pytest.mark.parametrize("ahead", range(6))
def test_split_base_within_what_is_offered_is_believed(lossy, ahead):
    """What lies before it is another back-end's, which still works on it."""
    with Rings("split", size=SIZE, used=65533) as rings:
        offers = [rings.add([bytes([i])], []) for i in range(5)]
        rings.driver.kick()
        device = started_at(rings, (65533 + ahead) % 65536)
        assert reconcile(device, lossy=lossy).text == ""
        device.set_live(True)
        assert [device.read(chain) for chain in device.take()] == [o.data for o in offers[ahead:]]


def test_split_base_is_all_there_is_where_the_ring_makes_no_sense():
    with Rings("split", size=SIZE, used=300) as rings:
        rings.guest.put_u16(AVAIL + 2, 300 + SIZE + 1)
        device = started_at(rings, 7)
        assert reconcile(device, lossy=True).text == ""
        assert device.base == 7


def test_disk_whose_base_is_contradicted_is_broken_by_name(workers, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vhostpy")
    before = open_fds()
    server = Server(Disk("disk", RamStorage(1 << 20), workers, queues=2), path=f"{tmp_path}/s")
    protocol = 1 << ProtocolFeature.CONFIG | 1 << ProtocolFeature.REPLY_ACK
    with serving(server), FrontEnd(server.path) as guest:
        guest.negotiate(1 << Feature.VERSION_1, protocol)
        guest.set_mem_table()
        queue = guest.start_queue(0, SIZE, base=300)
        guest.stop_queue(0)
        guest.announce(queue, base=0)
        status = server.status()
        assert status["handshake"] == "broken: rings 0"
        assert "ring 0: base 0 contradicts the ring, whose used index is 300" in status["waits_for"]
        assert status["rings"][0]["state"] == "broken"
        assert queue.wait_err()
        assert (
            sum(
                "contradicts" in r.getMessage() and "INFLIGHT" in r.getMessage()
                for r in caplog.records
            )
            == 1
        )
        guest.stop_queue(0)
        guest.announce(queue, base=300)
        assert server.status()["handshake"] == "ready: rings 0 run"
    eventually(lambda: open_fds() <= before)  # a test before may have left some to be closed


# Packed rings ---------------------------------------------------------------------------

FIRST = 0x8000_8000


@pytest.fixture
def owner(tmp_path):
    """Of as many rings as a test makes one after the other."""
    tmp_path.chmod(0o700)
    return Keeper(str(tmp_path), "test.rings", {"port": 4}).owners["port"]


class Life:
    """A packed ring through kills: what its driver offers comes back once each, in order."""

    def __init__(self, rings, owner):
        self.rings = rings
        self.place = owner.claim((1, 2), 3, rings.size)
        self.out = []  # taken and not given back
        self.held = 0  # descriptors given back that the driver does not see
        self.expected = []  # what the driver waits for
        self.keep()

    def keep(self):
        self.rings.device.set_live(False)
        self.rings.device.keep(self.place)
        self.rings.device.set_live(True)

    def offer(self, pieces, *, table=False):
        try:
            offer = self.rings.add([b"x"] * pieces, [], table=table)
        except BufferError:
            return False
        self.expected.append(offer)
        self.rings.driver.kick()
        return True

    def work(self, take, give, *, publish, one_entry):
        """Takes so many, gives so many back in order; `publish` may be cut short by a kill."""
        self.out += self.rings.device.take(take)
        some, self.out = self.out[:give], self.out[give:]
        if one_entry:
            self.rings.device.release(some, publish=publish)
        else:
            self.rings.device.give([(chain, 0) for chain in some], publish=publish)
        self.held = 0 if publish else self.held + sum(chain.slots for chain in some)

    def publish(self):
        self.rings.device.publish_pushed()
        self.held = 0

    def collect(self):
        for id_, _ in self.rings.driver.used():
            offer = self.expected.pop(0)
            assert id_ == offer.id
            self.rings.reclaim(offer)

    def kill(self, *, kept, base=FIRST):
        """Another life; where it goes on, or None where it is broken."""
        self.out, self.held = [], 0
        device = started_at(self.rings, base)
        verdict = reconcile(device, True, kept)
        if device.broken:
            assert "packed=off" in verdict.hint
            return None
        self.keep()
        return device.used_index

    def looks_new(self):
        """By a rare chance: what is offered ends with the ring, and nothing seems used."""
        ring = self.rings.guest.memory.read(DESC, 16 * self.rings.size)
        return all(flags >> 7 & 0x101 == 1 for *_, flags in struct.iter_unpack("<QIHH", ring))

    def ends_well(self):
        """All that the driver waits for comes back, and the ring is as good as new."""
        self.rings.device.give([(chain, 0) for chain in self.out])
        while taken := self.rings.device.take():
            self.rings.device.give([(chain, 0) for chain in taken])
        self.collect()
        assert self.expected == []
        self.rings.proves_itself()


def moved(position, slots, size):
    """The position so many slots behind it."""
    index = (position & 0x7FFF) + slots
    return (position & 0x8000) ^ (0x8000 if index >= size else 0) | index % size


@pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
@pytest.mark.parametrize("seed", range(12))
def test_packed_ring_outlives_kills_at_any_moment(owner, in_order, seed):
    dice = random.Random(seed)
    for _ in range(25):
        size = dice.choice([8, 13, 16, 64])
        indirect = dice.random() < 0.5
        fifo = in_order or dice.random() < 0.5
        with Rings("packed", size=size, in_order=in_order, indirect=indirect, fifo=fifo) as rings:
            life = Life(rings, owner)
            for _ in range(dice.randrange(1, 60)):
                for _ in range(dice.randrange(1, size)):
                    life.offer(dice.choice([1, 1, 2, 3]), table=indirect and dice.random() < 0.3)
                give = dice.randrange(1, size // 4 + 1)
                life.work(
                    dice.randrange(size), give,
                    publish=dice.random() < 0.6, one_entry=in_order and dice.random() < 0.5,
                )  # fmt: skip
                if life.held > size // 4 or dice.random() < 0.3:
                    life.publish()
                if dice.random() < 0.8:
                    life.collect()
                if dice.random() < 0.3 and not life.looks_new():
                    kept = life.place.at
                    if dice.random() < 0.5:  # in a publish, right before the driver sees it
                        kept = kept[1], moved(kept[1], life.held, size)
                    assert life.kill(kept=kept) is not None
            life.ends_well()
        owner.release(life.place)


@pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
def test_a_packed_ring_of_noise_costs_nobody_else_a_byte(in_order):
    dice = random.Random(5)
    with Rings("packed", size=13, in_order=in_order) as rings:
        around = DESC + 16 * rings.size
        for _ in range(3000):
            likely = dice.choice([0x8000, 0x80, 0x8080, 0])  # of most descriptors
            noise = b"".join(
                struct.pack(
                    "<QIHH", dice.choice([0, 1 << 40]), dice.choice([0, 64]), dice.randrange(14),
                    dice.choice([likely, likely, likely ^ dice.choice([0x80, 0x8000]), likely | 1]),
                )
                for _ in range(rings.size)
            )  # fmt: skip
            rings.guest.memory.write(DESC, noise + b"\xa5" * 64)
            kept = tuple(dice.choice([0, 0x8000]) | dice.randrange(16) for _ in range(2))
            device = started_at(rings, dice.choice([FIRST, 0x0007_0007, 0x8003_8001]))
            verdict = reconcile(device, True, dice.choice([kept, None]))
            assert device.broken == bool(verdict.hint)
            assert all(
                position & 0x7FFF < 13 for position in (device.base & 0xFFFF, device.base >> 16)
            )
            assert rings.guest.memory.read(around, 64) == b"\xa5" * 64
            assert rings.guest.memory.read(DESC, 16 * rings.size)[::16] == noise[::16]


@pytest.mark.parametrize("used", [0, 10, 64, 70, 100, 128, 150])
@pytest.mark.parametrize("said", ["where it is", "first"])
def test_packed_disk_without_inflight_is_broken_where_its_base_was_used(used, said):
    with Rings("packed", size=SIZE, used=0) as rings:
        for _ in range(used):
            exchange(rings)
        offer = rings.add([b"x"], [])
        rings.driver.kick()
        base = rings.device.base if said == "where it is" else FIRST
        device = started_at(rings, base)
        verdict = reconcile(device, lossy=False)
        right = said == "where it is" or used % (2 * SIZE) == 0
        assert device.broken == (not right)
        assert ("INFLIGHT" in verdict.hint) == (not right)
        if right:
            device.set_live(True)
            assert [device.read(chain) for chain in device.take()] == [offer.data]


def used_up(rings, count, spare=0):
    """Chains go there and back; `spare` more are offered."""
    for _ in range(count):
        exchange(rings)
    for _ in range(spare):
        rings.add([b"x"], [])
    rings.driver.kick()
    return rings.device.used_index


@pytest.mark.parametrize("fifo", [False, True])
@pytest.mark.parametrize("count", [1, 10, 64, 70, 127, 300])
def test_single_descriptors_tell_where_a_packed_ring_stands(count, fifo):
    with Rings("packed", size=SIZE, fifo=fifo) as rings:
        position = used_up(rings, count, spare=SIZE if fifo else 0)
        device = started_at(rings, FIRST)
        verdict = reconcile(device, True)
        assert (device.broken, device.used_index) == (False, position)
        assert "contradicts" in verdict.text


@pytest.mark.parametrize("case", ["in order", "chains", "same id", "lone noise"])
def test_a_packed_ring_that_more_than_one_position_explains_is_broken(case):
    with Rings("packed", size=SIZE, in_order=case == "in order", indirect=False) as rings:
        used_up(rings, 10, spare=1 if case == "same id" else 0)
        if case == "chains":
            rings.add([b"a", b"b"], [])
            rings.driver.kick()
        if case == "lone noise":
            rings.guest.put_u16(DESC + 16 * 40 + 14, 0x8080)
        device = started_at(rings, FIRST)
        assert "packed=off" in reconcile(device, True).hint
        assert device.broken
        device.set_live(True)
        with pytest.raises(GuestError):
            device.take()


def test_a_packed_ring_of_zeros_starts_at_its_base_wherever_that_is():
    with Rings("packed", size=SIZE) as rings:
        device = started_at(rings, 0x8005_8005)
        assert reconcile(device, True, (0x8003, 0x8009)).text == ""
        assert device.base == 0x8005_8005
