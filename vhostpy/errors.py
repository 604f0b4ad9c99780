"""Errors, typed by who must act. Text: where, what with both values; `hint`: what next."""

# The hint for all that comes of guest memory which is not shared.
SHARE_ON = "give QEMU -object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem"
# The same where some memory is shared, and some is not.
SHARE_ALL = "give share=on to every memory backend of the guest, those of pc-dimm devices too"
# Of an eventfd that two processes have: its O_NONBLOCK is both's.
LEAVE_NON_BLOCKING = "the other end is at fault: it must leave shared eventfds non-blocking"


class VhostpyError(Exception):
    """Base of all that vhostpy raises on purpose; `hint` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n  next: {self.hint}" if self.hint else text


class ProtocolError(VhostpyError):
    """The front-end broke the protocol; ends its session."""


class Refused(ProtocolError):
    """The front-end asked for what we do not do. REPLY_ACK says so; without it the session ends."""


class GuestError(VhostpyError):
    """The guest's driver broke its rings or its memory is gone; ends its session or its ring."""


class ConfigError(VhostpyError):
    """The operator must change something: an argument, a file, a permission."""
