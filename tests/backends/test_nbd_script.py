"""Disks on an NBD server that does by order what a real one does by chance."""

import contextlib
import logging
import os
import resource
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.backends.guest import eventually
from tests.backends.nbdscript import DEFAULT_FLAGS, MULTI_CONN, READ, WRITE, NbdScript, reply
from vhostpy.backends.storage.nbd import NbdStorage
from vhostpy.backends.storage.storage import Op

PIECE = 512 << 10  # of one command, at most
COMMANDS = 64  # that a server has at a time
LONG_S = 60  # what a test waits for in vain only when it fails


def test_a_server_that_hangs_up_on_every_command_is_not_asked_all_the_time(tmp_path, caplog):
    calls = 0

    def hang_up(script):
        nonlocal calls
        with contextlib.suppress(OSError):
            while True:
                connection = script.accept()
                calls += 1
                with contextlib.suppress(EOFError):
                    connection.command()
                connection.close()

    with NbdScript(tmp_path, 1 << 20) as script, caplog.at_level(logging.WARNING, "vhostpy"):
        threading.Thread(target=hang_up, args=[script], daemon=True).start()
        with contextlib.closing(NbdStorage(script.uri, give_up_s=0.5)) as storage:
            channel = storage.channel()
            before = time.monotonic()
            assert channel.run(Op.READ, 0, 512, timeout_s=LONG_S)[0] < 0
            assert time.monotonic() - before < LONG_S / 2
            assert calls < 20
            assert len(caplog.records) < 60
            channel.close()


def test_who_sleeps_is_told_when_its_command_waits_for_room(tmp_path, monkeypatch):
    """Two share a connection. One sleeps, and its last command is begun by the other, who has
    no more to do then: the socket takes a part of it, and the server has nothing to answer."""
    epoll = select.epoll
    sent, asleep, awake = threading.Event(), threading.Event(), threading.Event()
    awake.set()
    size = COMMANDS * PIECE  # with the other's, one command more than the server has at a time

    class LateEpoll:
        """Of a thread that does not run while it is not `awake`."""

        def __init__(self):
            self.real = epoll()
            self.register, self.close = self.real.register, self.real.close

        def poll(self, timeout_s):
            deadline = time.monotonic() + timeout_s
            looks = 0  # in vain
            while time.monotonic() < deadline:
                awake.wait(LONG_S)
                if found := self.real.poll(0.001):
                    return found
                looks += 1
                if sent.is_set() and looks == 50:
                    awake.clear()
                    asleep.set()
            return []

    def serve():
        connection = script.accept()
        answers = []
        for _ in range(COMMANDS):
            kind, cookie, _, length = connection.command()
            if kind == WRITE:
                connection.receive(length)
            answers.append(reply(cookie, bytes(length) if kind == READ else b""))
        sent.set()
        asleep.wait(LONG_S)
        connection.socket.sendall(b"".join([*answers[1:], answers[0]]))
        awake.wait(LONG_S)
        _, cookie, _, length = connection.command()
        connection.receive(length)
        connection.socket.sendall(reply(cookie))

    with NbdScript(tmp_path, size) as script, ThreadPoolExecutor(3) as pool:
        server = pool.submit(serve)
        with contextlib.closing(NbdStorage(script.uri, silence_s=LONG_S)) as storage:
            sleeper, other = storage.channel(), storage.channel()
            read = pool.submit(other.run, Op.READ, 0, 512, timeout_s=LONG_S)
            eventually(lambda: script.accepted and script.accepted[0].commands, "a command")
            monkeypatch.setattr(select, "epoll", LateEpoll)
            write = (Op.WRITE, 0, size, bytes(size), 0, size)
            wrote = pool.submit(sleeper.run_all, [write], sleep=True, timeout_s=5)
            assert read.result()[0] == 0
            awake.set()
            assert wrote.result()[0][0] == 0
            server.result()
            sleeper.close()
            other.close()


def answer_all(script):
    """Reads of zeros, on any number of connections."""

    def serve(connection):
        with contextlib.suppress(EOFError, OSError):
            while True:
                _, cookie, _, length = connection.command()
                connection.socket.sendall(reply(cookie, bytes(length)))
        connection.close()

    def serve_all():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=[script.accept()], daemon=True).start()

    threading.Thread(target=serve_all, daemon=True).start()


def test_an_export_has_grown_when_every_connection_was_told(tmp_path):
    grown = 2 << 20

    def reconnect(number):
        before = len(script.accepted)
        script.accepted[number].socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: len(script.accepted) > before, "a connection")

    with NbdScript(tmp_path, grown // 2, flags=DEFAULT_FLAGS | MULTI_CONN) as script:
        answer_all(script)
        with contextlib.closing(NbdStorage(script.uri)) as storage:
            channels = [storage.channel(), storage.channel()]
            assert [channel.run(Op.READ, 0, 512)[0] for channel in channels] == [0, 0]
            script.size = grown
            reconnect(1)
            assert channels[1].run(Op.READ, 0, 512)[0] == 0
            assert storage.actual_bytes() == grown // 2
            reconnect(0)
            eventually(lambda: storage.grow(storage.actual_bytes()), "growth")
            ends = [channel.run(Op.READ, grown - 512, 512)[0] for channel in channels]
            assert ends == [0, 0]
            for channel in channels:
                channel.close()


def test_several_connections_are_none_to_a_server_that_flushes_each_by_itself(tmp_path, caplog):
    with NbdScript(tmp_path, 1 << 20, flags=DEFAULT_FLAGS | MULTI_CONN) as script:
        answer_all(script)
        with contextlib.closing(NbdStorage(script.uri, give_up_s=0.3)) as storage:
            channels = [storage.channel(), storage.channel()]
            assert [channel.run(Op.READ, 0, 512)[0] for channel in channels] == [0, 0]
            script.flags = DEFAULT_FLAGS
            for connection in script.accepted[:2]:
                connection.socket.shutdown(socket.SHUT_RDWR)
            eventually(lambda: "requests fail: a flush does not cover" in caplog.text, "a refusal")
            assert [channel.run(Op.FLUSH, 0, 0)[0] < 0 for channel in channels] == [True, True]
            script.flags |= MULTI_CONN
            eventually(lambda: all(channel.run(Op.FLUSH, 0, 0)[0] == 0 for channel in channels))
            for channel in channels:
                channel.close()


def test_a_channel_that_finds_too_few_fds_takes_none(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with NbdScript(tmp_path, 1 << 20) as script, contextlib.ExitStack() as stack:
        threading.Thread(target=script.accept, daemon=True).start()
        storage = stack.enter_context(contextlib.closing(NbdStorage(script.uri)))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
        spare = os.dup(0)
        with contextlib.suppress(OSError):
            while True:
                stack.callback(os.close, os.dup(0))
        os.close(spare)  # one, and a channel wants two
        for _ in range(3):
            with pytest.raises(OSError, match="Too many open files"):
                storage.channel()
            os.close(os.dup(0))


def test_a_connection_that_cannot_be_begun_is_tried_again_by_the_next_channel(
    tmp_path, monkeypatch
):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with NbdScript(tmp_path, 1 << 20, flags=DEFAULT_FLAGS | MULTI_CONN) as script:
        answer_all(script)
        with contextlib.closing(NbdStorage(script.uri)) as storage:
            channels = [storage.channel()]
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                for _ in range(2):
                    with pytest.raises(RuntimeError):
                        storage.channel()
            channels += [storage.channel() for _ in range(4)]
            assert [channel.run(Op.READ, 0, 512)[0] for channel in channels] == [0] * 5
            for channel in channels:
                channel.close()
