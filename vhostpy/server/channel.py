"""Our own requests to a front-end, on the channel that it gave us (SET_BACKEND_REQ_FD).

All of them go through here: what is told, and what is asked and answered. The caller waits for
no writing: a request stands in a queue until the front-end reads. One that does not, or does
not answer, loses its session.

The fd is the front-end's choice, and other processes may have the same file. Only a Unix socket
is used: its writers never wait. Its readers do, while another one is in a page fault and has its
lock: so answers are read by the thread that closes what this socket's front-ends sent, and a
hang holds up this socket alone.

Source: QEMU, docs/interop/vhost-user.rst, "Back-end communication".
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vhostpy.errors import ProtocolError, VhostpyError
from vhostpy.protocol.codec import BACK_END_TABLE, REPLIES_TO_BACK_END, Decoder, Message, encode
from vhostpy.protocol.payloads import Payload
from vhostpy.system import fds
from vhostpy.system.fds import OwnedFd, close_all
from vhostpy.system.notify import is_unix_socket

# Requests that have not been read, or not been answered.
PENDING_MAX = 64
# A front-end that has read and answered nothing for so long has hung.
PATIENCE_S = 10.0
HINT = "a front-end must read, and answer, what comes on the channel that it has set up"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that is to be answered."""

    request: int
    answer: asyncio.Future[Message | None]

    def end(self, message: Message | None) -> None:
        """This answers it; None: nothing ever will."""
        if not self.answer.done():
            self.answer.set_result(message)
        elif message is not None:  # nobody waits for it any more
            message.close()


