"""Where a session stands, in words and figures, for `status` and for error texts.

Reads a session; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vhostpy._spec import Feature, ProtocolFeature

if TYPE_CHECKING:
    from vhostpy.session import Session

SHARE_ON = "give QEMU -object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem"


def describe(session: Session) -> dict[str, Any]:
    """Plain types under stable keys; `handshake` and `waits_for` are for people."""
    handshake, waits_for = _progress(session)
    features = session.features or 0
    return {
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
                "state": ring.state.value,
                "enabled": ring.enabled,
                "size": ring.num,
                "base": session.base_of(ring),
                "poll": ring.poll,
                "waits_for": "" if ring.started else session.missing(ring),
            }
            for ring in session.rings
            if ring.touched
        ],
    }


def _progress(session: Session) -> tuple[str, str]:
    """Where it stands, and what comes next ("" when nothing has to)."""
    if session.ended:
        return "ended", ""
    if not session.messages:
        return "connected", "waiting for the first message"
    running = [ring for ring in session.rings if ring.started]
    pending = [
        f"ring {ring.index}: waits for {session.missing(ring)}"
        for ring in session.rings
        if ring.touched and not ring.started
    ]
    if running:
        disabled = [ring.index for ring in running if not ring.enabled]
        if disabled:
            pending.append(f"rings {listed(disabled)}: wait for SET_VRING_ENABLE")
        return f"ready: rings {listed(ring.index for ring in running)} run", "; ".join(pending)
    if session.features is None:
        return "negotiating", "waiting for SET_FEATURES"
    if not session.regions:
        return "negotiated", f"waiting for SET_MEM_TABLE; {SHARE_ON}"
    return "memory shared", "; ".join(pending) or "waiting for SET_VRING_KICK"


def feature_names(mask: int, kind: str) -> list[str]:
    """Names of virtio's feature bits for a device type: low bits differ between types."""
    own = kind.upper() + "_"
    foreign = tuple(prefix for prefix in ("NET_", "BLK_") if prefix != own)
    names = {
        int(bit): name.removeprefix(own)
        for name, bit in Feature.__members__.items()
        if not name.startswith(foreign)
    }
    return _names(mask, names)


def protocol_feature_names(mask: int) -> list[str]:
    """Names of vhost-user's protocol features."""
    return _names(mask, {int(bit): name for name, bit in ProtocolFeature.__members__.items()})


def listed(indexes: Iterable[int]) -> str:
    """Ring numbers for a text."""
    return ", ".join(map(str, indexes))


def _names(mask: int, names: dict[int, str]) -> list[str]:
    return [names.get(bit, f"bit {bit}") for bit in range(64) if mask >> bit & 1]
