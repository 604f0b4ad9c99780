"""The back-end's state machine: a message in, steps out. No I/O.

    steps = session.handle(message)     # a generator: next() has its first step
    steps.send(result)                  # of that step; has the next one
    steps.throw(error)                  # where the step failed
    steps.close()                       # where there is nobody any more to tell

The session checks sense: order, features, ranges. What it holds (`rings`, `regions`,
`features`) changes when a step has succeeded. A step that fails ends the session, unless the
device refuses it (`Refused`), which has changed nothing. One message at a time.

Source: QEMU, docs/interop/vhost-user.rst; sections are named where a rule comes from one.
"""

import logging
from typing import Any

from vhostpy._spec import ProtocolFeature
from vhostpy.errors import SHARE_ON, ProtocolError, Refused, VhostpyError
from vhostpy.protocol.codec import FRONT_END_TABLE, UNKNOWN, FrontEndRequest, Message
from vhostpy.protocol.payloads import U64, Empty, Payload
from vhostpy.session.describe import describe
from vhostpy.session.handlers import SERVED, why_not
from vhostpy.session.peername import share_hint
from vhostpy.session.state import SessionState
from vhostpy.session.steps import Reply, Steps

log = logging.getLogger("vhostpy")


class Session(SessionState):
    """One front-end's session with one device."""

    # Doors -----------------------------------------------------------------------------

    def handle(self, message: Message) -> Steps:
        """The steps of `message`, its answer the last one. Closes what it leaves of the fds.

        An error is raised again when the session is over: always unless it is `Refused`,
        and also then when the message has no answer that says no.
        """
        try:
            try:
                yield from self._serve(message)
            finally:
                message.close()
        except VhostpyError as error:
            payload = self._no(message)
            self._note(message, error, answered=payload is not None)
            if payload is not None:
                yield Reply.pack(message.request, payload)
            if self.ended:
                raise
            return
        payload = self._yes(message)
        if payload is not None:
            yield Reply.pack(message.request, payload)

    def _serve(self, message: Message) -> Steps:
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
        yield from served.handler(self, message)

    def _note(self, message: Message, error: VhostpyError, *, answered: bool) -> None:
        """What becomes of the session after an error: it is over, or one more was refused."""
        # The data plane maps memory, and does not know which program has sent it.
        error.hint = error.hint.replace(SHARE_ON, share_hint(self.front_end))
        if not answered or not isinstance(error, Refused):
            self.ended = str(error.args[0])
            return
        # One name for all that is unknown, and only the first of a kind is logged: a
        # front-end must fill neither our memory nor the operator's disk.
        name = message.name if message.request in FRONT_END_TABLE else "unknown request"
        self.refused[name] += 1
        if self.refused[name] == 1:
            log.warning("%s: refused: %s", self.device.name, error)

    def close(self) -> None:
        """Closes all fds; the rings were stopped before."""
        for ring in self.rings:
            ring.close()

    def status(self) -> dict[str, Any]:
        """How far the handshake is and what it waits for, in words; and the details."""
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
