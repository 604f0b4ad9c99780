"""Packets, through devices that behave and devices that do not."""

import contextlib
import socket
import threading
import time

import pytest

from tests.null_net import NullNet
from tests.serving import serving
from tests.vhostpy.load.short import send
from vhostpy._spec import Feature
from vhostpy.errors import ConfigError, ProtocolError
from vhostpy.load import net, report
from vhostpy.load.net_loop import FRAME_MAX, Touch, mac
from vhostpy.server.listen import Server

LAYOUTS = ("split", "packed")

# Devices that behave --------------------------------------------------------------------


@pytest.mark.parametrize("order", [{}, {"fifo": True}, {"in_order": True}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(60,), (64, 1500), net.IMIX, (60, 9000), (FRAME_MAX,)])
def test_every_frame_through_a_switch_is_verified(switch, sizes, layout, order):
    sockets, _ = switch
    plan = {"touch": Touch.FRAME, "verify": True, "macs": 3, "layout": layout, **order}
    result = send(sockets[:2], sizes=sizes, **plan)
    assert result["received_packets"] > 100
    assert result["sent_packets"] == result["received_packets"] + result["lost_packets"]
    assert report.wrong(result) == "" and result["foreign_packets"] == 0
    assert all(port["received_mpps"] > 0 for port in result["ports"])


@pytest.mark.parametrize("touch", list(Touch))
@pytest.mark.parametrize("queues", [1, 2])
def test_frames_arrive_however_they_are_touched(switch, touch, queues):
    sockets, _ = switch
    result = send(sockets[:2], touch=touch, queues=queues)
    assert result["received_packets"] > 100
    assert result["touch"] == touch.name.lower()


def test_the_switch_knows_all_addresses_before_the_load_starts(switch):
    sockets, table = switch
    seen = []

    class Spy:
        def show(self, text):
            seen.append({entry[1]: entry[2] for entry in table.fdb.entries()})

        def done(self):
            pass

    plan = net.NetPlan(sockets[:2], macs=100, seconds=0.05, warmup_s=0.01, rate_pps=1000)
    net.run(plan, Spy())
    expected = {mac(port, flow): port for port in range(2) for flow in range(100)}
    assert seen[0] == expected


def test_broadcasts_reach_all_other_ports(switch):
    sockets, _ = switch
    result = send(sockets, broadcast=True, senders=1, verify=True, touch=Touch.FRAME)
    assert result["sent_packets"] * 2 == result["received_packets"] + result["lost_packets"]
    assert [port["sent_mpps"] > 0 for port in result["ports"]] == [True, False, False]
    assert [port["received_mpps"] > 0 for port in result["ports"]] == [False, True, True]
    assert report.wrong(result) == ""


def test_only_senders_send(switch):
    sockets, _ = switch
    result = send(sockets, senders=1)
    assert [port["sent_mpps"] > 0 for port in result["ports"]] == [True, False, False]
    assert result["ports"][1]["received_mpps"] > 0


def test_a_rate_is_kept(switch):
    sockets, _ = switch
    result = send(sockets[:2], rate_pps=2000, seconds=0.5)
    total_s = 0.5 + 0.05
    assert 1000 * total_s < result["sent_packets"] <= 2000 * total_s * 1.5
    assert result["lost_packets"] == 0


def test_latencies_are_measured(switch):
    sockets, _ = switch
    result = send(sockets[:2], latency=True, window=1, rate_pps=2000)
    spread = result["latency_us"]
    assert spread["count"] > 50
    assert 0 < spread["min"] <= spread["p50"] <= spread["p99"] <= spread["max"]


def test_an_open_loop_goes_on_where_nothing_comes_back(workers, tmp_path):
    ends = NullNet.couple(workers)
    servers = [Server(end, path=str(tmp_path / end.name)) for end in ends]
    with serving(*servers):
        result = send([server.path for server in servers])
    # The null device returns buffers without our frames in them.
    assert result["sent_packets"] > 1000
    assert result["received_packets"] == 0 and result["foreign_packets"] > 1000
    assert result["lost_packets"] == result["sent_packets"]


def test_more_queues_than_there_are_is_told(workers, tmp_path):
    ends = NullNet.couple(workers)
    servers = [Server(end, path=str(tmp_path / end.name)) for end in ends]
    with serving(*servers), pytest.raises(ConfigError, match="serves 1 queue pairs") as caught:
        send([server.path for server in servers], queues=2)
    assert caught.value.hint == "--queues 1 or less"


# A device with faults ----------------------------------------------------------------------


class Courier:
    """Carries frames from the first queue pair's tx to its rx, by Python, through `deliver`."""

    kind, lossy, positions = "net", True, None
    queue_limit, queue_number = 2, 1

    def __init__(self, name, workers):
        self.name, self.workers = name, workers
        self.rings = {}
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.taken = 0
        self.other = self
        self.thread = threading.Thread(target=self._carry)

    def deliver(self, frames):
        """What arrives of what was sent."""
        return frames

    def _carry(self):
        while not self.ended.is_set():
            with self.lock, self.other.lock if self.other is not self else contextlib.nullcontext():
                tx, rx = self.rings.get(1), self.other.rings.get(0)
                moved = tx is not None and rx is not None and self._turn(tx, rx)
            if not moved:
                time.sleep(0.0005)

    def _turn(self, tx, rx):
        if not tx.live or not rx.live:
            return False
        chains = tx.take(32)
        frames = self.deliver([tx.read(chain) for chain in chains])
        for frame in frames:
            (buffer,) = rx.take(1) or [None]
            if buffer is not None:
                rx.give([(buffer, rx.write(buffer, frame))])
        tx.give([(chain, 0) for chain in chains])
        self.taken += len(chains)
        return bool(chains)

    def features(self):
        return 1 << Feature.VERSION_1 | 1 << Feature.NET_MRG_RXBUF

    def protocol_features(self):
        return 0

    def config(self):
        return b""

    def ring_started(self, index, virtqueue, kick_fd):
        with self.lock:
            self.rings[index] = virtqueue

    def ring_stopped(self, index):
        with self.lock:
            self.rings.pop(index, None)

    async def ring_drain(self, index, deadline_s):
        return True

    def status(self):
        return {}

    def _ignore(self, *_):
        pass

    opened = closed = negotiated = ring_enabled = ring_kick = on_bell = set_mtu = _ignore
    send_rarp = write_config = _ignore


