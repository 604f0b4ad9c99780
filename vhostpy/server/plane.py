"""Carries a session's effects out: memory generations, dirty log, virtqueues, device.

One `DataPlane` a session. Knows no socket and decides nothing about the protocol. The
rule of ownership: a virtqueue is the workers' while it is live; `held` takes it back,
changes it and lets it go again.
"""

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vhostpy._ring import ChainFault, Virtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.device.device import Device
from vhostpy.errors import SHARE_ALL, SHARE_ON, GuestError, ProtocolError
from vhostpy.memory.guest import DirtyLog, GuestMemory, RegionInfo
from vhostpy.memory.mapping import Mapping
from vhostpy.protocol.codec import BackEndRequest, encode
from vhostpy.protocol.names import fault_name
from vhostpy.protocol.payloads import MemoryRegion
from vhostpy.ring.inflight import InflightArea
from vhostpy.ring.parts import first_base, is_packed
from vhostpy.ring.positions import KeptPosition
from vhostpy.ring.resume import reconcile
from vhostpy.session import effects as e
from vhostpy.session.ring import StopReason
from vhostpy.session.session import Session
from vhostpy.system.aside import aside
from vhostpy.system.calls import Calls
from vhostpy.system.fds import OwnedFd, is_eventfd, kind_of
from vhostpy.system.notify import is_unix_socket, signal_once

log = logging.getLogger("vhostpy")

# How long a ring may take to finish its requests before its session ends instead. QEMU's
# main loop waits for the answer meanwhile.
DRAIN_DEADLINE_S = 5.0
# What helps a ring that is broken.
RESET = "reset the device: reboot the guest, or bind its driver anew"

# What reads and writes memory of the front-end's, or may; and what takes running rings back,
# for which it waits until no worker touches that.
LASTING = (e.StartRing, e.SetRingBase, e.SetInflight, e.WriteConfig)
HOLDING = (
    *(e.SetFeatures, e.SetMemory, e.AddRegion, e.RemoveRegion, e.SetLog, e.EnableRing),
    *(e.SetRingCall, e.SetRingKick, e.SetRingAddresses),
)


@dataclass(slots=True)
class RunningRing:
    """A started ring."""

    virtqueue: Virtqueue


