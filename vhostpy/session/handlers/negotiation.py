"""Features, protocol features, owner, queues, the back-end's own channel."""

from vhostpy._spec import Feature
from vhostpy._spec import ProtocolFeature as F
from vhostpy.errors import Refused
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import Message
from vhostpy.protocol.names import feature_names, listed, protocol_feature_names
from vhostpy.protocol.payloads import U64
from vhostpy.session.handlers.served import Served
from vhostpy.session.state import SessionState
from vhostpy.session.steps import Reply, SetBackendChannel, SetFeatures, Steps

# What SET_FEATURES may change while a ring runs.
CHANGEABLE_FEATURES = 1 << Feature.LOG_ALL


def get_features(session: SessionState, message: Message) -> Steps:
    yield Reply.pack(message.request, U64(session.offered))


def set_features(session: SessionState, message: Message) -> Steps:
    features = message.payload.value
    beyond = features & ~session.offered
    if beyond:
        names = feature_names(beyond, session.device.kind)
        raise Refused(f"SET_FEATURES: not offered: {', '.join(names)}")
    changed = features ^ (session.features or 0)
    running = [ring.index for ring in session.rings if ring.started]
    if running and changed & ~CHANGEABLE_FEATURES:
        names = feature_names(changed & ~CHANGEABLE_FEATURES, session.device.kind)
        raise Refused(
            f"SET_FEATURES: {', '.join(names)} changed while rings {listed(running)} run",
            "the front-end has to stop the rings (GET_VRING_BASE) first",
        )
    yield SetFeatures(features)
    session.features = features
    session.logging = session.logging and bool(session.feature(Feature.LOG_ALL))
    if not session.feature(Feature.PROTOCOL_FEATURES):
        # "Ring states": without it all rings are enabled at once.
        yield from session.enable(session.rings, True)
    yield from session.settle_all()


def get_protocol_features(session: SessionState, message: Message) -> Steps:
    yield Reply.pack(message.request, U64(session.protocol_offered))


def set_protocol_features(session: SessionState, message: Message) -> Steps:
    beyond = message.payload.value & ~session.protocol_offered
    if beyond:
        names = protocol_feature_names(beyond)
        raise Refused(f"SET_PROTOCOL_FEATURES: not offered: {', '.join(names)}")
    session.protocol_features = message.payload.value
    yield from ()


def nothing(session: SessionState, message: Message) -> Steps:
    yield from ()


def reset_owner(session: SessionState, message: Message) -> Steps:
    # Deprecated: "either ignore this message, or use it to disable all rings". Without
    # PROTOCOL_FEATURES nothing could enable them again.
    if session.feature(Feature.PROTOCOL_FEATURES):
        yield from session.enable(session.rings, False)


def get_queue_num(session: SessionState, message: Message) -> Steps:
    yield Reply.pack(message.request, U64(session.device.queue_number))


def set_backend_req_fd(session: SessionState, message: Message) -> Steps:
    yield SetBackendChannel(message.fds[0])


# Requests ------------------------------------------------------------------------------

SERVED: dict[int, Served] = {
    R.GET_FEATURES: Served(get_features),
    R.SET_FEATURES: Served(set_features),
    R.SET_OWNER: Served(nothing),
    R.RESET_OWNER: Served(reset_owner),
    # "May be used to inform the front-end that the log has been modified": it is not.
    R.SET_LOG_FD: Served(nothing),
    R.GET_PROTOCOL_FEATURES: Served(get_protocol_features),
    R.SET_PROTOCOL_FEATURES: Served(set_protocol_features),
    R.GET_QUEUE_NUM: Served(get_queue_num, offered=F.MQ),
    R.SET_BACKEND_REQ_FD: Served(set_backend_req_fd, offered=F.BACKEND_REQ),
}
