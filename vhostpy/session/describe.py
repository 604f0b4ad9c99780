"""How far a session is, in words and figures, for `status`. Changes nothing."""

from typing import Any

from vhostpy._spec import Feature
from vhostpy.protocol.names import feature_names, listed, protocol_feature_names
from vhostpy.session.peername import share_hint
from vhostpy.session.state import SessionState


def describe(session: SessionState) -> dict[str, Any]:
    """Plain types under stable keys; `handshake` and `waits_for` are for people."""
    handshake, waits_for = _progress(session)
    features = session.features or 0
    return {
        "front_end": session.front_end,
        "handshake": handshake,
        "waits_for": waits_for,
        "features": feature_names(features, session.device.kind),
        "protocol_features": protocol_feature_names(session.protocol_features),
        "memory_regions": len(session.regions),
        "memory_size_bytes": sum(region.size for region in session.regions),
        "dirty_log": session.logging and bool(features >> Feature.LOG_ALL & 1),
        "device_status": session.device_status,
        "refused": dict(session.refused),
        "rings": [
            {
                "index": ring.index,
                "state": "broken" if ring.broken else ring.state.value,
                "enabled": ring.enabled,
                "size": ring.num,
                "base": session.base_of(ring),
                "poll": ring.poll,
                "broken": ring.broken,
                "waits_for": "" if ring.started else session.missing(ring),
            }
            for ring in session.rings
            if ring.touched
        ],
    }


def _progress(session: SessionState) -> tuple[str, str]:
    """Where it stands, and what it waits for ("" for nothing)."""
    if session.ended:
        return "ended", ""
    if not session.messages:
        return "connected", "the first message"
    started = [ring for ring in session.rings if ring.started]
    running = [ring for ring in started if not ring.broken]
    broken = [ring for ring in started if ring.broken]
    pending = [f"ring {ring.index}: {ring.broken}" for ring in broken]
    pending += [
        f"ring {ring.index}: {session.missing(ring)}"
        for ring in session.rings
        if ring.touched and not ring.started
    ]
    if started:
        disabled = [ring.index for ring in running if not ring.enabled]
        if disabled:
            pending.append(f"rings {listed(disabled)}: SET_VRING_ENABLE")
        where = [f"ready: rings {listed(ring.index for ring in running)} run"] if running else []
        where += [f"broken: rings {listed(ring.index for ring in broken)}"] if broken else []
        return ", ".join(where), "; ".join(pending)
    if session.features is None:
        return "negotiating", "SET_FEATURES"
    if not session.regions:
        return "negotiated", f"SET_MEM_TABLE; {share_hint(session.front_end)}"
    return "memory shared", "; ".join(pending) or "SET_VRING_KICK"
