"""An NBD server that a test speaks for: what a real one does only by chance."""

import socket
import struct
from pathlib import Path
from types import TracebackType

READ, WRITE = 0, 1
# NBD protocol, "Fixed newstyle negotiation": flags of an export.
DEFAULT_FLAGS = 1 | 4  # they are there; it can flush
MULTI_CONN = 1 << 8


class NbdScript:
    """Listens; `accept()` handshakes, and the rest is up to the test."""

    def __init__(self, directory: Path, size: int, *, flags: int = DEFAULT_FLAGS) -> None:
        self.size, self.flags = size, flags
        self.uri = f"nbd+unix:///?socket={directory / 'nbd'}"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(directory / "nbd"))
        self.listener.listen()
        self.accepted: list[NbdConnection] = []

    def accept(self) -> "NbdConnection":
        """The next connection, ready for commands."""
        connection = NbdConnection(self.listener.accept()[0])
        connection.handshake(self.size, self.flags)
        self.accepted.append(connection)
        return connection

    def __enter__(self) -> "NbdScript":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.listener.close()
        for connection in self.accepted:
            connection.close()


class NbdConnection:
    def __init__(self, ours: socket.socket) -> None:
        self.socket = ours
        self.commands = 0
        self.close = ours.close

    def handshake(self, size: int, flags: int) -> None:
        self.socket.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        self.receive(4)
        while True:
            _, option, length = struct.unpack(">8sII", self.receive(16))
            self.receive(length)
            if option != 7:  # NBD_OPT_GO
                self._reply(option, 1 << 31 | 1)  # NBD_REP_ERR_UNSUP
                continue
            self._reply(option, 3, struct.pack(">HQH", 0, size, flags))  # NBD_REP_INFO
            self._reply(option, 1)  # NBD_REP_ACK
            return

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        head = struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data))
        self.socket.sendall(head + data)

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return data

    def command(self) -> tuple[int, int, int, int]:
        """The next one, without its data: type, cookie, offset, length."""
        _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        self.commands += 1
        return kind, cookie, offset, length


def reply(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    """A simple one."""
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data
