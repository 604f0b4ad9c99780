"""Memory regions, the dirty log, and memory for requests under way."""

from collections.abc import Sequence

from vhostpy._spec import Limit
from vhostpy._spec import ProtocolFeature as F
from vhostpy.errors import SHARE_ON, ProtocolError, Refused
from vhostpy.protocol.codec import FrontEndRequest as R
from vhostpy.protocol.codec import Message
from vhostpy.protocol.names import listed
from vhostpy.protocol.payloads import U64, Inflight, Log, MemoryRegion
from vhostpy.ring.inflight import area_bytes
from vhostpy.session.handlers.served import Served
from vhostpy.session.regions import FILE_END, Spans, check_regions
from vhostpy.session.ring import RingEvent
from vhostpy.session.state import SessionState
from vhostpy.session.steps import (
    AddRegion,
    MakeInflight,
    RemoveRegion,
    Reply,
    SetInflight,
    SetLog,
    SetMemory,
    Steps,
)
from vhostpy.system.fds import OwnedFd


def get_max_mem_slots(session: SessionState, message: Message) -> Steps:
    yield Reply.pack(message.request, U64(int(Limit.MEM_SLOTS_MAX)))


def set_mem_table(session: SessionState, message: Message) -> Steps:
    regions = message.payload.regions
    if not regions:
        raise ProtocolError("SET_MEM_TABLE: no memory regions", SHARE_ON)
    check_regions(message.name, regions)
    yield from _stop_unmapped(session, regions)
    yield SetMemory(regions, message.fds)
    _forget_addresses(session)
    _know(session, regions)
    yield from session.settle_all()


def add_mem_reg(session: SessionState, message: Message) -> Steps:
    region = message.payload.region
    if _find_region(session, region) is not None:
        # QEMU before 8.0 adds, and removes, each region once for every queue pair.
        return
    regions = [*session.regions, region]
    if len(regions) > Limit.MEM_SLOTS_MAX:
        raise ProtocolError(
            f"ADD_MEM_REG: {len(regions)} regions, at most {int(Limit.MEM_SLOTS_MAX)}"
        )
    check_regions(message.name, regions, known=len(session.regions))
    yield AddRegion(region, message.fds[0])
    _know(session, regions)
    yield from session.settle_all()


def rem_mem_reg(session: SessionState, message: Message) -> Steps:
    index = _find_region(session, message.payload.region)
    if index is None:
        return  # the pair before has removed it
    region = session.regions[index]
    rest = session.regions[:index] + session.regions[index + 1 :]
    yield from _stop_unmapped(session, rest)
    yield RemoveRegion(region)
    _forget_addresses(session, region)
    _know(session, rest)


def _find_region(session: SessionState, wanted: MemoryRegion) -> int | None:
    """Which of the regions it is. "The mmap offset is ignored.\""""
    for i, region in enumerate(session.regions):
        if region.gpa == wanted.gpa and (region.size, region.uva) == (wanted.size, wanted.uva):
            return i
    return None


def _forget_addresses(session: SessionState, gone: MemoryRegion | None = None) -> None:
    """Rings that were stopped lie nowhere, once the memory that they ran in (all of it, or
    `gone`) is replaced: another guest's may be at the same addresses.

    Such a ring waits for SET_VRING_ADDR. One that never ran keeps addresses that were sent
    before the memory; one whose memory was taken away while it ran goes on where it was.
    """
    for ring in session.rings:
        if not ring.spent:
            continue
        parts = ring.parts(bool(session.packed))
        if gone is None or any(gone.uva <= p.uva < gone.uva + gone.size for p in parts):
            ring.forget_addresses()


def _stop_unmapped(session: SessionState, regions: Sequence[MemoryRegion]) -> Steps:
    """Rings that will lie in none of `regions` stop before, and start again when they do."""
    spans = Spans(regions)
    for ring in session.rings:
        if ring.started and not session.is_mapped(ring, spans):
            ring.base = yield from ring.advance(RingEvent.UNMAPPED, True)


def _know(session: SessionState, regions: Sequence[MemoryRegion]) -> None:
    session.regions, session.spans = list(regions), Spans(regions)


# Dirty log -----------------------------------------------------------------------------


def set_log_base(session: SessionState, message: Message) -> Steps:
    where = message.payload
    if not session.protocol(F.LOG_SHMFD):
        raise Refused("SET_LOG_BASE: a log without a file needs LOG_SHMFD to be negotiated")
    if not isinstance(where, Log) or len(message.fds) != 1:
        raise ProtocolError(
            f"SET_LOG_BASE: {len(message.fds)} fds and {where!r}, expected one and a Log"
        )
    if where.size == 0 or where.offset + where.size > FILE_END:
        raise ProtocolError(
            f"SET_LOG_BASE: {where.size:#x} bytes at offset {where.offset:#x} are no log"
        )
    yield SetLog(message.fds[0], where.offset, where.size)
    session.logging = True
    yield from session.settle_all()


# Requests under way --------------------------------------------------------------------


def _check_inflight(session: SessionState, message: Message) -> Inflight:
    asked: Inflight = message.payload
    if not 1 <= asked.num_queues <= len(session.rings):
        raise ProtocolError(
            f"{message.name}: {asked.num_queues} queues, the device has {len(session.rings)}"
        )
    if not 1 <= asked.queue_size <= Limit.QUEUE_SIZE_MAX:
        raise ProtocolError(
            f"{message.name}: queues of {asked.queue_size}, expected 1 to "
            f"{int(Limit.QUEUE_SIZE_MAX)}"
        )
    return asked


def get_inflight_fd(session: SessionState, message: Message) -> Steps:
    asked = _check_inflight(session, message)
    size = area_bytes(asked.num_queues, asked.queue_size)
    made: OwnedFd = yield MakeInflight(size)
    with made:
        payload = Inflight(size, 0, asked.num_queues, asked.queue_size)
        yield Reply.pack(message.request, payload, made)


def set_inflight_fd(session: SessionState, message: Message) -> Steps:
    area = _check_inflight(session, message)
    if not area.mmap_size or area.mmap_offset + area.mmap_size > FILE_END:
        raise ProtocolError(
            f"{message.name}: {area.mmap_size:#x} bytes at offset {area.mmap_offset:#x}"
        )
    running = [ring.index for ring in session.rings if ring.started]
    if running:
        raise Refused(f"{message.name}: rings {listed(running)} run")
    yield SetInflight(
        message.fds[0], area.mmap_offset, area.mmap_size, area.num_queues, area.queue_size
    )


# Requests ------------------------------------------------------------------------------

SERVED: dict[int, Served] = {
    R.SET_MEM_TABLE: Served(set_mem_table),
    R.SET_LOG_BASE: Served(set_log_base),
    R.GET_MAX_MEM_SLOTS: Served(get_max_mem_slots, negotiated=F.CONFIGURE_MEM_SLOTS),
    R.ADD_MEM_REG: Served(add_mem_reg, negotiated=F.CONFIGURE_MEM_SLOTS),
    R.REM_MEM_REG: Served(rem_mem_reg, negotiated=F.CONFIGURE_MEM_SLOTS),
    R.GET_INFLIGHT_FD: Served(get_inflight_fd, offered=F.INFLIGHT_SHMFD),
    R.SET_INFLIGHT_FD: Served(set_inflight_fd, offered=F.INFLIGHT_SHMFD),
}
