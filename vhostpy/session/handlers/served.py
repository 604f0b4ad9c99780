"""What handles a request, and what it takes that it may come."""

from collections.abc import Callable
from dataclasses import dataclass

from vhostpy._spec import ProtocolFeature
from vhostpy.protocol.codec import Message
from vhostpy.session.state import SessionState
from vhostpy.session.steps import Steps


@dataclass(frozen=True, slots=True)
class Served:
    """A request's handler, and the protocol feature that it needs."""

    handler: Callable[[SessionState, Message], Steps]
    offered: ProtocolFeature | None = None  # "present in GET_PROTOCOL_FEATURES"
    negotiated: ProtocolFeature | None = None  # "successfully negotiated"
