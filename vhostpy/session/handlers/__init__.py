"""What a session does for each request: one function a request, by subject.

    steps = SERVED[message.request].handler(session, message)

A handler is a generator: it checks, yields steps, and changes the session's state when they
have succeeded; it raises ProtocolError, or `Refused` where it changed nothing. The message
owns its fds until they are moved away. Not served: NOT_SERVED says why.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vhostpy._spec import ProtocolFeature
from vhostpy.protocol.codec import FrontEndRequest, Message
from vhostpy.session.handlers import device, memory, negotiation, rings
from vhostpy.session.state import SessionState
from vhostpy.session.steps import Steps


@dataclass(frozen=True, slots=True)
class Served:
    """Who handles a request, and the protocol feature that it needs."""

    handler: Callable[[SessionState, Message], Steps]
    offered: ProtocolFeature | None = None  # "present in GET_PROTOCOL_FEATURES"
    negotiated: ProtocolFeature | None = None  # "successfully negotiated"


_R, _F = FrontEndRequest, ProtocolFeature

SERVED: dict[int, Served] = {
    _R.GET_FEATURES: Served(negotiation.get_features),
    _R.SET_FEATURES: Served(negotiation.set_features),
    _R.SET_OWNER: Served(negotiation.nothing),
    _R.RESET_OWNER: Served(negotiation.reset_owner),
    _R.SET_MEM_TABLE: Served(memory.set_mem_table),
    _R.SET_LOG_BASE: Served(memory.set_log_base),
    # "May be used to inform the front-end that the log has been modified": it is not.
    _R.SET_LOG_FD: Served(negotiation.nothing),
    _R.SET_VRING_NUM: Served(rings.set_vring_num),
    _R.SET_VRING_ADDR: Served(rings.set_vring_addr),
    _R.SET_VRING_BASE: Served(rings.set_vring_base),
    _R.GET_VRING_BASE: Served(rings.get_vring_base),
    _R.SET_VRING_KICK: Served(rings.set_vring_kick),
    _R.SET_VRING_CALL: Served(rings.set_vring_call),
    _R.SET_VRING_ERR: Served(rings.set_vring_err),
    _R.GET_PROTOCOL_FEATURES: Served(negotiation.get_protocol_features),
    _R.SET_PROTOCOL_FEATURES: Served(negotiation.set_protocol_features),
    _R.GET_QUEUE_NUM: Served(negotiation.get_queue_num, offered=_F.MQ),
    _R.SET_VRING_ENABLE: Served(rings.set_vring_enable),
    _R.SEND_RARP: Served(device.send_rarp, offered=_F.RARP),
    _R.NET_SET_MTU: Served(device.net_set_mtu, offered=_F.MTU),
    _R.SET_BACKEND_REQ_FD: Served(negotiation.set_backend_req_fd, offered=_F.BACKEND_REQ),
    _R.GET_CONFIG: Served(device.get_config, negotiated=_F.CONFIG),
    _R.SET_CONFIG: Served(device.set_config, negotiated=_F.CONFIG),
    _R.RESET_DEVICE: Served(device.reset_device, offered=_F.RESET_DEVICE),
    _R.GET_MAX_MEM_SLOTS: Served(memory.get_max_mem_slots, negotiated=_F.CONFIGURE_MEM_SLOTS),
    _R.ADD_MEM_REG: Served(memory.add_mem_reg, negotiated=_F.CONFIGURE_MEM_SLOTS),
    _R.REM_MEM_REG: Served(memory.rem_mem_reg, negotiated=_F.CONFIGURE_MEM_SLOTS),
    _R.GET_INFLIGHT_FD: Served(memory.get_inflight_fd, offered=_F.INFLIGHT_SHMFD),
    _R.SET_INFLIGHT_FD: Served(memory.set_inflight_fd, offered=_F.INFLIGHT_SHMFD),
    _R.SET_STATUS: Served(device.set_status, negotiated=_F.STATUS),
    _R.GET_STATUS: Served(device.get_status, negotiated=_F.STATUS),
}

# What is not, and the feature that would have to be offered for it.
NOT_SERVED: dict[int, str] = {
    _R.IOTLB_MSG: "feature ACCESS_PLATFORM",
    _R.SET_VRING_ENDIAN: "protocol feature CROSS_ENDIAN",
    _R.CREATE_CRYPTO_SESSION: "protocol feature CRYPTO_SESSION",
    _R.CLOSE_CRYPTO_SESSION: "protocol feature CRYPTO_SESSION",
    _R.POSTCOPY_ADVISE: "protocol feature PAGEFAULT",
    _R.POSTCOPY_LISTEN: "protocol feature PAGEFAULT",
    _R.POSTCOPY_END: "protocol feature PAGEFAULT",
    _R.GPU_SET_SOCKET: "a graphics device",
    _R.VRING_KICK: "protocol feature INBAND_NOTIFICATIONS",
    _R.GET_SHARED_OBJECT: "protocol feature SHARED_OBJECT",
    _R.SET_DEVICE_STATE_FD: "protocol feature DEVICE_STATE",
    _R.CHECK_DEVICE_STATE: "protocol feature DEVICE_STATE",
    _R.GET_SHMEM_CONFIG: "protocol feature SHMEM",
    _R.GET_VRING_BASE_SKIP_DRAIN: "protocol feature GET_VRING_BASE_SKIP_DRAIN",
}


def why_not(message: Message) -> str:
    """Why `message` is not served, in words."""
    needs = NOT_SERVED.get(message.request)
    if needs is None:
        return f"{message.name}: the vhost-user document knows no such request"
    return f"{message.name}: {needs} is not offered"
