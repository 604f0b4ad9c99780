"""The back-end's state machine: messages in, effects out. No I/O.

    for effect in session.handle(message):
        carry it out                        # StopRing: then session.ring_stopped(index, base)
    for effect in session.done(message, error or None):
        carry it out                        # the answer; raises where the session is over

The session checks sense: order, features, ranges. What it holds (`rings`, `regions`,
`features`) is changed by `handle`, before the effects are carried out: an effect that
fails ends the session, unless the device refuses it (`Refused`), which changes nothing here.

Source: QEMU, docs/interop/vhost-user.rst; sections are named where a rule comes from one.
"""

import logging
from collections.abc import Iterator
from typing import Any

from vhostpy._spec import ProtocolFeature
from vhostpy.errors import SHARE_ON, ProtocolError, Refused, VhostpyError
from vhostpy.protocol.codec import FRONT_END_TABLE, UNKNOWN, FrontEndRequest, Message
from vhostpy.protocol.payloads import U64, Empty, Inflight, Payload, VringState
from vhostpy.session.describe import describe
from vhostpy.session.effects import Effect, MakeInflight, Reply
from vhostpy.session.handlers import SERVED, why_not
from vhostpy.session.peername import share_hint
from vhostpy.session.ring import StopReason
from vhostpy.session.state import SessionState
from vhostpy.system.fds import OwnedFd

log = logging.getLogger("vhostpy")


class Session(SessionState):
    """One front-end's session with one device."""

    # Doors -----------------------------------------------------------------------------

    def handle(self, message: Message) -> list[Effect]:
        """What `message` changes. Raises ProtocolError; `done` is called in any case."""
        if self.ended:
            raise ProtocolError(f"{message.name} after the session ended: {self.ended}")
        self.messages += 1
        served = SERVED.get(message.request)
        if served is None:
            raise Refused(why_not(message))
        for feature, offer, verb in (
            (served.offered, self.protocol_offered, "offered"),
            (served.negotiated, self.protocol_features, "negotiated"),
        ):
            if feature is not None and not offer >> feature & 1:
                raise Refused(f"{message.name}: protocol feature {feature.name} was not {verb}")
        return served.handler(self, message)

    def done(self, message: Message, error: VhostpyError | None = None) -> Iterator[Effect]:
        """The answer that `message` still needs, after its effects: to be iterated.

        An error is raised again when the session is over: always unless it is `Refused`,
        and also then when the message has no answer that says no.
        """
        message.close()
        if error is None:
            payload = self._yes(message)
            if payload is not None:
                yield Reply.pack(message.request, payload)
            return
        # Who maps memory does not know who sent it.
        error.hint = error.hint.replace(SHARE_ON, share_hint(self.front_end))
        payload = self._no(message)
        if payload is None or not isinstance(error, Refused):
            self.ended = str(error.args[0])
        else:
            # One name for all that is unknown, and only the first of a kind is logged: a
            # front-end must fill neither our memory nor the operator's disk.
            name = message.name if message.request in FRONT_END_TABLE else "unknown request"
            self.refused[name] += 1
            if self.refused[name] == 1:
                log.warning("%s: refused: %s", self.device.name, error)
        if payload is not None:
            yield Reply.pack(message.request, payload)
        if self.ended:
            try:
                raise error
            finally:
                # No cycle of frame and traceback: fds in the frames are closed at once.
                del error

    def ring_stopped(self, index: int, base: int) -> list[Effect]:
        """A StopRing was carried out; the ring would go on at `base`."""
        ring = self.rings[index]
        reason, ring.stop_reason = ring.stop_reason, None
        if reason is not StopReason.RESET:
            ring.base = base
        if reason is not StopReason.UNMAPPED:
            ring.close_kick()
        if reason is StopReason.GET_BASE:
            request = FrontEndRequest.GET_VRING_BASE
            return [Reply.pack(request, VringState(index, self.base_of(ring)))]
        return []

    def inflight_made(self, made: MakeInflight, fd: OwnedFd) -> list[Effect]:
        """A MakeInflight was carried out; the front-end gets `fd`."""
        payload = Inflight(made.size, 0, made.num_queues, made.queue_size)
        return [Reply.pack(FrontEndRequest.GET_INFLIGHT_FD, payload, fd)]

    def close(self) -> None:
        """Closes all fds; the rings were stopped before."""
        for ring in self.rings:
            ring.close()

    def status(self) -> dict[str, Any]:
        """Where the handshake stands and what it waits for, in words; and the details."""
        return describe(self)

    # Answers ---------------------------------------------------------------------------

    def _wants_ack(self, message: Message) -> bool:
        """ "VHOST_USER_PROTOCOL_F_REPLY_ACK": for messages without an answer of their own."""
        return message.need_reply and bool(self.protocol(ProtocolFeature.REPLY_ACK))

    def _yes(self, message: Message) -> Payload | None:
        if FRONT_END_TABLE[message.request].replies:
            return None  # answered by its handler
        if self._wants_ack(message):
            return U64(0)
        # "Communication": needs a reply with LOG_SHMFD, or QEMU waits for ever.
        if message.request == FrontEndRequest.SET_LOG_BASE:
            return Empty()
        return None

    def _no(self, message: Message) -> Payload | None:
        known = FRONT_END_TABLE.get(message.request, UNKNOWN)
        if known.replies:
            return known.refusal
        return U64(1) if self._wants_ack(message) else None
