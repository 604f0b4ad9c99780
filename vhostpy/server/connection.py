"""One front-end's session on a connected socket.

The only module that waits for a front-end. Bytes go to the codec, messages to the session,
whose steps are driven here and nowhere else: the data plane carries them out, but for those
that concern the front-end itself.
"""

import asyncio
import socket
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from vhostpy._spec import ProtocolFeature
from vhostpy.device.device import Device
from vhostpy.errors import ProtocolError, VhostpyError
from vhostpy.protocol.codec import BackEndRequest, Decoder, Message, encode_reply
from vhostpy.server.channel import Channel
from vhostpy.server.plane import DataPlane
from vhostpy.session.peername import peer_name
from vhostpy.session.session import Session
from vhostpy.session.steps import Expect, Reply, SetBackendChannel, Step
from vhostpy.system import fds
from vhostpy.system.account import Account
from vhostpy.system.aside import outlast

# A front-end that takes none of our replies for so long has hung.
SEND_TIMEOUT_S = 10.0
# What ended sessions does so no more, once one has lasted for so long.
SETTLED_S = 1.0


class Connection:
    """One front-end's session on a connected socket."""

    # Sessions whose rings and memory have to be looked at when a bell sounds.
    open: ClassVar[weakref.WeakSet["Connection"]] = weakref.WeakSet()

    def __init__(self, device: Device, sock: socket.socket, account: Account) -> None:
        self.device = device
        self.sock = sock
        self.account = account
        self.session = Session(device)
        self.session.front_end = peer_name(sock)
        self.plane = DataPlane(device, self.session, account.calls)
        self.channel = Channel(device.name, self.fail)
        self._decoder = Decoder()
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
        self.channel.close()
        try:
            await self.plane.close()
        finally:
            # Not sooner: a front-end that is hung up on goes on from where the rings stand.
            fds.close_socket(self.sock, self.account)
            self.session.close()
            self._decoder.close()

    def on_bell(self) -> None:
        """Called when a worker or a contained fault sounds the bell."""
        self.device.on_bell()
        try:
            self.plane.on_bell()
        except VhostpyError as error:
            self.fail(error)

    def fail(self, error: VhostpyError) -> None:
        """Ends the session, for a reason that no message has."""
        if not self._failure.done():
            self._failure.set_exception(error.with_traceback(None))

    def tell_config_changed(self) -> bool:
        """Has the front-end read the config space anew; False: there is no way to tell it.

        Source: vhost-user, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG. No answer is asked for.
        """
        return bool(self.session.protocol(ProtocolFeature.CONFIG)) and self.channel.tell(
            BackEndRequest.CONFIG_CHANGE_MSG
        )

    # Messages --------------------------------------------------------------------------

    async def _read(self) -> None:
        while (message := await self._receive()) is not None:
            await self._handle(message)
            # One message a turn of the loop: a flood of them starves no other session.
            await asyncio.sleep(0)

    async def _receive(self) -> Message | None:
        """The front-end's next message; None where it has gone."""
        while True:
            await _ready(self.sock, write=False)
            try:
                data, received = fds.receive(self.sock, self._decoder.wanted, self.account)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return None
            if not data:
                fds.close_all(received)
                self._decoder.close()
                return None
            # Of so few bytes: one at most.
            for message in self._decoder.feed(data, received):
                return message

    async def _handle(self, message: Message) -> None:
        """Drives the steps of `message` to their end, or closes them."""
        steps = self.session.handle(message)
        try:
            step = next(steps)
            while True:
                failed: VhostpyError
                try:
                    result = await self._carry_out(step)
                except VhostpyError as error:
                    failed = error
                except OSError as error:
                    # EMFILE, ENOMEM: the front-end asked for more than this process may have.
                    failed = ProtocolError(f"{self.device.name}: {message.request!r}: {error}")
                else:
                    step = steps.send(result)
                    continue
                try:
                    step = steps.throw(failed)
                finally:
                    # It refers to this frame: a cycle that would keep unused fds open.
                    del failed
        except StopIteration:
            pass
        finally:
            steps.close()

    async def _carry_out(self, step: Step[Any]) -> Any:
        match step:
            case Reply(request, payload, out_fds):
                return await self._send(encode_reply(request, payload), out_fds)
            case Expect(request, payload):
                self._decoder.expect(request, payload)
                message = await self._receive()
                if message is None:
                    name = self._decoder.direction.name(request)
                    raise ProtocolError(f"the front-end went, expected {name}")
                return message.payload
            case SetBackendChannel(fd):
                return self.channel.open(fd)
        return await self.plane.carry_out(step)

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
    if await outlast(task):
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
