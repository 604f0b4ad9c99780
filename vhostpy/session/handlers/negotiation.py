"""Features, protocol features, owner, queues, the back-end's own channel."""

from vhostpy._spec import Feature
from vhostpy.errors import Refused
from vhostpy.protocol.codec import Message
from vhostpy.protocol.names import feature_names, listed, protocol_feature_names
from vhostpy.protocol.payloads import U64
from vhostpy.session.effects import Effect, Reply, SetBackendChannel, SetFeatures
from vhostpy.session.state import SessionState

# What SET_FEATURES may change while a ring runs.
CHANGEABLE_FEATURES = 1 << Feature.LOG_ALL


def get_features(session: SessionState, message: Message) -> list[Effect]:
    return [Reply.pack(message.request, U64(session.offered))]


def set_features(session: SessionState, message: Message) -> list[Effect]:
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
    session.features = features
    session.logging = session.logging and bool(session.feature(Feature.LOG_ALL))
    effects: list[Effect] = [SetFeatures(features)]
    if not session.feature(Feature.PROTOCOL_FEATURES):
        # "Ring states": without it all rings are enabled at once.
        for ring in session.rings:
            effects += session.enable(ring, True)
    return effects + session.settle_all()


def get_protocol_features(session: SessionState, message: Message) -> list[Effect]:
    return [Reply.pack(message.request, U64(session.protocol_offered))]


def set_protocol_features(session: SessionState, message: Message) -> list[Effect]:
    beyond = message.payload.value & ~session.protocol_offered
    if beyond:
        names = protocol_feature_names(beyond)
        raise Refused(f"SET_PROTOCOL_FEATURES: not offered: {', '.join(names)}")
    session.protocol_features = message.payload.value
    return []


def nothing(session: SessionState, message: Message) -> list[Effect]:
    return []


def reset_owner(session: SessionState, message: Message) -> list[Effect]:
    # Deprecated: "either ignore this message, or use it to disable all rings". Without
    # PROTOCOL_FEATURES nothing could enable them again.
    if not session.feature(Feature.PROTOCOL_FEATURES):
        return []
    return [effect for ring in session.rings for effect in session.enable(ring, False)]


def get_queue_num(session: SessionState, message: Message) -> list[Effect]:
    return [Reply.pack(message.request, U64(session.device.queue_number))]


def set_backend_req_fd(session: SessionState, message: Message) -> list[Effect]:
    return [SetBackendChannel(message.fds[0].move())]
