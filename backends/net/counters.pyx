"""What a queue pair has done so far, as workers count it."""
from libc.stdint cimport uint64_t

from vhostpy import _ring
from vhostpy.vswitch import port


cdef dict counters_of(const QueueCounters *sent, const QueueCounters *received,
                      const uint64_t *bad_chains, const uint64_t *bad_buffers):
    # Users' words: the switch counts frames in and out of it.
    return {
        "from_guest_packets": sent.frames_in,
        "from_guest_bytes": sent.bytes_in,
        "to_guest_packets": received.frames_out,
        "to_guest_bytes": received.bytes_out,
        "drops": {name: sent.drops[i] + received.drops[i] for i, name in DROP_NAMES},
        "chain_faults": {name: bad_chains[i] for i, name in FAULT_NAMES},
        "buffer_faults": {name: bad_buffers[i] for i, name in FAULT_NAMES},
    }


cdef str drop_name(int reason):
    return DROP_NAMES[reason][1]


def names_of(kinds, prefix: str) -> list[tuple[int, str]]:
    """(number, name) of an enum's members as `status` calls them."""
    return [(int(kind), kind.name.removeprefix(prefix).lower())
            for kind in kinds if kind.name.startswith(prefix)]


DROP_NAMES = names_of(port.Drop, "DROP_")
FAULT_NAMES = [pair for pair in names_of(_ring.ChainFault, "CHAIN_") if 0 < pair[0] < 8
               and pair[1] != "faults"]
