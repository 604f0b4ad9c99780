"""What a session does for each request: one function a request, by subject.

    steps = SERVED[message.request].handler(session, message)

A handler is a generator: it checks, yields steps, and changes the session's state when they
have succeeded; it raises ProtocolError, or `Refused` where it changed nothing. The message
owns its fds until they are moved away. Each subject's table is at the end of its file.
"""

from vhostpy.protocol.codec import FRONT_END_TABLE, Message
from vhostpy.session.handlers import device, memory, negotiation, rings
from vhostpy.session.handlers.served import Served

__all__ = ["SERVED", "Served", "why_not"]

SERVED: dict[int, Served] = {
    **negotiation.SERVED,
    **memory.SERVED,
    **rings.SERVED,
    **device.SERVED,
}


def why_not(message: Message) -> str:
    """Why `message` is not served, in words."""
    known = FRONT_END_TABLE.get(message.request)
    if known is None:
        return f"{message.name}: the vhost-user document knows no such request"
    return f"{message.name}: {known.needs} is not offered"
