"""What a queue pair has done so far, as workers count it."""
from vhostpy.vswitch.port cimport QueueCounters

cdef dict counters_of(const QueueCounters *sent, const QueueCounters *received)
# By stable names, while the workers go on counting.
cdef str drop_name(int reason)
# As counters_of() calls it.
