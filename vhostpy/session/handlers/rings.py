"""Virtqueues: size, addresses, base, eventfds, enabled or not."""

from dataclasses import replace

from vhostpy._spec import Limit
from vhostpy.errors import ProtocolError, Refused
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import Message
from vhostpy.protocol.payloads import VringState
from vhostpy.session.handlers.served import Served
from vhostpy.session.ring import VRING_F_LOG, Ring, RingEvent
from vhostpy.session.state import SessionState
from vhostpy.session.steps import (
    Reply,
    SetRingAddresses,
    SetRingBase,
    SetRingCall,
    SetRingErr,
    Steps,
)
from vhostpy.system.fds import OwnedFd


def _ring(session: SessionState, message: Message) -> Ring:
    """The ring that the message names, by the full width of its index."""
    index = message.payload.index
    if index >= len(session.rings):
        raise ProtocolError(
            f"{message.name}: ring {index}, the device has {len(session.rings)} (from 0)"
        )
    return session.rings[index]


def set_vring_num(session: SessionState, message: Message) -> Steps:
    ring, num = _ring(session, message), message.payload.num
    if not 1 <= num <= Limit.QUEUE_SIZE_MAX:
        raise ProtocolError(
            f"SET_VRING_NUM: ring {ring.index}: {num} descriptors, expected 1 to "
            f"{int(Limit.QUEUE_SIZE_MAX)}"
        )
    if ring.started:
        if num == ring.num:
            return
        raise Refused(
            f"SET_VRING_NUM: ring {ring.index}: {num} descriptors while it runs with {ring.num}"
        )
    ring.num = num
    ring.check(session.packed)
    yield from session.settle(ring)


def set_vring_addr(session: SessionState, message: Message) -> Steps:
    ring, address = _ring(session, message), message.payload
    if address.flags & ~VRING_F_LOG:
        raise Refused(f"SET_VRING_ADDR: ring {ring.index}: unknown flags {address.flags:#x}")
    moved = replace(ring)
    moved.set_addresses(address)
    moved.check(session.packed)
    if ring.started:
        session.demand_mapped(moved)
        yield SetRingAddresses(ring.index, address)
    ring.set_addresses(address)
    yield from session.settle(ring)


def set_vring_base(session: SessionState, message: Message) -> Steps:
    ring, base = _ring(session, message), message.payload.num
    if session.packed is False and base > 0xFFFF:
        raise ProtocolError(f"SET_VRING_BASE: ring {ring.index}: base {base}, at most 65535")
    if ring.started:
        yield SetRingBase(ring.index, base)
    ring.base = base


def get_vring_base(session: SessionState, message: Message) -> Steps:
    ring = _ring(session, message)
    base = yield from ring.advance(RingEvent.STOP)
    if base is not None:
        ring.base = base
    ring.close_kick()
    yield Reply.pack(message.request, VringState(ring.index, session.base_of(ring)))


def set_vring_kick(session: SessionState, message: Message) -> Steps:
    ring, fd = _ring(session, message), _fd(message)
    yield from ring.advance(RingEvent.KICK, fd)
    ring.replace("kick", _moved(fd))
    yield from session.settle(ring)


def set_vring_call(session: SessionState, message: Message) -> Steps:
    ring, fd = _ring(session, message), _fd(message)
    if ring.started:
        yield SetRingCall(ring.index, fd)
    ring.replace("call", _moved(fd))


def set_vring_err(session: SessionState, message: Message) -> Steps:
    ring, fd = _ring(session, message), _fd(message)
    if ring.started:
        yield SetRingErr(ring.index, fd)
    ring.replace("err", _moved(fd))


def set_vring_enable(session: SessionState, message: Message) -> Steps:
    ring, num = _ring(session, message), message.payload.num
    if num > 1:
        raise ProtocolError(f"SET_VRING_ENABLE: ring {ring.index}: {num}, expected 0 or 1")
    yield from session.enable([ring], bool(num))


def _fd(message: Message) -> OwnedFd | None:
    return message.fds[0] if message.fds else None


def _moved(fd: OwnedFd | None) -> OwnedFd | None:
    return None if fd is None else fd.move()


# Requests ------------------------------------------------------------------------------

SERVED: dict[int, Served] = {
    R.SET_VRING_NUM: Served(set_vring_num),
    R.SET_VRING_ADDR: Served(set_vring_addr),
    R.SET_VRING_BASE: Served(set_vring_base),
    R.GET_VRING_BASE: Served(get_vring_base),
    R.SET_VRING_KICK: Served(set_vring_kick),
    R.SET_VRING_CALL: Served(set_vring_call),
    R.SET_VRING_ERR: Served(set_vring_err),
    R.SET_VRING_ENABLE: Served(set_vring_enable),
}