@pytest.fixture
def courier(workers, tmp_path):
    """Carries from a port to itself; tests replace `deliver`."""
    courier = Courier("c0", workers)
    server = Server(courier, path=str(tmp_path / "c0"))
    with serving(server):
        courier.path, courier.server = server.path, server
        courier.thread.start()
        yield courier
        courier.ended.set()
        courier.thread.join()


def carry(courier, **plan):
    return send([courier.path], touch=Touch.FRAME, verify=True, rate_pps=5000, seconds=0.3, **plan)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"layout": "packed"}, "RING_PACKED"),
        ({"in_order": True}, "IN_ORDER"),
    ],
)
def test_what_the_back_end_does_not_offer_is_told(courier, plan, text):
    with pytest.raises(ConfigError, match=text) as caught:
        carry(courier, **plan)
    assert caught.value.hint


def test_a_faithful_courier_is_found_to_be_one(courier):
    result = carry(courier)
    assert result["received_packets"] > 100
    assert report.wrong(result) == "" and result["lost_packets"] == 0


FAULTS = {
    "flipped byte": (lambda f: [b[:-1] + bytes([b[-1] ^ 1]) for b in f], "corrupt_packets"),
    "cut short": (lambda f: [b[:-1] for b in f], "corrupt_packets"),
    "too long": (lambda f: [b + b"x" for b in f], "corrupt_packets"),
    "twice": (lambda f: [b for b in f for _ in range(2)], "disordered_packets"),
    "not ours": (lambda f: [b[:24] + b"\x08\x00" + b[26:] for b in f], "foreign_packets"),
    "other flow": (lambda f: [b[:28] + b"\x07" + b[29:] for b in f], "corrupt_packets"),
    "other stream": (lambda f: [b[:26] + b"\x07" + b[27:] for b in f], "foreign_packets"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_counted(courier, fault):
    change, counter = FAULTS[fault]
    courier.deliver = change
    assert carry(courier)[counter] > 50


def test_frames_out_of_order_are_counted(courier):
    held = []

    def swap(frames):
        # Teaching frames are of another type, and stay as they are.
        held.extend(frames)
        pairs, rest = len(held) // 2 * 2, []
        for i in range(0, pairs, 2):
            rest += [held[i + 1], held[i]]
        del held[:pairs]
        return rest

    courier.deliver = swap
    assert carry(courier)["disordered_packets"] > 50


def test_frames_that_are_lost_are_counted(courier):
    courier.deliver = lambda frames: [f for f in frames if f[32] % 4 or f[24:26] != b"\x88\xb5"]
    result = carry(courier)
    assert result["lost_share"] == pytest.approx(0.25, abs=0.05)
    assert report.wrong(result) == ""


def test_no_more_frames_than_the_window_are_under_way(courier):
    courier.deliver = lambda frames: []
    result = carry(courier, window=4)
    # Nothing comes back; after 100 ms those four are given up, and four more go.
    assert 4 <= result["sent_packets"] <= 200  # without a window, hundreds of thousands
    assert result["received_packets"] == 0


def test_a_long_frame_that_differs_in_its_last_buffer_is_corrupt(workers, tmp_path):
    # As above, but the frame comes in several buffers.
    courier = Courier("c1", workers)

    def turn(tx, rx):
        chains = tx.take(1) if tx.live and rx.live else []
        for chain in chains:
            data = tx.read(chain)
            if len(data) > 3000:
                data = data[:-1] + bytes([data[-1] ^ 1])
            pieces = [data[i : i + 2048] for i in range(0, len(data), 2048)]
            pieces[0] = pieces[0][:10] + len(pieces).to_bytes(2, "little") + pieces[0][12:]
            buffers = rx.take(len(pieces))
            if len(buffers) == len(pieces):
                rx.give([(b, rx.write(b, p)) for b, p in zip(buffers, pieces, strict=True)])
        tx.give([(chain, 0) for chain in chains])
        return bool(chains)

    courier._turn = turn
    server = Server(courier, path=str(tmp_path / "c1"))
    with serving(server):
        courier.path = server.path
        courier.thread.start()
        try:
            result = carry(courier, sizes=(100, 5000))
        finally:
            courier.ended.set()
            courier.thread.join()
    assert result["received_packets"] > 100
    assert result["corrupt_packets"] == pytest.approx(result["received_packets"] / 2, rel=0.1)
    assert result["disordered_packets"] == 0


def test_a_back_end_that_hangs_up_ends_the_load(courier):
    def hang_up():
        while not courier.taken:
            time.sleep(0.01)
        courier.server.connection.sock.shutdown(socket.SHUT_RDWR)

    hanging = threading.Thread(target=hang_up)
    hanging.start()
    with pytest.raises(ProtocolError, match="closed the connection"):
        send([courier.path], seconds=20)
    hanging.join()