class Channel:
    """One front-end's channel, where it has set one up. `fail` ends the session."""

    def __init__(self, name: str, fail: Callable[[VhostpyError], None]) -> None:
        self.name = name
        self._fail = fail
        self._fd: OwnedFd | None = None
        self._sock: socket.socket | None = None  # the same file
        self._unsent: deque[bytes] = deque()  # of the first one, what is left
        self._asked: deque[Asked] = deque()  # in the order in which they are answered
        self._decoder = Decoder(REPLIES_TO_BACK_END)
        self._reading = False  # or waits for something to read
        self._patience: asyncio.TimerHandle | None = None

    def open(self, fd: OwnedFd) -> None:
        """Goes by `fd` from now on, and takes it; by none, where that is of no use."""
        self.close()
        if not is_unix_socket(fd.fileno()):
            return
        sock = socket.socket(fileno=fd.fileno())
        if sock.type == socket.SOCK_STREAM:
            self._fd, self._sock = fd.move(), sock
        else:
            sock.detach()

    def close(self) -> None:
        """There is none any more: nothing is sent, nobody is answered."""
        sock, fd, self._sock, self._fd = self._sock, self._fd, None, None
        if sock is None or fd is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(sock.fileno())
        loop.remove_writer(sock.fileno())
        sock.detach()
        fd.close()
        self._unsent.clear()
        for asked in self._asked:
            asked.end(None)
        self._asked.clear()
        self._decoder.close()
        self._reading = False
        self._renew_patience()

    def tell(self, request: int, payload: Payload | bytes = b"") -> bool:
        """Sends a request that is not answered, now or later; False: there is no way to."""
        return self._send(encode(request, payload))

    async def ask(
        self, request: int, payload: Payload | bytes = b"", *, acknowledged: bool
    ) -> Message | None:
        """Sends a request and waits for the answer, whose fds are the caller's.

        `acknowledged`: REPLY_ACK is negotiated. None: nothing answers, or there is no way to
        ask, or the channel is closed or replaced meanwhile.
        """
        asked = None
        if acknowledged or BACK_END_TABLE[request].replies:
            asked = Asked(request, asyncio.get_running_loop().create_future())
        if not self._send(encode(request, payload, need_reply=acknowledged), asked):
            return None
        return None if asked is None else await asked.answer

    # Writing ---------------------------------------------------------------------------

    def _send(self, data: bytes, asked: Asked | None = None) -> bool:
        if self._sock is None:
            return False
        if len(self._unsent) + len(self._asked) >= PENDING_MAX:
            self._give_up(f"{PENDING_MAX} of our requests were not read, or not answered")
            return False
        if asked is not None:
            self._asked.append(asked)
            self._read()
        self._unsent.append(data)
        if len(self._unsent) == 1:  # else it waits for its turn
            self._write()
        return self._sock is not None

    def _write(self) -> None:
        assert self._sock is not None
        loop, number = asyncio.get_running_loop(), self._sock.fileno()
        try:
            while self._unsent:
                flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                sent = self._sock.send(self._unsent[0], flags)
                if sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][sent:]
                else:
                    self._unsent.popleft()
                self._renew_patience()
        except BlockingIOError:
            loop.add_writer(number, self._write)
            if self._patience is None:
                self._renew_patience()
        except OSError:  # it listens, or its other end has gone: there is nobody to tell
            self.close()
        else:
            loop.remove_writer(number)

    # Reading ---------------------------------------------------------------------------

    def _read(self) -> None:
        """Waits for an answer, if one is to come."""
        if self._sock is not None and self._asked and not self._reading:
            self._reading = True
            asyncio.get_running_loop().add_reader(self._sock.fileno(), self._readable, self._sock)

    def _readable(self, sock: socket.socket) -> None:
        assert self._fd is not None
        loop, wanted, account = asyncio.get_running_loop(), self._decoder.wanted, self._fd.account
        loop.remove_reader(sock.fileno())
        # A number of its own: ours may be closed, and another file's, before it is read.
        try:
            copy = OwnedFd(os.dup(sock.fileno()), account)
        except OSError as error:
            self._give_up(f"it cannot be read: {error}")
            return

        def read() -> None:
            data: bytes | None = None
            received: list[OwnedFd] = []
            why = "it ended before an answer came"
            same = socket.socket(fileno=copy.fileno())
            try:
                data, received = fds.receive(same, wanted, account, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # another process has taken it
            except (OSError, ProtocolError) as error:
                data, why = b"", str(error.args[0] if isinstance(error, ProtocolError) else error)
            finally:
                same.detach()
                copy.close()
            try:
                loop.call_soon_threadsafe(self._take, sock, data, received, why)
            except RuntimeError:  # the loop has ended meanwhile
                close_all(received)

        account.closing.do(read)

    def _take(
        self, sock: socket.socket, data: bytes | None, received: list[OwnedFd], why: str
    ) -> None:
        """What was read; None: nothing, b"": nothing will be, and why."""
        if sock is not self._sock:
            close_all(received)
            return
        self._reading = False
        if data == b"":
            self._give_up(why)
            return
        try:
            for message in self._decoder.feed(data or b"", received):
                self._answer(message)
        except ProtocolError as error:
            self._give_up(str(error.args[0]))
            return
        self._read()

    def _answer(self, message: Message) -> None:
        asked = self._asked.popleft()
        if message.request != asked.request:
            message.close()
            asked.end(None)
            wanted = REPLIES_TO_BACK_END.name(asked.request)
            raise ProtocolError(f"{message.name} was answered, {wanted} had been asked")
        asked.end(message)
        self._renew_patience()

    # Patience --------------------------------------------------------------------------

    def _renew_patience(self) -> None:
        """The front-end has read or answered something; or has to, from now on."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if self._unsent or self._asked:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(PATIENCE_S, self._lose_patience)

    def _lose_patience(self) -> None:
        pending = len(self._unsent) + len(self._asked)
        self._give_up(f"{pending} of our requests: nothing read or answered in {PATIENCE_S:g} s")

    def _give_up(self, why: str) -> None:
        self.close()
        self._fail(ProtocolError(f"{self.name}: back-end channel: {why}", HINT))
