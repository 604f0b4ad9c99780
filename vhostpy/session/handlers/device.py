"""The device: config space, status, reset, and what only network devices have."""

import sys

from vhostpy._spec import ProtocolFeature as F
from vhostpy.errors import ProtocolError, Refused
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import Message
from vhostpy.protocol.payloads import CONFIG_SIZE_MAX, U64, Config
from vhostpy.session.handlers.served import Served
from vhostpy.session.ring import RingEvent
from vhostpy.session.state import SessionState
from vhostpy.session.steps import Reply, SendRarp, SetMtu, Steps, WriteConfig

MTU_MIN, MTU_MAX = 68, 65535  # virtio 1.3, "Network Device / Device configuration layout"


def get_config(session: SessionState, message: Message) -> Steps:
    asked = message.payload
    if not asked.size or asked.offset + asked.size > CONFIG_SIZE_MAX:
        raise Refused(
            f"GET_CONFIG: {asked.size} bytes at {asked.offset}, the config space has "
            f"{CONFIG_SIZE_MAX}"
        )
    # SPDK's initiator asks for 256 bytes whatever the device has, and wants as many.
    space = session.device.config().ljust(CONFIG_SIZE_MAX, b"\0")
    data = space[asked.offset : asked.offset + asked.size]
    yield Reply.pack(message.request, Config(asked.offset, asked.flags, data))


def set_config(session: SessionState, message: Message) -> Steps:
    config, size = message.payload, len(session.device.config())
    if config.flags > 1:
        raise ProtocolError(f"SET_CONFIG: flags {config.flags:#x}, expected 0 or 1")
    if not config.size or config.offset + config.size > size:
        raise Refused(
            f"SET_CONFIG: {config.size} bytes at {config.offset}, the config space has {size}"
        )
    yield WriteConfig(config.offset, config.data)


def net_set_mtu(session: SessionState, message: Message) -> Steps:
    mtu = message.payload.value
    if not MTU_MIN <= mtu <= MTU_MAX:
        raise Refused(f"NET_SET_MTU: {mtu}, expected {MTU_MIN} to {MTU_MAX}")
    yield SetMtu(mtu)


def send_rarp(session: SessionState, message: Message) -> Steps:
    # "The first 6 bytes of the payload contain the mac address of the guest."
    yield SendRarp(message.payload.value.to_bytes(8, sys.byteorder)[:6])


def get_status(session: SessionState, message: Message) -> Steps:
    yield Reply.pack(message.request, U64(session.device_status))


def set_status(session: SessionState, message: Message) -> Steps:
    status = message.payload.value
    if status > 0xFF:
        raise ProtocolError(f"SET_STATUS: {status:#x}, virtio's device status has 8 bits")
    session.device_status = status
    yield from ()


def reset_device(session: SessionState, message: Message) -> Steps:
    for ring in session.rings:
        yield from ring.advance(RingEvent.STOP)
        ring.close_kick()
        ring.reset()
    # Memory stays: QEMU sends only what changed since, where slots are negotiated.
    session.features = None
    session.device_status = 0


# Requests ------------------------------------------------------------------------------

SERVED: dict[int, Served] = {
    R.SEND_RARP: Served(send_rarp, offered=F.RARP),
    R.NET_SET_MTU: Served(net_set_mtu, offered=F.MTU),
    R.GET_CONFIG: Served(get_config, negotiated=F.CONFIG),
    R.SET_CONFIG: Served(set_config, negotiated=F.CONFIG),
    R.RESET_DEVICE: Served(reset_device, offered=F.RESET_DEVICE),
    R.SET_STATUS: Served(set_status, negotiated=F.STATUS),
    R.GET_STATUS: Served(get_status, negotiated=F.STATUS),
}
