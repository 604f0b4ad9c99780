"""Where a ring goes on: by what its front-end says, unless the ring itself says otherwise.

A front-end that has outlived a back-end tells the next one a base, and some tell one that
never was, or was long ago. Where requests must be done, and once, such a ring is broken by
name. A network device's goes on where its driver waits: a frame may be lost or come twice.
The ring is held, and its driver as hostile as ever: what it writes costs it its own ring, and
where its pages fault, nobody else waits: all that reads them does without the interpreter's lock.

A packed ring does not tell where its next used descriptor belongs; it only agrees with a
position or does not. Seen from there, for one round, come descriptors that the driver has
made available in this round, then those that were used in the round before: heads of chains,
each followed by what is left of its chain. IN_ORDER leaves whole chains behind a head.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vhostpy.ring.chain cimport DESCRIPTOR_SIZE
from vhostpy.ring.state cimport Ring
from vhostpy.system.hw cimport read_once_u16, read_once_u64, store_release_u64
from vhostpy.ring.packed cimport INDEX, WRAP, step, step_one
from vhostpy._ring cimport Virtqueue
from vhostpy._spec cimport DescriptorFlag
from vhostpy.ring.split cimport split_contradicts

from typing import NamedTuple

cdef enum:
    ID = 12             # of pvirtq_desc
    FLAGS = 14
    OWNER = DescriptorFlag.DESC_AVAIL | DescriptorFlag.DESC_USED

    # What a descriptor's flags say in the round of a position.
    OFFERED = 0         # available
    PUSHED = 1          # used; at the next used position or behind it: not to be seen yet
    USED_BEFORE = 2     # used in the round before
    SKIPPED = 3         # available in the round before, and used with the one before it

    NOWHERE = -1
    FIRST = WRAP        # of a ring that was never used

RESET = "reload the guest's network driver or reset the device; or use split rings (packed=off)"


class Verdict(NamedTuple):
    """What was found, in words; "" where the base is right."""

    text: str = ""
    hint: str = ""      # where the ring is broken: what helps


def reconcile(Virtqueue ring not None, lossy: bool, kept: tuple[int, int] | None = None) -> Verdict:
    """Has `ring`, which was started at its base, go on where it stands, or breaks it.

    `kept`: what is known of a packed ring's last publish, from where to where it went.
    """
    cdef bint contradicts
    if ring.ring.control.packed:
        return reconcile_packed(ring, lossy, kept)
    with nogil:
        contradicts = split_contradicts(ring.ring)
    if not contradicts:
        return Verdict()
    base, used = ring.base, ring.used_index
    what = f"base {base} contradicts the ring, whose used index is {used}"
    if not lossy:
        return broken(ring, f"{what}: nobody knows what was done",
                      "reset the device, or give it a front-end that has INFLIGHT_SHMFD")
    ring.base = used
    return Verdict(f"{what}: goes on there")


cdef broken(Virtqueue ring, text, hint):
    ring.break_off()
    return Verdict(f"{text}; the ring is ignored", hint)


cdef reconcile_packed(Virtqueue queue, bint lossy, kept):
    cdef Ring *ring = queue.ring
    cdef uint16_t base = ring.worker.used_idx, old = 0, new = 0
    cdef int position, end
    cdef bint known = kept is not None, agreed
    what = f"base {queue.base:#x} contradicts the packed ring"
    if not lossy:
        with nogil:
            agreed = is_blank(ring) or not was_used(ring, base)
        if agreed:
            return Verdict()
        return broken(queue, f"{what}: nobody knows what was done",
                      "reset the device, or give it a front-end that has INFLIGHT_SHMFD")
    if known:
        old, new = kept
    with nogil:
        position = choose(ring, base, known, old, new)
        end = NOWHERE if position == NOWHERE else finish(ring, <uint16_t>position)
    if end == NOWHERE:
        return broken(queue, f"{what}, and nobody knows where it stands", RESET)
    if end == base:
        return Verdict()
    queue.base = <uint32_t>end << 16 | <uint32_t>end
    return Verdict(f"{what}: goes on at {end & INDEX} (wrap counter {end >> 15})")


cdef inline uint16_t flags_at(const Ring *ring, uint16_t position) noexcept nogil:
    return read_once_u16(ring.control.desc + DESCRIPTOR_SIZE * <uint32_t>(position & INDEX) + FLAGS)


cdef inline uint16_t id_at(const Ring *ring, uint16_t position) noexcept nogil:
    return read_once_u16(ring.control.desc + DESCRIPTOR_SIZE * <uint32_t>(position & INDEX) + ID)


cdef inline uint16_t previous(uint16_t position, uint32_t size) noexcept nogil:
    return step(position ^ WRAP, size - 1, size)


cdef inline int state_of(uint16_t flags, uint16_t position) noexcept nogil:
    cdef bint wrap = position & WRAP != 0, used = flags & DescriptorFlag.DESC_USED != 0
    if (flags & DescriptorFlag.DESC_AVAIL != 0) == wrap:
        return PUSHED if used == wrap else OFFERED
    return SKIPPED if used == wrap else USED_BEFORE


cdef inline int state_at(const Ring *ring, uint16_t position) noexcept nogil:
    return state_of(flags_at(ring, position), position)


cdef inline bint was_written(const Ring *ring, uint32_t index) noexcept nogil:
    """Zeros look used every other round; what was used has an address."""
    cdef const uint8_t *where = ring.control.desc + DESCRIPTOR_SIZE * index
    return (read_once_u64(where) | read_once_u64(where + 8)) != 0


cdef bint was_used(const Ring *ring, uint16_t position) noexcept nogil:
    """The driver has seen a used descriptor there, or none yet right before it."""
    cdef uint32_t size = ring.control.size
    return (state_at(ring, position) == PUSHED and was_written(ring, position & INDEX)
            or state_at(ring, previous(position, size)) == USED_BEFORE)


cdef bint is_blank(const Ring *ring) noexcept nogil:
    """Nothing was ever offered, and nothing speaks against any base."""
    cdef uint32_t i
    for i in range(ring.control.size):
        if was_written(ring, i):
            return False
    return True


cdef bint is_new(const Ring *ring) noexcept nogil:
    """No device has used anything: its driver has just made it, of zeros.

    Every other round flags look the same, but not all of what was used then. (A ring whose
    last used chains span its end, and whose driver has offered all before them and no more,
    looks new as well: less likely than a guest that was started again while we were away.)
    """
    cdef uint16_t flags
    cdef uint32_t i
    for i in range(ring.control.size):
        flags = flags_at(ring, <uint16_t>i)
        if flags & DescriptorFlag.DESC_USED:
            return False
        if not flags & DescriptorFlag.DESC_AVAIL and was_written(ring, i):
            return False
    return True


cdef int choose(const Ring *ring, uint16_t base, bint known, uint16_t old,
                uint16_t new) noexcept nogil:
    """The position of the next used descriptor, or NOWHERE."""
    cdef uint32_t size = ring.control.size
    cdef int position = NOWHERE
    if is_blank(ring) or (base == FIRST and is_new(ring)):
        return base
    if known:
        position = published(ring, old, new)
        if position != NOWHERE and agrees(ring, <uint16_t>position, size):
            return position
    position = the_only_one(ring)
    # Half of it: a base of long ago may look as if most were one chain's.
    if position == NOWHERE and agrees(ring, base, size // 2):
        return base
    return position


cdef int published(const Ring *ring, uint16_t old, uint16_t new) noexcept nogil:
    """Whether the driver has seen the last publish is for the ring to say."""
    cdef uint32_t farthest = max(old & INDEX, new & INDEX)
    if farthest >= ring.control.size:
        return NOWHERE
    return old if old != new and state_at(ring, old) == OFFERED else new


cdef bint agrees(const Ring *ring, uint16_t position, uint32_t skipped_most) noexcept nogil:
    """Could the ring look like that, if its next used descriptor belongs there?

    Its driver may be just writing a burst: all of it but the flags of its first head. With
    IN_ORDER a used descriptor may stand for `skipped_most` others, and these look like any.
    """
    cdef bint in_order = ring.control.in_order
    cdef uint32_t size = ring.control.size, skipped = 0, i
    cdef int part = 0, state     # available; the head that is missing; its burst; used
    cdef bint more = True        # what is left of a chain may follow
    cdef uint16_t flags
    for i in range(size):
        flags = flags_at(ring, position)
        state = state_of(flags, position)
        position = step_one(position, size)
        if state == PUSHED:
            if i == 0 or part:
                return False
        elif state == OFFERED:
            if part == 3:
                return False
            if part == 1:
                part = 2
        else:
            if part == 0 or part == 2:
                more = True
                skipped = 0
            if part < 3:
                part = 1 if part == 0 else 3
            if state == USED_BEFORE:
                more = True
                skipped = 0
            elif in_order:
                skipped += 1
                if skipped > skipped_most:
                    return False
            else:
                if not more:
                    return False
                more = flags & DescriptorFlag.DESC_NEXT != 0
    return True


cdef int the_only_one(const Ring *ring) noexcept nogil:
    """Where each descriptor is a chain of its own, and each was used by itself: the one
    position that explains them all. NOWHERE where there is another, or none.

    Asked before the base: one that is a single descriptor off looks as if that were the rest
    of a longer chain.
    """
    cdef uint32_t size = ring.control.size, turn = size, slots = 0, i
    cdef uint16_t position, before, flags
    cdef bint wrap
    if ring.control.in_order:
        return NOWHERE
    # The driver goes on where the flag of what it makes available turns over.
    wrap = flags_at(ring, 0) & DescriptorFlag.DESC_AVAIL != 0
    for i in range(size):
        flags = flags_at(ring, <uint16_t>i)
        if flags & DescriptorFlag.DESC_NEXT:
            return NOWHERE
        if (flags & DescriptorFlag.DESC_AVAIL != 0) != wrap:
            turn = min(turn, i)
        elif turn < size:
            return NOWHERE
    # One round back from there: first used ones, then those that are still available.
    position = <uint16_t>(turn | (WRAP if wrap else 0)) if turn < size else (
        0 if wrap else <uint16_t>WRAP)
    position ^= WRAP
    before = position
    while slots < size and state_at(ring, position) == PUSHED:
        before = position
        position = step_one(position, size)
        slots += 1
    if slots == size:
        return position
    if slots and id_at(ring, position) == id_at(ring, before):
        return NOWHERE          # the next chain, or the rest of this one?
    turn = position
    while slots < size:
        if state_at(ring, position) != OFFERED:
            return NOWHERE
        position = step_one(position, size)
        slots += 1
    return <int>turn


cdef int finish(Ring *ring, uint16_t start) noexcept nogil:
    """Publishes what a kill has left behind the first of a burst, as used with nothing in it:
    of what was overwritten, only that is still known. Where the ring goes on; NOWHERE where
    that makes no sense."""
    cdef uint32_t size = ring.control.size, slots = 0, chains = 0
    cdef uint16_t position = start, end = start, id, last = 0
    while slots < size and state_at(ring, position) == OFFERED:
        if not flags_at(ring, position) & DescriptorFlag.DESC_NEXT:
            last = id_at(ring, position)
            chains += 1
        position = step_one(position, size)
        slots += 1
    if (slots == 0 or slots == size or state_at(ring, position) != PUSHED
            or not was_written(ring, position & INDEX)):
        return start
    if chains != 1 and not (ring.control.in_order and chains):
        return NOWHERE
    while slots < size and state_at(ring, position) == PUSHED:
        id = id_at(ring, position)
        put_used(ring, position, id)
        position = end = step_one(position, size)
        slots += 1
        # Its chain ends with its id, or before the next one that was pushed, or there.
        while slots < size and state_at(ring, position) == OFFERED:
            position = step_one(position, size)
            slots += 1
            if (not flags_at(ring, previous(position, size)) & DescriptorFlag.DESC_NEXT
                    and id_at(ring, previous(position, size)) == id):
                end = position
                break
        if slots < size and state_at(ring, position) == PUSHED:
            end = position
        position = end
    put_used(ring, start, last)     # the driver looks here first
    return end


cdef void put_used(Ring *ring, uint16_t position, uint16_t id) noexcept nogil:
    cdef uint64_t flags = OWNER if position & WRAP else 0
    store_release_u64(ring.control.desc + DESCRIPTOR_SIZE * <uint32_t>(position & INDEX) + 8,
                      <uint64_t>id << 32 | flags << 48)
