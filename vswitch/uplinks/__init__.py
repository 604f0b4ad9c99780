"""Uplinks: ports whose other end is no guest, as a TAP device or a stream. A file each.

An uplink is a `Port` (`vswitch/port.pxd`) and nothing more: the switch cannot tell it from a
guest's port. What that asks of it:

* `receive` finds out without a system call that nothing is there: readiness comes from epoll
  or io_uring. Frames are views of a staging ring of its own, or of `turn.scratch`.
* `transmit` copies, or hands over to the kernel, before it returns. It charges `turn.frames`
  and `turn.bytes` by what leaves, a segment each, and `turn.steps` by the time that system
  calls take: 4096 steps are some 50 us. A device that is full is a drop that it counts
  itself, or a count below the one it was given: then the frames wait as for a guest.
* A segment made in software is a header in `turn.scratch.bytes` and views of the payload
  behind it; what a call has taken of the scratch it gives back before it returns.
* `release` and `arm` are where it decides when its sender has its buffers back.
* Drops and counters are those of any port (`Drop`, `QueueCounters`); the loss of its device
  is `DROP_RECEIVER_DOWN`, never an exception.
"""
