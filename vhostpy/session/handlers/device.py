"""The device: config space, status, reset, and what only network devices have."""

import sys

from vhostpy.errors import ProtocolError, Refused
from vhostpy.protocol.codec import Message
from vhostpy.protocol.payloads import CONFIG_SIZE_MAX, U64, Config
from vhostpy.session.effects import (
    Effect,
    Reply,
    ResetDevice,
    SendRarp,
    SetMtu,
    SetStatus,
    WriteConfig,
)
from vhostpy.session.ring import RingEvent, StopReason
from vhostpy.session.state import SessionState

MTU_MIN, MTU_MAX = 68, 65535  # virtio 1.3, "Network Device / Device configuration layout"


def get_config(session: SessionState, message: Message) -> list[Effect]:
    asked = message.payload
    if not asked.size or asked.offset + asked.size > CONFIG_SIZE_MAX:
        raise Refused(
            f"GET_CONFIG: {asked.size} bytes at {asked.offset}, the config space has "
            f"{CONFIG_SIZE_MAX}"
        )
    # SPDK's initiator asks for 256 bytes whatever the device has, and wants as many.
    space = session.device.config().ljust(CONFIG_SIZE_MAX, b"\0")
    data = space[asked.offset : asked.offset + asked.size]
    return [Reply.pack(message.request, Config(asked.offset, asked.flags, data))]


def set_config(session: SessionState, message: Message) -> list[Effect]:
    config, size = message.payload, len(session.device.config())
    if config.flags > 1:
        raise ProtocolError(f"SET_CONFIG: flags {config.flags:#x}, expected 0 or 1")
    if not config.size or config.offset + config.size > size:
        raise Refused(
            f"SET_CONFIG: {config.size} bytes at {config.offset}, the config space has {size}"
        )
    return [WriteConfig(config.offset, config.data, migration=bool(config.flags))]


def net_set_mtu(session: SessionState, message: Message) -> list[Effect]:
    mtu = message.payload.value
    if not MTU_MIN <= mtu <= MTU_MAX:
        raise Refused(f"NET_SET_MTU: {mtu}, expected {MTU_MIN} to {MTU_MAX}")
    return [SetMtu(mtu)]


def send_rarp(session: SessionState, message: Message) -> list[Effect]:
    # "The first 6 bytes of the payload contain the mac address of the guest."
    return [SendRarp(message.payload.value.to_bytes(8, sys.byteorder)[:6])]


def get_status(session: SessionState, message: Message) -> list[Effect]:
    return [Reply.pack(message.request, U64(session.device_status))]


def set_status(session: SessionState, message: Message) -> list[Effect]:
    status = message.payload.value
    if status > 0xFF:
        raise ProtocolError(f"SET_STATUS: {status:#x}, virtio's device status has 8 bits")
    session.device_status = status
    return [SetStatus(status)]


def reset_device(session: SessionState, message: Message) -> list[Effect]:
    effects: list[Effect] = []
    for ring in session.rings:
        stop = session.advance(ring, RingEvent.STOP, StopReason.RESET)
        if not stop:
            ring.close_kick()
        effects += stop
        ring.reset()
    # Memory stays: QEMU sends only what changed since, where slots are negotiated.
    session.features = None
    session.device_status = 0
    return [*effects, ResetDevice()]
