"""Disks on an NBD server that does by order what a real one does by chance."""

import contextlib
import logging
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tests.backends.guest import eventually
from tests.backends.nbdscript import DEFAULT_FLAGS, MULTI_CONN, READ, WRITE, NbdScript, reply
from vhostpy.backends.storage._storage import Op
from vhostpy.backends.storage.nbd import NbdStorage

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


def test_an_export_has_grown_when_every_connection_was_told(tmp_path):
    grown = 2 << 20

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

    def reconnect(number):
        before = len(script.accepted)
        script.accepted[number].socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: len(script.accepted) > before, "a connection")

    with NbdScript(tmp_path, grown // 2, flags=DEFAULT_FLAGS | MULTI_CONN) as script:
        threading.Thread(target=serve_all, daemon=True).start()
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
