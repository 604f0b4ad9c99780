"""`vhostpy net` killed or stopped, and started again, while its guests stay: frames go on."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.netguest import INDIRECT, MRG_RXBUF, VERSION_1, data
from tests.hostile.victim import eventually
from vhostpy._ring import DriverVirtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.frontend.frontend import FrontEnd

PROJECT = Path(__file__).parents[2]
SIZE = 256
HEADER = 12
WINDOW = 64  # frames on their way: a receiver has room for all of them
MODERN = VERSION_1 | MRG_RXBUF | INDIRECT
PACKED = MODERN | 1 << Feature.RING_PACKED
FORMS = {
    "split": MODERN,
    "packed": PACKED,
    "packed_in_order": PACKED | 1 << Feature.IN_ORDER,
}
PROTOCOL_FEATURES = 1 << ProtocolFeature.MQ | 1 << ProtocolFeature.REPLY_ACK


class Switch:
    """The process, and whoever starts it again."""

    def __init__(self, directory):
        self.sockets = [str(directory / name) for name in ("vu0", "vu1")]
        self.log = directory / "log"
        self.environment = {
            **os.environ, "PYTHONPATH": str(PROJECT), "VHOSTPY_RUNTIME_DIR": str(directory),
        }  # fmt: skip
        self.start()

    def start(self):
        words = [sys.executable, "-m", "vhostpy", "net", "--json"]
        words += [word for path in self.sockets for word in ("--socket", path)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=log, env=self.environment
            )
        assert select.select([self.process.stdout], [], [], 30)[0]
        assert self.process.stdout.readline(), self.log.read_text()

    def end(self, number):
        self.process.send_signal(number)
        self.process.wait()
        self.process.stdout.close()

    def status(self):
        words = [sys.executable, "-m", "vhostpy", "status", "vu0", "--json"]
        answer = subprocess.run(
            words, stdout=subprocess.PIPE, env=self.environment, check=True, timeout=20
        )
        return json.loads(answer.stdout)["sockets"]


@pytest.fixture
def switch(tmp_path):
    tmp_path.chmod(0o700)
    switch = Switch(tmp_path)
    yield switch
    if switch.process.poll() is None:
        switch.end(signal.SIGKILL)


class Station(FrontEnd):
    """A guest that outlives the process: rings, buffers and where they stand."""

    def begin(self, features):
        self.negotiate(features, PROTOCOL_FEATURES)
        self.set_mem_table()
        for index in range(2):
            self.start_queue(index, SIZE, fifo=bool(features >> Feature.IN_ORDER & 1))
        self.buffers, self.sent = {}, {}  # by the chain's id
        self.spare = [self.allocate(2048) for _ in range(SIZE)]
        for _ in range(SIZE):
            self.post(self.allocate(2048))
        self.queues[0].ring.kick()

    def starts_again(self):
        """Another life of the driver: new rings where the old ones were."""
        for queue in self.queues.values():
            self.memory.write(queue.desc_gpa, bytes(16 * SIZE))
            queue.ring = DriverVirtqueue(
                self.memory, SIZE, self.features, desc_gpa=queue.desc_gpa,
                avail_gpa=queue.avail_gpa, used_gpa=queue.used_gpa, kick_fd=queue.kick.fileno(),
                fifo=bool(self.features >> Feature.IN_ORDER & 1),
            )  # fmt: skip
        places, self.buffers = list(self.buffers.values()), {}
        for gpa in places:
            self.post(gpa)
        self.queues[0].ring.kick()

    def post(self, gpa):
        self.buffers[self.queues[0].ring.add([], [(gpa, 2048)])] = gpa

    def again(self, path, base):
        """The next process is told `base` of every ring; None: as QEMU does it."""
        if base is None:
            return self.connect_again(path)
        announce, self.announce = self.announce, lambda queue, **_: announce(queue, base=base)
        try:
            return self.connect_again(path)
        finally:
            self.announce = announce

    def send(self, frame):
        ring = self.queues[1].ring
        while not self.spare:
            self.reclaim()
        gpa = self.spare.pop()
        self.memory.write(gpa, bytes(HEADER) + frame)
        self.sent[ring.add([(gpa, HEADER + len(frame))], [])] = gpa
        ring.kick()

    def reclaim(self):
        for id_, _ in self.queues[1].ring.used():
            self.spare.append(self.sent.pop(id_))

    def received(self):
        frames = []
        came = [(self.buffers.pop(id_), n) for id_, n in self.queues[0].ring.used()]
        for gpa, length in came:
            if length:
                frames.append(self.memory.read(gpa, length)[HEADER:])
            self.post(gpa)
        self.queues[0].ring.kick()
        return frames

    def drained_into(self, receiver):
        """What arrives until all that was sent has come back."""
        frames = []
        eventually(
            lambda: frames.extend(receiver.received()) or self.reclaim() or not self.sent,
            "all buffers",
        )
        return frames

    def gets(self, count):
        """The next frames, at least so many."""
        frames = []
        eventually(lambda: frames.extend(self.received()) or len(frames) >= count, "frames")
        return frames


def exchange(sender, receiver, count, first):
    """`count` frames arrive, in order and none but them."""
    for start in range(first, first + count, WINDOW):
        some = range(start, min(start + WINDOW, first + count))
        frames = [data(60 + tag % 900, tag) for tag in some]
        for frame in frames:
            sender.send(frame)
        assert receiver.gets(len(frames)) == frames
    eventually(lambda: sender.reclaim() or not sender.sent, "the last buffers")


BASES = {"as QEMU": None, "0": 0, "first": 0x8000_8000, "as DPDK": 0x8000}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "stop"])
@pytest.mark.parametrize("counts", [[10], [300], [100] * 5], ids=["10", "300", "5x100"])
@pytest.mark.parametrize(
    ("form", "base"),
    [("split", "0"), ("packed", "as QEMU"), ("packed", "as DPDK"), ("packed_in_order", "first")],
)
def test_frames_go_on_after_a_restart(switch, form, base, counts, how):
    with Station(switch.sockets[0]) as a, Station(switch.sockets[1]) as b:
        for guest in (a, b):
            guest.begin(FORMS[form])
        sent = 0
        for count in counts:
            exchange(a, b, count, sent)
            exchange(b, a, count // 3, sent)
            sent += count
            switch.end(how)
            switch.start()
            for guest, path in zip((a, b), switch.sockets, strict=True):
                guest.again(path, BASES[base])
        exchange(a, b, 300, sent)
        exchange(b, a, 300, sent)
        assert "contradicts" in switch.log.read_text()


@pytest.mark.parametrize("form", FORMS)
def test_kill_under_load_costs_a_few_frames_and_no_buffer(switch, form):
    """Buffers that the killed process had given back, unseen, come back; so do all others."""
    with Station(switch.sockets[0]) as a, Station(switch.sockets[1]) as b:
        for guest in (a, b):
            guest.begin(FORMS[form])
        sent = 0
        for _ in range(6):
            for _ in range(150):  # sent while the one before is on its way, and into the kill
                a.send(data(60, sent))
                sent += 1
            switch.end(signal.SIGKILL)
            while a.spare:  # the guest does not know of it
                a.send(data(60, sent))
                sent += 1
                a.reclaim()
            switch.start()
            for guest, path in zip((a, b), switch.sockets, strict=True):
                guest.again(path, 0x8000_8000 if form != "split" else 0)
            for frame in a.drained_into(b):
                assert frame == data(60, int.from_bytes(frame[14:18], "big"))
        b.received()  # the last ones were there before their sender's buffers came back
        exchange(a, b, 300, sent)
        exchange(b, a, 300, sent)


def forget(switch):
    """The runtime directory is lost, as with a machine that keeps it elsewhere."""
    for path in switch.log.parent.glob("*.rings"):
        path.unlink()


def test_packed_ring_of_which_nothing_is_known_is_named_until_it_is_reset(switch):
    with Station(switch.sockets[0]) as a, Station(switch.sockets[1]) as b:
        for guest in (a, b):
            guest.begin(FORMS["packed_in_order"])
        exchange(a, b, 10, 0)
        switch.end(signal.SIGKILL)
        forget(switch)
        switch.start()
        a.again(switch.sockets[0], None)
        status = switch.status()[0]
        assert status["handshake"] == "ready: rings 0 run, broken: rings 1"  # to 0 nothing had come
        assert "ring 1: base 0x80008000 contradicts the packed ring" in status["waits_for"]
        assert "reload the guest's network driver" in status["waits_for"]
        assert "packed=off" in switch.log.read_text()
        # The driver begins anew, in the same place.
        for index in a.queues:
            a.stop_queue(index)
        a.starts_again()
        for queue in a.queues.values():
            a.announce(queue, base=0x8000_8000)
        b.again(switch.sockets[1], None)
        assert not switch.status()[0]["waits_for"]
        a.send(data(60, 1))
        eventually(lambda: a.reclaim() or not a.sent, "the buffer")


def test_packed_ring_of_single_descriptors_is_found_without_what_was_kept(switch):
    with Station(switch.sockets[0]) as a, Station(switch.sockets[1]) as b:
        for guest in (a, b):
            guest.begin(FORMS["packed"])
        exchange(a, b, 300, 0)
        switch.end(signal.SIGKILL)
        forget(switch)
        switch.start()
        for guest, path in zip((a, b), switch.sockets, strict=True):
            guest.again(path, None)
        exchange(a, b, 300, 0)
        exchange(b, a, 300, 0)


@pytest.mark.parametrize("form", ["packed", "packed_in_order"])
def test_guest_that_started_again_while_we_were_away_starts_at_its_beginning(switch, form):
    """What was kept is of another driver's ring in the same place."""
    with Station(switch.sockets[0]) as a, Station(switch.sockets[1]) as b:
        for guest in (a, b):
            guest.begin(FORMS[form])
        exchange(a, b, 100, 0)
        exchange(b, a, 100, 0)
        switch.end(signal.SIGKILL)
        for guest in (a, b):
            guest.starts_again()
        switch.start()
        for guest, path in zip((a, b), switch.sockets, strict=True):
            guest.again(path, None)
        exchange(a, b, 300, 0)
        exchange(b, a, 300, 0)
