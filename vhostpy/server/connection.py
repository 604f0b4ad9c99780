"""One front-end's session on a connected socket.

The only module that waits for a front-end. Bytes go to the codec, messages to the
session, effects to the data plane; what comes back is sent.
"""

import asyncio
import socket
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from vhostpy.device.device import Device
from vhostpy.errors import ProtocolError, VhostpyError
from vhostpy.protocol.codec import Decoder, Message, encode_reply
from vhostpy.server.plane import DataPlane
from vhostpy.session.effects import Effect, MakeInflight, Reply, StartRing, StopRing
from vhostpy.session.peername import peer_name
from vhostpy.session.session import Session
from vhostpy.system import fds
from vhostpy.system.account import Account

# A front-end that takes none of our replies for so long has hung.
SEND_TIMEOUT_S = 10.0
# What ended sessions does so no more, once one has lasted for so long.
SETTLED_S = 1.0


class Connection:
    """One front-end's session on a connected socket."""

    # Those whose rings and memory have to be looked at when a worker or a fault calls.
    open: ClassVar[weakref.WeakSet["Connection"]] = weakref.WeakSet()

    def __init__(self, device: Device, sock: socket.socket, account: Account) -> None:
        self.device = device
        self.sock = sock
        self.account = account
        self.session = Session(device)
        self.session.front_end = peer_name(sock)
        self.plane = DataPlane(device, self.session, account.calls)
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, settled: Callable[[], None]) -> None:
        """Serves until the front-end goes; raises what ended the session otherwise.

        `settled` is called once it has lasted for a while.
        """
        self.device.opened()
        Connection.open.add(self)
        lasting = asyncio.get_running_loop().call_later(SETTLED_S, settled)
        reading = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait([reading, self._failure], return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            await reading
        finally:
            lasting.cancel()  # closing may take long
            try:
                await _whole(self._close(reading))
            finally:
                # The error's traceback refers to this frame: both would keep each other, and
                # the fds of an unfinished message, until the next garbage collection.
                del reading, self._failure

    async def _close(self, reading: asyncio.Future[None]) -> None:
        Connection.open.discard(self)
        self._failure.cancel()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        try:
            await self.plane.close()
        finally:
            # Not sooner: a front-end that is hung up on goes on from where the rings stand.
            fds.close_socket(self.sock, self.account)
            self.session.close()

    def on_bell(self) -> None:
        """Called when a worker or a contained fault sounds the bell."""
        self.device.on_bell()
        try:
            self.plane.on_bell()
        except VhostpyError as error:
            if not self._failure.done():
                self._failure.set_exception(error.with_traceback(None))

    async def _read(self) -> None:
        decoder = Decoder()
        while True:
            await _ready(self.sock, write=False)
            try:
                data, received = fds.receive(self.sock, decoder.wanted, self.account)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return
            if not data:
                for fd in received:
                    fd.close()
                decoder.close()
                return
            for message in decoder.feed(data, received):
                await self._handle(message)
                # One message a turn of the loop: a flood of them starves no other session.
                await asyncio.sleep(0)

    async def _handle(self, message: Message) -> None:
        error: VhostpyError | None = None
        try:
            for effect in self.session.handle(message):
                await self._do(effect)
                if isinstance(effect, StartRing | StopRing):
                    await asyncio.sleep(0)  # of 256 rings: not all in one turn of the loop
        except VhostpyError as caught:
            error = caught
        except OSError as caught:
            # EMFILE, ENOMEM: the front-end asked for more than this process may have.
            error = ProtocolError(f"{self.device.name}: {message.request!r}: {caught}")
        try:
            for effect in self.session.done(message, error):
                await self._do(effect)
        finally:
            # The error refers to this frame: a cycle that would keep unused fds open.
            del error

    async def _do(self, effect: Effect) -> None:
        if isinstance(effect, Reply):
            await self._send(encode_reply(effect.request, effect.payload), effect.fds)
        elif isinstance(effect, StopRing):
            base = await self.plane.stop_ring(effect.index)
            for follow_up in self.session.ring_stopped(effect.index, base):
                await self._do(follow_up)
        elif isinstance(effect, MakeInflight):
            with self.plane.make_inflight(effect) as fd:
                for follow_up in self.session.inflight_made(effect, fd):
                    await self._do(follow_up)
        else:
            await self.plane.carry_out(effect)

    async def _send(self, data: bytes, out_fds: Any) -> None:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            while data:
                try:
                    sent = fds.send(self.sock, data, out_fds)
                except BlockingIOError:
                    await _ready(self.sock, write=True)
                    continue
                data, out_fds = data[sent:], ()


# Waiting -----------------------------------------------------------------------------


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    """Does `work` to its end, however often the caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    task.result()


async def _ready(sock: socket.socket, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    number = sock.fileno()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    if write:
        loop.add_writer(number, wake)
    else:
        loop.add_reader(number, wake)
    try:
        await future
    finally:
        if write:
            loop.remove_writer(number)
        else:
            loop.remove_reader(number)