class DataPlane:
    """What one session owns of the data plane."""

    def __init__(self, device: Device, session: Session, calls: Calls) -> None:
        self.device = device
        self.session = session
        self.calls = calls
        self.workers = device.workers
        self.memory: GuestMemory | None = None
        self.log: DirtyLog | None = None
        self.inflight: InflightArea | None = None
        self.features = 0
        self.rings: dict[int, RunningRing] = {}
        # A ring's base when it was stopped, and whether it was broken.
        self._given: dict[int, tuple[int, bool]] = {}
        self.retired: list[GuestMemory] = []
        self._files: dict[int, tuple[int, int]] = {}  # by a region's GPA: device and inode
        self.backend_channel: OwnedFd | None = None
        # fds that a ring may still use after what should have replaced them was refused.
        self.leftovers: list[OwnedFd] = []
        # What close() could not end: words, or errors.
        self.hung: list[object] = []
        self._call_again: asyncio.TimerHandle | None = None
        self._pause_calls()

    async def carry_out(self, effect: e.Effect) -> None:
        """Does what `effect` says. StopRing has a result: see `stop_ring`."""
        if isinstance(effect, e.ResetDevice):
            for index in list(self.rings):
                await self.stop_ring(index)
        elif isinstance(effect, LASTING) or (self.rings and isinstance(effect, HOLDING)):
            await aside(self._do, effect)
        else:
            self._do(effect)

    def _do(self, effect: e.Effect) -> None:
        match effect:
            case e.SetFeatures(features):
                self._set_features(features)
            case e.SetMemory(regions, fds):
                self._set_memory(regions, fds)
            case e.AddRegion(region, fd):
                with fd:
                    self._replace_memory([*self._regions(), self._map(region, fd)])
            case e.RemoveRegion(region):
                self._remove_region(region)
            case e.SetLog(fd, offset, size):
                self._set_log(fd, offset, size)
            case e.SetInflight(fd, offset, size, num_queues, queue_size):
                with fd:
                    self._set_inflight(
                        InflightArea(
                            fd.fileno(), offset, size, num_queues, queue_size, fd.account
                        )
                    )
            case e.StartRing(index):
                self._start_ring(index)
            case e.EnableRing(index, enabled):
                with self._held([index]):
                    self.device.ring_enabled(index, enabled)
            case e.SetRingCall(index, replaced):
                with self._replacing(replaced):
                    self._set_call(index)
            case e.SetRingKick(index, replaced):
                with self._replacing(replaced):
                    self.device.ring_kick(index, _eventfd(self.session.rings[index].kick))
            case e.SetRingErr(index, replaced):
                with self._replacing(replaced):
                    _eventfd(self.session.rings[index].err)
            case e.SetRingAddresses(index):
                self._set_addresses(index)
            case e.SetRingBase(index):
                state = self.session.rings[index]
                with self._held([index]) as virtqueues:
                    virtqueues[0].base = state.base
                    position = virtqueues[0].kept
                    kept = position.at if position is not None and not state.broken else None
                    self._reconcile(index, virtqueues[0], position, kept)
            case e.SetBackendChannel(fd):
                _close(self.backend_channel)
                self.backend_channel = fd
            case e.SetMtu(mtu):
                self.device.set_mtu(mtu)
            case e.SendRarp(mac):
                self.device.send_rarp(mac)
            case e.WriteConfig(offset, data):
                self.device.write_config(offset, data)
                if self.inflight is not None:
                    self.inflight.note = self.device.note()
            case e.SetStatus():
                pass
            case _:
                raise NotImplementedError(effect)

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
        for index, ring in list(self.rings.items()):
            if ring.virtqueue.deaf:
                raise GuestError(
                    f"{self.device.name}: ring {index}: its call fd blocks us",
                    "the front-end must leave the eventfds that it sends non-blocking",
                )
            if ring.virtqueue.broken and not self.session.rings[index].broken:
                self._broken(index, *_why_broken(ring.virtqueue))
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
        for index in self.rings:
            call = self.session.rings[index].call
            if call is not None:
                _signal(call)

    def _broken(self, index: int, why: str, hint: str) -> None:
        """Says that nothing is taken from a ring, and why, to all who may want to know."""
        state = self.session.rings[index]
        state.broken = f"{why}; {hint}"
        log.warning("%s: ring %d: %s\n  next: %s", self.device.name, index, why, hint)
        if state.err is not None:
            _signal(state.err)

    async def close(self) -> None:
        """Ends it all. Memory that a request still uses stays mapped until it has ended."""
        if self._call_again is not None:
            self._call_again.cancel()
        indexes = list(self.rings)
        drained = await asyncio.gather(
            *(self.device.ring_drain(index, DRAIN_DEADLINE_S) for index in indexes),
            return_exceptions=True,
        )
        for ring in self.rings.values():
            ring.virtqueue.set_live(False)
        if self.rings:
            await aside(self.workers.wait)
        for index, done in zip(indexes, drained, strict=True):
            await aside(self._take_down, index)
            if done is not True:
                self.hung.append(done or self._hung(index))
        self.device.closed()
        for fd in (self.backend_channel, *self.leftovers):
            _close(fd)
        self._retire(self.memory)
        self.memory = self.log = self.inflight = None
        for memory in self.retired:
            if memory.in_use:
                size = sum(region.size for region in memory.regions)
                self.hung.append(f"requests still use guest memory; {size} bytes stay mapped")

    def make_inflight(self, effect: e.MakeInflight) -> OwnedFd:
        """Zeroed memory, for the front-end to keep: nothing of it stays here."""
        fd = OwnedFd(os.memfd_create("vhostpy-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(fd.fileno(), effect.size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
        return fd

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

    def _set_memory(self, regions: tuple[MemoryRegion, ...], fds: tuple[OwnedFd, ...]) -> None:
        with contextlib.ExitStack() as stack:
            for fd in fds:
                stack.enter_context(fd)
            self._replace_memory([self._map(*pair) for pair in zip(regions, fds, strict=True)])

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
        with self._held(self.rings) as virtqueues:
            for virtqueue in virtqueues:
                virtqueue.remap(memory)
            for index, ring in self.rings.items():
                if not ring.virtqueue.broken:
                    self.session.rings[index].broken = ""
            previous, self.memory = self.memory, memory
            self._move_positions(self.rings)
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
        with self._held(self.rings):
            self.device.negotiated(features)
            self._update_logs()

    def _set_log(self, fd: OwnedFd | None, offset: int, size: int) -> None:
        if fd is None:
            self.log = None
        else:
            with fd:
                self.log = DirtyLog(fd.fileno(), offset, size, fd.account)
        with self._held(self.rings):
            self._update_logs()

    def _update_logs(self) -> None:
        for index, ring in self.rings.items():
            ring.virtqueue.set_log(*self._log_of(index))

    def _log_of(self, index: int) -> tuple[DirtyLog | None, int | None]:
        """The ring's dirty log and the guest address of its used ring in it."""
        if not self.features >> Feature.LOG_ALL & 1:
            return None, None
        state = self.session.rings[index]
        return self.log, state.used_log_gpa if state.log_used else None

    # Our own requests --------------------------------------------------------------

    def tell_config_changed(self) -> bool:
        """Has the front-end read the config space anew; False: there is no way to tell it.

        Source: vhost-user, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG. Waits for nothing: no reply
        is asked for, and a front-end that takes nothing from its channel is not told.
        """
        has_config = self.session.protocol_features >> ProtocolFeature.CONFIG & 1
        if self.backend_channel is None or not has_config:
            return False
        message = encode(BackEndRequest.CONFIG_CHANGE_MSG)
        # The front-end may have sent any file; of these only one kind never makes us wait.
        if not is_unix_socket(self.backend_channel.fileno()):
            return False
        channel = socket.socket(fileno=self.backend_channel.fileno())
        try:
            return channel.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(message)
        except OSError:
            return False
        finally:
            channel.detach()  # not ours to close

    # Rings -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _held(self, indexes: Iterable[int]) -> Iterator[list[Virtqueue]]:
        virtqueues = [self.rings[index].virtqueue for index in indexes]
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
        state = self.session.rings[index]
        if self.memory is None:
            raise ProtocolError(
                f"{self.device.name}: ring {index} started before any guest memory was shared",
                SHARE_ON,
            )
        _eventfd(state.err)
        dirty_log, used_log_gpa = self._log_of(index)
        virtqueue = Virtqueue(
            self.memory,
            state.num,
            self.features,
            desc_uva=state.desc_uva,
            avail_uva=state.avail_uva,
            used_uva=state.used_uva,
            base=state.base,
            call_fd=_call_fd(state.call),
            calls=self.calls,
            log=dirty_log,
            used_log_gpa=used_log_gpa,
        )
        given, was_broken = self._given.pop(index, (None, False))
        if state.base == 0 != given and virtqueue.unwritten:
            # User-mode Linux says so of any ring. Who means it has been around a packed one
            # once, and each descriptor shows it.
            virtqueue.base = first_base(self.features)
        if self.inflight is not None and index < self.inflight.num_queues:
            virtqueue.track(self.inflight.queue(index))
            # A back-end that was killed may have given chains back and told nobody.
            virtqueue.notify()
        position = self._claim(index)
        if given == state.base and not was_broken:
            state.broken = ""  # it goes on where we stopped it
            virtqueue.keep(position)
        else:
            kept = position.found if position is not None else None
            self._reconcile(index, virtqueue, position, kept)
        self.device.ring_started(index, virtqueue, _eventfd(state.kick))
        if virtqueue.again:
            log.info(
                "%s: ring %d: %d requests that were under way are done again",
                self.device.name,
                index,
                virtqueue.again,
            )
        self.rings[index] = RunningRing(virtqueue)
        self.device.ring_enabled(index, state.enabled)
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
            # Who was there before may have given chains back and told nobody.
            virtqueue.notify()

    def _claim(self, index: int) -> KeptPosition | None:
        """Where a packed ring's position is kept."""
        owner, state = self.device.positions, self.session.rings[index]
        if owner is None or not is_packed(self.features):
            return None
        where = self._where(state.desc_uva)
        return None if where is None else owner.claim(*where, state.num)

    def _where(self, uva: int | None) -> tuple[tuple[int, int], int] | None:
        """The file that an address is in, and its guest address: the same in another life."""
        for region in self._regions():
            if uva is not None and region.uva <= uva < region.uva + region.size:
                return self._files[region.gpa], region.gpa + uva - region.uva
        return None

    def _move_positions(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            position = self.rings[index].virtqueue.kept
            where = self._where(self.session.rings[index].desc_uva)
            if position is not None and where is not None:
                position.move(*where)

    async def stop_ring(self, index: int) -> int:
        """Drains and stops a ring; returns the base at which it would go on."""
        ring = self.rings[index]
        drained = await self.device.ring_drain(index, DRAIN_DEADLINE_S)
        ring.virtqueue.set_live(False)
        await aside(self._stop_held, index)
        if not drained:
            raise self._hung(index)
        position = ring.virtqueue.kept
        reason = self.session.rings[index].stop_reason
        if position is not None and reason is not StopReason.UNMAPPED:
            position.forget()  # the front-end knows
        self._given[index] = ring.virtqueue.base, ring.virtqueue.broken
        return ring.virtqueue.base

    def _stop_held(self, index: int) -> None:
        self.workers.wait()
        self._take_down(index)

    def _take_down(self, index: int) -> None:
        """The ring is held; the device gives it back."""
        ring = self.rings.pop(index)
        self.device.ring_stopped(index)
        if ring.virtqueue.kept is not None and self.device.positions is not None:
            self.device.positions.release(ring.virtqueue.kept)
        self._retire(ring.virtqueue.memory)

    def _hung(self, index: int) -> GuestError:
        return GuestError(
            f"ring {index}: requests still under way after {DRAIN_DEADLINE_S:g} s",
            "see whether the storage answers; the front-end has to connect again",
        )

    @contextlib.contextmanager
    def _replacing(self, replaced: OwnedFd | None) -> Iterator[None]:
        """Closes `replaced` when nobody uses it any more: at the end, if the block fails."""
        try:
            yield
        except BaseException:
            if replaced is not None:
                self.leftovers.append(replaced)
            raise
        _close(replaced)

    def _set_call(self, index: int) -> None:
        call_fd = _call_fd(self.session.rings[index].call)
        with self._held([index]) as virtqueues:
            virtqueues[0].set_call(call_fd)

    def _set_addresses(self, index: int) -> None:
        state = self.session.rings[index]
        with self._held([index]) as virtqueues:
            virtqueues[0].set_addresses(
                desc_uva=state.desc_uva, avail_uva=state.avail_uva, used_uva=state.used_uva
            )
            virtqueues[0].set_log(*self._log_of(index))
            self._move_positions([index])


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


def _signal(fd: OwnedFd) -> None:
    """Signals a front-end's fd, behind the event loop's back: whatever watches it may take long.

    Nothing can close it before, as closing has to wait its turn too.
    """
    fd.account.closing.do(functools.partial(signal_once, fd.fileno()))


def _close(fd: OwnedFd | None) -> None:
    if fd is not None:
        fd.close()


def _call_fd(fd: OwnedFd | None) -> int:
    """The number of a call fd, -1 for none: an eventfd, or a Unix socket.

    User-mode Linux gives sockets, since an eventfd raises no signal that it could wait for.
    """
    if fd is not None and is_unix_socket(fd.fileno()):
        return fd.fileno()
    return _eventfd(fd, "a call fd must be an eventfd or a Unix socket")


def _eventfd(fd: OwnedFd | None, rule: str = "a kick or error fd must be an eventfd") -> int:
    """The number of a notification fd, -1 for none.

    Only an eventfd will do, for the reasons that `notify` gives. Its blocking flag is cleared.
    """
    if fd is None:
        return -1
    number = fd.fileno()
    if not is_eventfd(number):
        raise ProtocolError(f"{rule}, not {kind_of(number)}", "see docs/front-ends.md")
    os.set_blocking(number, False)
    return number
