"""Names of feature bits, chain faults and rings, for `status` and for error texts."""

from collections.abc import Iterable
from enum import IntFlag

from vhostpy._spec import Feature, ProtocolFeature


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


def fault_name(fault: IntFlag) -> str:
    """A ChainFault's name, as counters have it."""
    return (fault.name or "").removeprefix("CHAIN_").lower()


def listed(indexes: Iterable[int]) -> str:
    """Ring numbers for a text."""
    return ", ".join(map(str, indexes))


def _names(mask: int, names: dict[int, str]) -> list[str]:
    return [names.get(bit, f"bit {bit}") for bit in range(64) if mask >> bit & 1]
