"""When a sender sees its buffers again.

A driver that finds all of its buffers returned takes them all at once, and works on cold
ones from then on. So it sees those of earlier bursts, by a quarter of the ring or each 180 us;
the last ones when it pauses for 45 us, before its worker sleeps, when its ring stops, and
where they would be half of the ring.
"""
from libc.stdint cimport uint32_t, uint64_t
from vhostpy._ring cimport Chain, Virtqueue

cdef enum:
    # Of a sender: longer than one of DPDK's needs between two bursts, else it works on cold
    # buffers (64 B, its split ring: 4-6 Mpps up to 5 us, 8-10 at 20, 8-16 at 50); shorter
    # than a worker spins, so that one who waits for its buffers finds it awake.
    PAUSE_US = 45
    HELD_PAUSES = 4        # a sender that goes on sending waits for buffers for so many

cdef struct Release:
    # Of one transmit queue; the worker's that polls it.
    uint64_t received_at   # ticks() when there was a frame, last
    uint64_t shown_at      # and when the sender got buffers back that it waited for
    uint32_t held          # descriptors released that it does not see yet. Not the ring's own
    #                        unpublished(): a split ring counts chains, of any length


cdef inline void release_reset(Release *release) noexcept nogil:
    """Another virtqueue."""
    release.received_at = release.shown_at = 0
    release.held = 0


cdef inline void release_show(Release *release, void *tx) noexcept nogil:
    """The sender sees all of them now."""
    (<Virtqueue>tx).publish()
    release.held = 0


cdef inline void release_look(Release *release, void *tx, bint found, uint64_t now,
                              uint64_t pause) noexcept nogil:
    """The ring was looked at, and there were frames or none."""
    if not found:
        if now - release.received_at >= pause:
            release_show(release, tx)
        return
    # Where frames trickle there is no pause; the buffers of this turn stay back.
    if now - release.shown_at >= HELD_PAUSES * pause:
        release_show(release, tx)
        release.shown_at = now
    release.received_at = now


cdef inline void release_push(Release *release, void *tx, const Chain *chains, int count,
                              uint32_t slots) noexcept nogil:
    """Chains of so many descriptors go back; the burst before them is seen at a quarter."""
    if release.held * 4 >= (<Virtqueue>tx).size():
        release_show(release, tx)
    (<Virtqueue>tx).push(chains, NULL, count)
    release.held += slots
    # But not most of a small ring, or of one full of long chains: it has to go on.
    if release.held * 2 >= (<Virtqueue>tx).size():
        release_show(release, tx)
