"""A disk's back-end that answers whatever a test wants, and serves nothing."""

import socket
import threading

from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.protocol.codec import Decoder, FrontEndRequest, encode_reply
from vhostpy.protocol.payloads import U64, Config
from vhostpy.system.fds import OwnedFd

R = FrontEndRequest
SECTORS = 2048
OFFERED = (
    Feature.VERSION_1, Feature.PROTOCOL_FEATURES, Feature.BLK_BLK_SIZE, Feature.BLK_FLUSH,
    Feature.BLK_MQ,
)  # fmt: skip


def config(capacity=SECTORS, block=512, queues=1, size=36):
    """The config space of a disk (virtio 1.3, "Device configuration layout")."""
    space = bytearray(60)
    space[0:8] = capacity.to_bytes(8, "little")
    space[20:24] = block.to_bytes(4, "little")
    space[34:36] = queues.to_bytes(2, "little")
    return Config(0, 0, bytes(space[:size]))


class Liar:
    """Serves one front-end after the other in a thread.

    `answers`: by request, a payload, or bytes that are sent as they are. `on`: by request,
    what is called with its fds.
    """

    def __init__(self, path, answers=(), on=()):
        features = sum(1 << bit for bit in OFFERED)
        protocol = 1 << ProtocolFeature.CONFIG | 1 << ProtocolFeature.MQ
        self.answers = {
            R.GET_FEATURES: U64(features), R.GET_PROTOCOL_FEATURES: U64(protocol),
            R.GET_QUEUE_NUM: U64(1), R.GET_CONFIG: config(), **dict(answers),
        }  # fmt: skip
        self.on = dict(on)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        self.listener.close()

    def _run(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                self.connection = connection
                self._serve(connection)

    def _serve(self, connection):
        decoder = Decoder()
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(connection, decoder.wanted, 8)
                if not data:
                    return
                for message in decoder.feed(data, [OwnedFd(fd) for fd in fds]):
                    if message.request in self.on:
                        self.on[message.request]([fd.take() for fd in message.fds])
                    if message.request in self.answers:
                        connection.sendall(self._answer(message.request))
            except ConnectionError:
                return

    def _answer(self, request):
        answer = self.answers[request]
        return answer if isinstance(answer, bytes) else encode_reply(request, answer)
