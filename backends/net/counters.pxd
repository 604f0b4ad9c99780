"""What a queue pair has done so far, as workers count it."""
from libc.stdint cimport uint64_t
from vhostpy.vswitch.port cimport QueueCounters

cdef dict counters_of(const QueueCounters *sent, const QueueCounters *received,
                      const uint64_t *bad_chains, const uint64_t *bad_buffers)
# By stable names, while the workers go on counting.
cdef str drop_name(int reason)
# As counters_of() calls it.
