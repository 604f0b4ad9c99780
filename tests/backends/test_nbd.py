"""Disks on a real NBD server, which hangs, dies, comes back, and says no."""

import contextlib
import errno
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.guest import IN, IOERR, OK, OUT, Guest, eventually
from tests.backends.machine import Machine
from tests.backends.nbdkit import Nbdkit
from tests.backends.test_storage import assert_is_a_bytearray, channel_of
from vhostpy.backends.storage.nbd import NbdStorage
from vhostpy.backends.storage.storage import Op
from vhostpy.errors import ConfigError

SIZE = 4 << 20
UNMAP = 1
LONG_S = 60  # what a test waits for in vain only when it fails

SERVERS = {
    "memory": ["memory", str(SIZE)],
    "one connection": ["--filter=multi-conn", "memory", str(SIZE), "multi-conn-mode=disable"],
    "small requests": [
        "--filter=blocksize-policy", "memory", str(SIZE), "blocksize-preferred=4096",
        "blocksize-maximum=32768", "blocksize-error-policy=error",
    ],
    "over TCP": ["memory", str(SIZE)],
}  # fmt: skip

mixes = st.lists(
    st.tuples(
        st.sampled_from([Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES]),
        st.integers(0, SIZE // 512),
        st.one_of(st.integers(0, 40), st.integers(0, SIZE // 512)),
        # Pieces that lie behind each other are one to the server; of these none does.
        st.sampled_from([512, 4096, 1000, 77, 1 << 17]),
        st.integers(0, 255),
        st.sampled_from([0, UNMAP]),
    ),
    max_size=12,
)


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    words, tcp = SERVERS[request.param], request.param == "over TCP"
    with Nbdkit(tmp_path_factory.mktemp("nbd"), *words, tcp=tcp) as nbdkit:
        yield nbdkit


@pytest.mark.parametrize("gap", [0, 64], ids=["adjacent", "apart"])
@settings(max_examples=12, deadline=None)
@given(mix=mixes)
def test_contents_are_those_of_a_bytearray(server, gap, mix):
    with channel_of(NbdStorage(server.uri)) as channel:
        assert channel.run(Op.WRITE_ZEROES, 0, SIZE)[0] == 0
        assert_is_a_bytearray(channel, SIZE, mix, gap)


def test_a_key_makes_the_connection_private(tmp_path):
    key = tmp_path / "keys"
    key.write_text("alice:" + os.urandom(32).hex() + "\n")
    with Nbdkit(tmp_path, "--tls=require", f"--tls-psk={key}", "memory", str(SIZE)) as server:
        secret = f"nbds+unix://alice@/?socket={server.socket}&tls-psk-file={key}"
        with channel_of(NbdStorage(secret)) as channel:
            data = os.urandom(300_000 // 512 * 512)
            assert channel.run(Op.WRITE, 512, len(data), data)[0] == 0
            assert channel.run(Op.READ, 512, len(data))[1] == data
        assert "TLS" in refused(server.uri)


# A server that dies or hangs ------------------------------------------------------------


def storage_of(server, **options):
    return NbdStorage(server.uri, **{"silence_s": LONG_S, "give_up_s": LONG_S, **options})


@pytest.fixture
def files(tmp_path):
    """A server that keeps its data when it is killed."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    with Nbdkit(tmp_path, "file", str(image)) as server:
        yield server


@pytest.mark.parametrize("queues", [1, 4])
def test_requests_outlive_a_server_that_is_killed_and_started_again(files, queues, caplog):
    guest = Guest(queues=queues, queue_size=256)
    with Machine(storage_of(files), guest=guest) as machine:
        for round_ in range(3):
            files.pause()  # so that all of them are under way when it dies
            written = {}
            for number in range(32):
                data = os.urandom(4096 * (1 + number % 5))
                cuts = [100, 4096] if number % 2 else []
                sector = 64 * number
                sent = guest.request(OUT, sector, data=data, cuts=cuts, index=number % queues)
                written[sector] = (data, sent)
            eventually(lambda: machine.disk.status()["queues"][0]["inflight"] > 0, "a request")
            assert not any(sent.is_done() for _, sent in written.values())
            files.restart()
            assert [sent.wait() for _, sent in written.values()] == [OK] * 32
            for sector, (data, _) in written.items():
                read = guest.request(IN, sector, space=len(data), cuts=[700])
                assert read.wait() == OK
                assert read.data == data, round_
        assert machine.counters()["io_errors"] == 0
    lost = [record for record in caplog.records if "connection lost" in record.message]
    assert 1 <= len(lost) <= 3 * queues


def test_a_server_that_stays_dead_costs_errors_once_said_and_no_other_disk(
    files, tmp_path, caplog
):
    with (
        Nbdkit(tmp_path / "other", "memory", str(SIZE)) as healthy,
        Machine(storage_of(files, give_up_s=0.3)) as machine,
        Machine(storage_of(healthy)) as other,
        caplog.at_level(logging.WARNING, "vhostpy"),
    ):
        files.kill()
        sent = [machine.guest.request(OUT, n, data=b"x" * 512) for n in range(8)]
        while not all(request.is_done() for request in sent):
            assert other.guest.request(IN, space=512).wait() == OK
        assert [request.wait() for request in sent] == [IOERR] * 8
        assert machine.guest.request(IN, space=512).wait() == IOERR, "and no new wait"
        machine.disk.on_bell()
        files.restart()
        eventually(lambda: machine.guest.request(IN, space=512).wait() == OK, "the server")
    texts = [record.message for record in caplog.records]
    for text in ("connection lost", "requests fail", "further ones are only counted", "again"):
        assert sum(text in line.splitlines()[0] for line in texts) == 1, texts


def test_a_ring_stops_in_time_while_its_server_hangs(files):
    with Machine(storage_of(files)) as machine:
        assert machine.guest.request(IN, space=512).wait() == OK
        files.pause()
        hung = machine.guest.request(IN, space=4096)
        eventually(lambda: machine.counters()["inflight"] == 1, "a request")
        drained, _ = machine.stop(0, deadline_s=0.05)
        assert not drained
        assert machine.disk.status()["hung_requests"] == 1
        assert machine.guest.memory.in_use == 1, "its memory stays"
        files.restart()
        eventually(lambda: machine.disk.status()["hung_requests"] == 0, "its end")
        assert machine.guest.memory.in_use == 0
        assert not hung.is_done()


def test_a_silent_server_counts_as_lost(files):
    with Machine(storage_of(files, silence_s=0.2, give_up_s=0.2)) as machine:
        files.pause()
        assert machine.guest.request(IN, space=512).wait() == IOERR
        files.resume()
        eventually(lambda: machine.guest.request(IN, space=512).wait() == OK, "the server")


@pytest.mark.parametrize("sleepers", [1, 4])
def test_sleepers_that_share_a_connection_each_get_their_answers(tmp_path, sleepers):
    """Whoever drives it takes those of all; and nobody's is forgotten with its connection."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 * SIZE))
    words = ["--filter=multi-conn", "file", str(image), "multi-conn-mode=disable"]
    part, count = 4 * SIZE // sleepers, 8  # more than a socket takes: they wait for room too
    rounds = [0] * sleepers

    def churn(number, channel):
        span = range(number * part, number * part + part, part // count)
        for _ in range(10):
            data = [os.urandom(part // count) for _ in span]
            writes = [(Op.WRITE, at, len(each), each) for at, each in zip(span, data, strict=True)]
            reads = [(Op.READ, at, part // count) for at in span]
            wrote = channel.run_all(writes, sleep=True, timeout_s=LONG_S)
            assert [result for result, _ in wrote] == [0] * count
            read = channel.run_all(reads, sleep=True, timeout_s=LONG_S)
            assert read == [(0, each) for each in data]
            rounds[number] += 1

    with (
        Nbdkit(tmp_path, *words) as server,
        contextlib.closing(storage_of(server)) as storage,
        ThreadPoolExecutor(sleepers) as pool,
    ):
        channels = [storage.channel() for _ in rounds]
        ends = [pool.submit(churn, *each) for each in enumerate(channels)]
        for _ in range(3):
            before = sum(rounds)
            eventually(lambda seen=before: sum(rounds) > seen + sleepers, "progress")
            server.restart()
        for end in ends:
            end.result()
        for channel in channels:
            channel.close()


def test_a_slow_server_is_none_that_is_lost(tmp_path, caplog):
    with (
        Nbdkit(tmp_path, "--filter=delay", "memory", str(SIZE), "rdelay=150ms") as server,
        Machine(storage_of(server, silence_s=0.2)) as machine,
    ):
        for _ in range(3):
            assert machine.guest.request(IN, space=512).wait() == OK
        eventually(lambda: not machine.counters()["inflight"], "rest")
        threading.Event().wait(0.3)  # idle for longer than a server may be silent
        assert machine.guest.request(IN, space=512).wait() == OK
    assert "lost" not in caplog.text


def test_guest_memory_that_goes_away_ends_its_guest_and_no_connection_for_good(files):
    """The answer to a read finds no memory: EFAULT breaks the connection, not the server."""
    with Machine(storage_of(files)) as machine:
        files.pause()
        bad = machine.guest.request(IN, space=65536)
        eventually(lambda: machine.counters()["inflight"] == 1, "a request")
        os.ftruncate(machine.guest.fd, RINGS)
        files.resume()
        eventually(lambda: machine.guest.memory.poisoned, "poison")
        eventually(lambda: machine.counters()["inflight"] == 0, "an end")
        assert not bad.is_done() or bad.length
        innocent = machine.storage.channel()
        assert innocent.run(Op.READ, 0, 512) == (0, bytes(512))
        innocent.close()


RINGS = 4096 * 4


# What a server says ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), [("EIO", errno.EIO), ("ENOSPC", errno.ENOSPC)])
def test_an_error_of_the_server_is_the_guest_s(tmp_path, name, number):
    words = ["--filter=error", "memory", str(SIZE), f"error-pwrite={name}",
             "error-pwrite-rate=100%"]
    with Nbdkit(tmp_path, *words) as server, Machine(storage_of(server)) as machine:
        assert machine.guest.request(OUT, data=bytes(512)).wait() == IOERR
        assert machine.guest.request(IN, space=512).wait() == OK
        queue = machine.disk.status()["queues"][0]
        assert queue["io_errors"] == 1
        with channel_of(storage_of(server)) as channel:
            assert channel.run(Op.WRITE, 0, 512, bytes(512))[0] == -number


def test_what_the_server_cannot_do_is_not_offered(tmp_path):
    with Nbdkit(tmp_path, "--readonly", "memory", str(SIZE)) as server:
        storage = storage_of(server)
        assert storage.read_only and not storage.can_discard and not storage.can_write_zeroes
        storage.close()
    words = ["--filter=nozero", "--filter=blocksize-policy", "memory", str(SIZE + 4096 + 512),
             "blocksize-minimum=4096", "blocksize-preferred=4096"]
    with Nbdkit(tmp_path, *words) as server, channel_of(storage_of(server)) as channel:
        storage = storage_of(server)
        assert not storage.can_write_zeroes and storage.can_discard
        assert storage.block_size == 4096 and storage.size_bytes == SIZE + 4096
        data = os.urandom(3 << 20)
        assert channel.run(Op.WRITE, 4096, len(data), data, piece=4000, gap=8)[0] == 0
        assert channel.run(Op.READ, 4096, len(data), piece=70_000, gap=8)[1] == data
        storage.close()


def test_queues_share_one_connection_unless_the_server_allows_more(tmp_path):
    for mode, expected in (("emulate", 4), ("disable", 1)):
        words = ["--filter=multi-conn", "memory", str(SIZE), f"multi-conn-mode={mode}"]
        with Nbdkit(tmp_path, *words) as server:
            before = threading.active_count()
            storage = storage_of(server)
            channels = [storage.channel() for _ in range(9)]
            for number, channel in enumerate(channels):
                data = bytes([number]) * 512
                assert channel.run(Op.WRITE, 0, 512, data)[0] == 0
                assert channels[number // 2].run(Op.READ, 0, 512)[1] == data
            assert threading.active_count() - before == expected
            for channel in channels:
                channel.close()
            storage.close()


def test_close_leaves_no_thread_and_no_fd_even_while_the_server_hangs(files):
    threads, fds = threading.active_count(), os.listdir("/proc/self/fd")
    for _ in range(3):
        with channel_of(storage_of(files)) as channel:
            assert channel.run(Op.READ, 0, 512)[0] == 0
    storage = storage_of(files)
    channel = storage.channel()
    files.pause()
    with pytest.raises(TimeoutError):
        channel.run(Op.READ, 0, 512, timeout_s=0.05)
    storage.close()
    storage.close()
    assert channel.completion_fd in map(int, os.listdir("/proc/self/fd"))
    channel.close()
    assert threading.active_count() == threads
    assert os.listdir("/proc/self/fd") == fds


def test_a_disk_whose_thread_cannot_start_keeps_no_connection(files, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    fds = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(threading.Thread, "start", start)
        storage_of(files)
    assert os.listdir("/proc/self/fd") == fds


# What an operator gets wrong --------------------------------------------------------------


def refused(uri, **options):
    with pytest.raises(ConfigError) as caught:
        NbdStorage(uri, **options)
    text = caught.value.args[0]
    assert "\n" not in text and caught.value.hint and not text.startswith("nbd_")
    return text


def test_a_server_that_cannot_be_had_gets_one_line_that_says_what_to_do(tmp_path):
    assert "No such file" in refused(f"nbd+unix:///?socket={tmp_path}/missing")
    assert "refused" in refused("nbd://127.0.0.1:1/")
    assert "no kind of disk" in refused("http://127.0.0.1/")
    assert refused("nbd+unix://host-and-no-socket/")
    with Nbdkit(tmp_path, "memory", "0") as server:
        assert "less than one block" in refused(server.uri)
        assert "block size 513" in refused(server.uri, block_size=513)
