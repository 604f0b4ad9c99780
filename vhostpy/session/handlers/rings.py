"""Virtqueues: size, addresses, base, eventfds, enabled or not."""

from vhostpy._spec import Limit
from vhostpy.errors import ProtocolError, Refused
from vhostpy.protocol.codec import Message
from vhostpy.protocol.payloads import VringState
from vhostpy.session.effects import (
    Effect,
    Reply,
    SetRingAddresses,
    SetRingBase,
    SetRingCall,
    SetRingErr,
)
from vhostpy.session.ring import Ring, RingEvent, StopReason
from vhostpy.session.state import SessionState
from vhostpy.system.fds import OwnedFd

VRING_F_LOG = 1  # "A vring address description"


def _ring(session: SessionState, message: Message) -> Ring:
    """The ring that the message names, by the full width of its index."""
    index = message.payload.index
    if index >= len(session.rings):
        raise ProtocolError(
            f"{message.name}: ring {index}, the device has {len(session.rings)} (from 0)"
        )
    return session.rings[index]


def set_vring_num(session: SessionState, message: Message) -> list[Effect]:
    ring, num = _ring(session, message), message.payload.num
    if not 1 <= num <= Limit.QUEUE_SIZE_MAX:
        raise ProtocolError(
            f"SET_VRING_NUM: ring {ring.index}: {num} descriptors, expected 1 to "
            f"{int(Limit.QUEUE_SIZE_MAX)}"
        )
    if ring.started:
        if num == ring.num:
            return []
        raise Refused(
            f"SET_VRING_NUM: ring {ring.index}: {num} descriptors while it runs with {ring.num}"
        )
    ring.num = num
    ring.check(session.packed)
    return session.settle(ring)


def set_vring_addr(session: SessionState, message: Message) -> list[Effect]:
    ring, address = _ring(session, message), message.payload
    if address.flags & ~VRING_F_LOG:
        raise Refused(f"SET_VRING_ADDR: ring {ring.index}: unknown flags {address.flags:#x}")
    ring.set_addresses(address.desc_uva, address.avail_uva, address.used_uva)
    ring.log_used = bool(address.flags & VRING_F_LOG)
    ring.used_log_gpa = address.used_log_gpa if ring.log_used else 0
    ring.check(session.packed)
    if ring.started:
        session.demand_mapped(ring)
        return [SetRingAddresses(ring.index)]
    return session.settle(ring)


def set_vring_base(session: SessionState, message: Message) -> list[Effect]:
    ring, base = _ring(session, message), message.payload.num
    if session.packed is False and base > 0xFFFF:
        raise ProtocolError(f"SET_VRING_BASE: ring {ring.index}: base {base}, at most 65535")
    ring.base = base
    return [SetRingBase(ring.index)] if ring.started else []


def get_vring_base(session: SessionState, message: Message) -> list[Effect]:
    ring = _ring(session, message)
    effects = session.advance(ring, RingEvent.STOP, StopReason.GET_BASE)
    if effects:
        return effects  # ring_stopped() answers
    ring.close_kick()
    return [Reply.pack(message.request, VringState(ring.index, session.base_of(ring)))]


def set_vring_kick(session: SessionState, message: Message) -> list[Effect]:
    ring = _ring(session, message)
    replaced, ring.kick = ring.kick, _moved(message)
    effects = session.advance(ring, RingEvent.KICK, replaced)
    if not effects and replaced is not None:
        replaced.close()
    return effects + session.settle(ring)


def set_vring_call(session: SessionState, message: Message) -> list[Effect]:
    ring = _ring(session, message)
    replaced, ring.call = ring.call, _moved(message)
    return _replaced(ring, replaced, SetRingCall)


def set_vring_err(session: SessionState, message: Message) -> list[Effect]:
    ring = _ring(session, message)
    replaced, ring.err = ring.err, _moved(message)
    return _replaced(ring, replaced, SetRingErr)


def set_vring_enable(session: SessionState, message: Message) -> list[Effect]:
    ring, num = _ring(session, message), message.payload.num
    if num > 1:
        raise ProtocolError(f"SET_VRING_ENABLE: ring {ring.index}: {num}, expected 0 or 1")
    return session.enable(ring, bool(num))


def _moved(message: Message) -> OwnedFd | None:
    return message.fds[0].move() if message.fds else None


def _replaced(
    ring: Ring, replaced: OwnedFd | None, effect: type[SetRingCall] | type[SetRingErr]
) -> list[Effect]:
    """Of a ring that runs, the old fd is closed by who swaps it."""
    if ring.started:
        return [effect(ring.index, replaced)]
    if replaced is not None:
        replaced.close()
    return []
