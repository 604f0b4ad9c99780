"""Where a ring goes on: by what its front-end says, unless the ring itself says otherwise.

A front-end that has outlived a back-end tells the next one a base, and some tell one that
never was, or was long ago. Where requests must be done, and once, such a ring is broken by
name. A network device's goes on where its driver waits: a frame may be lost or come twice.
The ring is held, and its driver as hostile as ever: what it writes costs it its own ring.
"""
from vhostpy._ring cimport Virtqueue
from vhostpy._split cimport split_contradicts

from typing import NamedTuple


class Verdict(NamedTuple):
    """What was found, in words; "" where the base is right."""

    text: str = ""
    hint: str = ""      # where the ring is broken: what helps


def reconcile(Virtqueue ring not None, lossy: bool) -> Verdict:
    """Has `ring`, which was started at its base, go on where it stands, or breaks it."""
    if ring.ring.control.packed or not split_contradicts(ring.ring):
        return Verdict()
    base, used = ring.base, ring.used_index
    what = f"base {base} contradicts the ring, whose used index is {used}"
    if not lossy:
        ring.break_off()
        return Verdict(f"{what}: nobody knows what was done; the ring is ignored",
                       "reset the device, or give it a front-end that has INFLIGHT_SHMFD")
    ring.base = used
    return Verdict(f"{what}: goes on there")
