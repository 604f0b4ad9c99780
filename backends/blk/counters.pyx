"""What a disk's queue has done so far, as its worker counts it."""
from vhostpy.system.hw cimport read_once_u64

from vhostpy._ring import ChainFault
from vhostpy.protocol.names import fault_name


cdef dict counters_of(const BlkCounters *counts):
    return {
        "reads": read_once_u64(&counts.reads),
        "read_bytes": read_once_u64(&counts.read_bytes),
        "writes": read_once_u64(&counts.writes),
        "write_bytes": read_once_u64(&counts.write_bytes),
        "flushes": read_once_u64(&counts.flushes),
        "discards": read_once_u64(&counts.discards),
        "write_zeroes": read_once_u64(&counts.write_zeroes),
        "secure_erases": read_once_u64(&counts.secure_erases),
        "get_ids": read_once_u64(&counts.get_ids),
        "io_errors": read_once_u64(&counts.io_errors),
        "bad_requests": read_once_u64(&counts.bad_requests),
        "unsupported": read_once_u64(&counts.unsupported),
        "bad_chains": read_once_u64(&counts.bad_chains),
        "chain_faults": {
            fault_name(fault): counts.chain_faults[int(fault)] for fault in FAULTS
        },
    }


FAULTS = [fault for fault in ChainFault if fault.name not in ("CHAIN_OK", "CHAIN_FAULTS")]
