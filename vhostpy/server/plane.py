"""Carries a session's steps out: memory generations, dirty log, virtqueues, device.

One `DataPlane` a session. Knows no socket and decides nothing about the protocol; an fd that
it keeps beyond a step it moves away. The rule of ownership: a virtqueue is the workers' while
it is live; `_held` takes it back, changes it and lets it go again. A *ring* is what the
session knows of it, a *virtqueue* what runs here.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

from vhostpy._ring import ChainFault, Virtqueue
from vhostpy._spec import Feature
from vhostpy.device.device import Device
from vhostpy.errors import SHARE_ALL, SHARE_ON, GuestError, ProtocolError
from vhostpy.memory.guest import DirtyLog, GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping
from vhostpy.protocol.names import fault_name
from vhostpy.protocol.payloads import MemoryRegion, VringAddress
from vhostpy.ring.inflight import InflightArea
from vhostpy.ring.parts import first_base, is_packed
from vhostpy.ring.positions import KeptPosition
from vhostpy.ring.resume import reconcile
from vhostpy.server.signals import call_fd_of, eventfd_of, signal
from vhostpy.session import steps as s
from vhostpy.session.ring import VRING_F_LOG
from vhostpy.session.state import SessionState
from vhostpy.system.aside import aside
from vhostpy.system.calls import Calls
from vhostpy.system.fds import OwnedFd, close_all

log = logging.getLogger("vhostpy")

# How long a ring may take to finish its requests before its session ends instead. QEMU's
# main loop waits for the answer meanwhile.
DRAIN_DEADLINE_S = 5.0
# What helps a ring that is broken.
RESET = "reset the device: reboot the guest, or bind its driver anew"

# What reads and writes memory of the front-end's, or may; and what takes running rings back,
# for which it waits until no worker touches that.
LASTING = (s.StartRing, s.SetRingBase, s.SetInflight, s.WriteConfig)
HOLDING = (
    *(s.SetFeatures, s.SetMemory, s.AddRegion, s.RemoveRegion, s.SetLog, s.EnableRing),
    *(s.SetRingCall, s.SetRingKick, s.SetRingAddresses),
)


class DataPlane:
    """What one session owns of the data plane."""

    def __init__(self, device: Device, session: SessionState, calls: Calls) -> None:
        self.device = device
        self.session = session
        self.calls = calls
        self.workers = device.workers
        self.memory: GuestMemory | None = None
        self.log: DirtyLog | None = None
        self.inflight: InflightArea | None = None
        self.features = 0
        self.virtqueues: dict[int, Virtqueue] = {}  # of the rings that are started
        # A ring's base when it was stopped, and whether it was broken.
        self._given: dict[int, tuple[int, bool]] = {}
        self.retired: list[GuestMemory] = []
        self._files: dict[int, tuple[int, int]] = {}  # by a region's GPA: device and inode
        # fds that a ring may use although its device failed when it was given them.
        self.leftovers: list[OwnedFd] = []
        # What close() could not end: words, or errors.
        self.hung: list[object] = []
        self._call_again: asyncio.TimerHandle | None = None
        self._pause_calls()

    async def carry_out(self, step: s.Step[Any]) -> Any:
        """Does what `step` says; returns its result.

        One that is not cut short by its own wait (a ring's draining is) is done and returns,
        however often the caller is cancelled meanwhile.
        """
        if isinstance(step, s.StopRing):
            return await self._stop_ring(step.index, step.resumes)
        if isinstance(step, LASTING) or (self.virtqueues and isinstance(step, HOLDING)):
            return await aside(self._do, step)
        return self._do(step)

    def _do(self, step: s.Step[Any]) -> Any:
        match step:
            case s.SetFeatures(features):
                self._set_features(features)
            case s.SetMemory(regions, fds):
                pairs = zip(regions, fds, strict=True)
                self._replace_memory([self._map(region, fd) for region, fd in pairs])
            case s.AddRegion(region, fd):
                self._replace_memory([*self._regions(), self._map(region, fd)])
            case s.RemoveRegion(region):
                self._remove_region(region)
            case s.SetLog(fd, offset, size):
                self.log = DirtyLog(fd.fileno(), offset, size, fd.account)
                with self._held(self.virtqueues):
                    self._update_logs()
            case s.MakeInflight(size):
                return _make_inflight(size)
            case s.SetInflight(fd, offset, size, num_queues, queue_size):
                self._set_inflight(
                    InflightArea(fd.fileno(), offset, size, num_queues, queue_size, fd.account)
                )
            case s.StartRing(index):
                self._start_ring(index)
            case s.EnableRing(index, enabled):
                with self._held([index]):
                    self.device.ring_enabled(index, enabled)
            case s.SetRingCall(index, fd):
                call_fd = call_fd_of(fd)
                with self._kept_if_it_fails(fd), self._held([index]) as virtqueues:
                    virtqueues[0].set_call(call_fd)
            case s.SetRingKick(index, fd):
                kick_fd = eventfd_of(fd)
                with self._kept_if_it_fails(fd):
                    self.device.ring_kick(index, kick_fd)
            case s.SetRingErr(_, fd):
                eventfd_of(fd)
            case s.SetRingAddresses(index, address):
                self._set_addresses(index, address)
            case s.SetRingBase(index, base):
                self._set_base(index, base)
            case s.SetMtu(mtu):
                self.device.set_mtu(mtu)
            case s.SendRarp(mac):
                self.device.send_rarp(mac)
            case s.WriteConfig(offset, data):
                self.device.write_config(offset, data)
                if self.inflight is not None:
                    self.inflight.note = self.device.note()
            case _:
                raise NotImplementedError(step)

    def on_bell(self) -> None:
        """Reports rings that broke; raises GuestError if memory is gone or a fd blocks us."""
        for what, shared in (
            ("guest memory", self.memory),
            ("the dirty log", self.log),
            ("the memory of requests under way", self.inflight),
        ):
            if shared is not None and shared.poisoned:
                raise GuestError(
                    f"{self.device.name}: {what} was truncated or cannot be read",
                    "the front-end must not shrink memory that it shares; start it again",
                )
        for index, virtqueue in list(self.virtqueues.items()):
            if virtqueue.deaf:
                raise GuestError(
                    f"{self.device.name}: ring {index}: its call fd blocks us",
                    "the front-end must leave the eventfds that it sends non-blocking",
                )
            if virtqueue.broken and not self.session.rings[index].broken:
                self._broken(index, *_why_broken(virtqueue))
        if self.calls.is_news():
            self._pause_calls()
            log.warning(
                "%s: a call to its driver takes %.1f ms of a worker's time: none is made for %.1f s"
                "\n  next: see what watches the front-end's call fds; very many epolls do this",
                self.device.name,
                self.calls.dear_ms,
                self.calls.pause_s,
            )

    def _pause_calls(self) -> None:
        """Where none are made for a while: a call for each ring follows, for all left out."""
        if self._call_again is not None:
            self._call_again.cancel()
            self._call_again = None
        if self.calls.pause_s:
            loop = asyncio.get_running_loop()
            self._call_again = loop.call_later(self.calls.pause_s, self._call_all)

    def _call_all(self) -> None:
        for index in self.virtqueues:
            call = self.session.rings[index].call
            if call is not None:
                signal(call)

    def _broken(self, index: int, why: str, hint: str) -> None:
        """Tells the operator, `status` and the front-end that nothing is taken from a ring."""
        ring = self.session.rings[index]
        ring.broken = f"{why}; {hint}"
        log.warning("%s: ring %d: %s\n  next: %s", self.device.name, index, why, hint)
        if ring.err is not None:
            signal(ring.err)

    async def close(self) -> None:
        """Ends it all. Memory that a request still uses stays mapped until it has ended."""
        if self._call_again is not None:
            self._call_again.cancel()
        indexes = list(self.virtqueues)
        drained = await asyncio.gather(
            *(self.device.ring_drain(index, DRAIN_DEADLINE_S) for index in indexes),
            return_exceptions=True,
        )
        for virtqueue in self.virtqueues.values():
            virtqueue.set_live(False)
        if self.virtqueues:
            await aside(self.workers.wait)
        for index, done in zip(indexes, drained, strict=True):
            await aside(self._take_down, index)
            if done is not True:
                self.hung.append(done or self._hung(index))
        self.device.closed()
        close_all(self.leftovers)
        self._retire(self.memory)
        self.memory = self.log = self.inflight = None
        for memory in self.retired:
            if memory.in_use:
                size = sum(region.size for region in memory.regions)
                self.hung.append(f"requests still use guest memory; {size} bytes stay mapped")

    def _set_inflight(self, area: InflightArea) -> None:
        # What a driver set once, no front-end sets again after a kill.
        if area.note:
            self.device.recall(area.note)
        else:
            area.note = self.device.note()
        self.inflight = area

    # Memory ------------------------------------------------------------------------

    def _regions(self) -> list[RegionInfo]:
        return list(self.memory.regions) if self.memory is not None else []

    def _remove_region(self, region: MemoryRegion) -> None:
        kept = [
            r
            for r in self._regions()
            if r.gpa != region.gpa or (r.size, r.uva) != (region.size, region.uva)
        ]
        if len(kept) == len(self._regions()):
            raise ProtocolError(
                f"REM_MEM_REG: no region of {region.size} bytes at GPA {region.gpa:#x}"
            )
        self._replace_memory(kept)

    def _replace_memory(self, regions: list[RegionInfo]) -> None:
        """Publishes a new generation; running rings are translated anew in the same step."""
        memory = GuestMemory(regions)
        with self._held(self.virtqueues):
            for index, virtqueue in self.virtqueues.items():
                virtqueue.remap(memory)
                if not virtqueue.broken:
                    self.session.rings[index].broken = ""
            previous, self.memory = self.memory, memory
            for index in self.virtqueues:
                self._move_position(index, self.session.rings[index].desc_uva)
        self._retire(previous)

    def _map(self, region: MemoryRegion, fd: OwnedFd) -> RegionInfo:
        mapping = Mapping(fd.fileno(), region.offset, region.size, fd.account)
        status = os.fstat(fd.fileno())
        self._files[region.gpa] = status.st_dev, status.st_ino
        return RegionInfo(region.gpa, region.size, region.uva, mapping)

    def _retire(self, memory: GuestMemory | None) -> None:
        self.retired = [old for old in self.retired if old.in_use and old is not memory]
        if memory is not None and memory.in_use:
            self.retired.append(memory)

    # Dirty log ---------------------------------------------------------------------

    def _set_features(self, features: int) -> None:
        self.features = features
        if not features >> Feature.LOG_ALL & 1:
            self.log = None  # the next migration brings its own
        with self._held(self.virtqueues):
            self.device.negotiated(features)
            self._update_logs()

    def _update_logs(self) -> None:
        for index, virtqueue in self.virtqueues.items():
            ring = self.session.rings[index]
            virtqueue.set_log(*self._log_of(ring.used_log_gpa if ring.log_used else None))

    def _log_of(self, used_gpa: int | None) -> tuple[DirtyLog | None, int | None]:
        """A ring's dirty log and the guest address of its used ring in it."""
        return (self.log, used_gpa) if self.features >> Feature.LOG_ALL & 1 else (None, None)

    # Rings -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _held(self, indexes: Iterable[int]) -> Iterator[list[Virtqueue]]:
        virtqueues = [self.virtqueues[index] for index in indexes]
        for virtqueue in virtqueues:
            virtqueue.set_live(False)
        if virtqueues:
            self.workers.wait()
        yield virtqueues
        # Not after an error: the session ends then, and its rings stay quiet.
        for virtqueue in virtqueues:
            virtqueue.set_live(True)
        if virtqueues:
            self.workers.nudge()

    def _start_ring(self, index: int) -> None:
        ring = self.session.rings[index]
        if self.memory is None:
            raise ProtocolError(
                f"{self.device.name}: ring {index} started before any guest memory was shared",
                SHARE_ON,
            )
        eventfd_of(ring.err)
        dirty_log, used_log_gpa = self._log_of(ring.used_log_gpa if ring.log_used else None)
        virtqueue = Virtqueue(
            self.memory,
            ring.num,
            self.features,
            desc_uva=ring.desc_uva,
            avail_uva=ring.avail_uva,
            used_uva=ring.used_uva,
            base=ring.base,
            call_fd=call_fd_of(ring.call),
            calls=self.calls,
            log=dirty_log,
            used_log_gpa=used_log_gpa,
        )
        given, was_broken = self._given.pop(index, (None, False))
        if ring.base == 0 != given and virtqueue.unwritten:
            # User-mode Linux says so of any ring. Where it is meant, the driver has been around
            # a packed ring once, and each descriptor shows it.
            virtqueue.base = first_base(self.features)
        if self.inflight is not None and index < self.inflight.num_queues:
            virtqueue.track(self.inflight.queue(index))
            # A back-end that was killed may have given chains back and told nobody.
            virtqueue.notify()
        position = self._claim(index)
        if given == ring.base and not was_broken:
            ring.broken = ""  # it goes on where we stopped it
            virtqueue.keep(position)
        else:
            kept = position.found if position is not None else None
            self._reconcile(index, virtqueue, position, kept)
        self.device.ring_started(index, virtqueue, eventfd_of(ring.kick))
        if virtqueue.again:
            log.info(
                "%s: ring %d: %d requests that were under way are done again",
                self.device.name,
                index,
                virtqueue.again,
            )
        self.virtqueues[index] = virtqueue
        self.device.ring_enabled(index, ring.enabled)
        virtqueue.set_live(True)
        self.workers.nudge()

    def _reconcile(
        self,
        index: int,
        virtqueue: Virtqueue,
        position: KeptPosition | None,
        kept: tuple[int, int] | None,
    ) -> None:
        """Does a ring agree with the base that it was started at, and with what was kept?"""
        self.session.rings[index].broken = ""
        if virtqueue.inflight_queue is not None:
            return  # recovery has counted
        verdict = reconcile(virtqueue, self.device.lossy, kept)
        virtqueue.keep(position)
        if virtqueue.broken:
            if position is not None:
                position.forget()
            self._broken(index, verdict.text, verdict.hint)
        elif verdict.text:
            log.info("%s: ring %d: %s", self.device.name, index, verdict.text)
            # The back-end before may have given chains back and told nobody.
            virtqueue.notify()

    def _claim(self, index: int) -> KeptPosition | None:
        """Where a packed ring's position is kept."""
        owner, ring = self.device.positions, self.session.rings[index]
        if owner is None or not is_packed(self.features):
            return None
        where = self._where(ring.desc_uva)
        return None if where is None else owner.claim(*where, ring.num)

    def _where(self, uva: int | None) -> tuple[tuple[int, int], int] | None:
        """The file that an address is in, and its guest address: the same in another life."""
        for region in self._regions():
            if uva is not None and region.uva <= uva < region.uva + region.size:
                return self._files[region.gpa], region.gpa + uva - region.uva
        return None

    def _move_position(self, index: int, desc_uva: int | None) -> None:
        position, where = self.virtqueues[index].kept, self._where(desc_uva)
        if position is not None and where is not None:
            position.move(*where)

    async def _stop_ring(self, index: int, resumes: bool) -> int:
        virtqueue = self.virtqueues[index]
        drained = await self.device.ring_drain(index, DRAIN_DEADLINE_S)
        virtqueue.set_live(False)
        await aside(self._stop_held, index)
        if not drained:
            raise self._hung(index)
        if virtqueue.kept is not None and not resumes:
            virtqueue.kept.forget()  # the front-end knows
        self._given[index] = virtqueue.base, virtqueue.broken
        return int(virtqueue.base)

    def _stop_held(self, index: int) -> None:
        self.workers.wait()
        self._take_down(index)

    def _take_down(self, index: int) -> None:
        """The ring is held; the device gives it back."""
        virtqueue = self.virtqueues.pop(index)
        self.device.ring_stopped(index)
        if virtqueue.kept is not None and self.device.positions is not None:
            self.device.positions.release(virtqueue.kept)
        self._retire(virtqueue.memory)

    def _hung(self, index: int) -> GuestError:
        return GuestError(
            f"ring {index}: requests still under way after {DRAIN_DEADLINE_S:g} s",
            "see whether the storage answers; the front-end has to connect again",
        )

    @contextlib.contextmanager
    def _kept_if_it_fails(self, fd: OwnedFd | None) -> Iterator[None]:
        """An fd that a ring may use already, where the block fails, stays open to the end."""
        try:
            yield
        except BaseException:
            if fd is not None:
                self.leftovers.append(fd.move())
            raise

    def _set_addresses(self, index: int, address: VringAddress) -> None:
        logged = address.flags & VRING_F_LOG
        with self._held([index]) as virtqueues:
            virtqueues[0].set_addresses(
                desc_uva=address.desc_uva, avail_uva=address.avail_uva, used_uva=address.used_uva
            )
            virtqueues[0].set_log(*self._log_of(address.used_log_gpa if logged else None))
            self._move_position(index, address.desc_uva)

    def _set_base(self, index: int, base: int) -> None:
        ring = self.session.rings[index]
        with self._held([index]) as virtqueues:
            virtqueues[0].base = base
            position = virtqueues[0].kept
            kept = position.at if position is not None and not ring.broken else None
            self._reconcile(index, virtqueues[0], position, kept)


def _make_inflight(size: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("vhostpy-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
    return fd


def _why_broken(virtqueue: Virtqueue) -> tuple[str, str]:
    """Why nothing is taken from a ring any more, and what helps."""
    if virtqueue.condemned:
        return "it offers buffers without end that nobody can use; it gets no more frames", RESET
    fault = virtqueue.unanswerable
    if fault is None:
        return "the driver's indexes make no sense; the ring is ignored until it is reset", RESET
    if fault == ChainFault.CHAIN_OK:
        why = "no piece of it is writable"
    elif fault == ChainFault.CHAIN_UNMAPPED:
        why = "its status byte or a table of it is not in shared memory"
    else:
        why = f"its descriptors are faulty ({fault_name(fault)})"
    hint = f"{SHARE_ALL}; then {RESET}" if fault == ChainFault.CHAIN_UNMAPPED else RESET
    return f"a request cannot be answered: {why}; nothing is taken behind it", hint
