"""The back-end's state machine: messages in, effects out. No I/O.

    for effect in session.handle(message):
        carry it out                        # StopRing: then session.ring_stopped(index, base)
    for effect in session.done(message, error or None):
        carry it out                        # the answer; raises where the session is over

The session checks sense: order, features, ranges. What it holds (`rings`, `regions`,
`features`) is changed by `handle`, before the effects are carried out: an effect that
fails ends the session, unless the device refuses it (`Refused`), which changes nothing here.

Source: QEMU, docs/interop/vhost-user.rst; sections are named where a rule comes from one.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vhostpy._inflight import area_bytes
from vhostpy._spec import Feature, Limit, ProtocolFeature
from vhostpy.device import Device
from vhostpy.effects import (
    AddRegion,
    Effect,
    EnableRing,
    MakeInflight,
    RemoveRegion,
    Reply,
    ResetDevice,
    SendRarp,
    SetBackendChannel,
    SetFeatures,
    SetInflight,
    SetLog,
    SetMemory,
    SetMtu,
    SetRingAddresses,
    SetRingBase,
    SetRingCall,
    SetRingErr,
    SetRingKick,
    SetStatus,
    StopRing,
    WriteConfig,
)
from vhostpy.errors import ProtocolError, Refused, VhostpyError
from vhostpy.fds import OwnedFd
from vhostpy.handshake import SHARE_ON, describe, feature_names, listed, protocol_feature_names
from vhostpy.layout import first_base
from vhostpy.payloads import (
    CONFIG_SIZE_MAX,
    U64,
    Config,
    Empty,
    Inflight,
    Log,
    MemoryRegion,
    Payload,
    VringState,
)
from vhostpy.protocol import FRONT_END_TABLE, UNKNOWN, FrontEndRequest, Message
from vhostpy.regions import FILE_END, check_regions, first_unmapped
from vhostpy.ringstate import Ring, RingEvent, RingState, StopReason

log = logging.getLogger("vhostpy")

CORE_FEATURES = 1 << Feature.PROTOCOL_FEATURES | 1 << Feature.LOG_ALL
CORE_PROTOCOL_FEATURES = (
    1 << ProtocolFeature.MQ
    | 1 << ProtocolFeature.LOG_SHMFD
    | 1 << ProtocolFeature.REPLY_ACK
    | 1 << ProtocolFeature.BACKEND_REQ
    | 1 << ProtocolFeature.CONFIGURE_MEM_SLOTS
    | 1 << ProtocolFeature.STATUS
    | 1 << ProtocolFeature.RESET_DEVICE
)
# What SET_FEATURES may change while a ring runs.
CHANGEABLE_FEATURES = 1 << Feature.LOG_ALL

VRING_F_LOG = 1  # "A vring address description"
MTU_MIN, MTU_MAX = 68, 65535  # virtio 1.3, "Network Device / Device configuration layout"


class Session:
    """One front-end's session with one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.offered = device.features() | CORE_FEATURES
        self.protocol_offered = device.protocol_features() | CORE_PROTOCOL_FEATURES
        self.features: int | None = None  # None: not negotiated yet
        self.protocol_features = 0
        self.rings = [Ring(index) for index in range(device.queue_limit)]
        self.regions: list[MemoryRegion] = []
        self.logging = False  # a dirty log is known
        self.device_status = 0
        self.refused: Counter[str] = Counter()
        # Why it is over. Not the exception: that keeps frames alive, and fds in them.
        self.ended = ""
        self.messages = 0  # handled

    # Doors -----------------------------------------------------------------------------

    def handle(self, message: Message) -> list[Effect]:
        """What `message` changes. Raises ProtocolError; `done` is called in any case."""
        if self.ended:
            raise ProtocolError(f"{message.name} after the session ended: {self.ended}")
        self.messages += 1
        served = SERVED.get(message.request)
        if served is None:
            raise Refused(_why_not(message))
        for feature, offer, verb in (
            (served.offered, self.protocol_offered, "offered"),
            (served.negotiated, self.protocol_features, "negotiated"),
        ):
            if feature is not None and not offer >> feature & 1:
                raise Refused(f"{message.name}: protocol feature {feature.name} was not {verb}")
        return served.handler(self, message)

    def done(self, message: Message, error: VhostpyError | None = None) -> Iterator[Effect]:
        """The answer that `message` still needs, after its effects: to be iterated.

        An error is raised again when the session is over: always unless it is `Refused`,
        and also then when the message has no answer that says no.
        """
        message.close()
        if error is None:
            payload = self._yes(message)
            if payload is not None:
                yield _reply(message, payload)
            return
        payload = self._no(message)
        if payload is None or not isinstance(error, Refused):
            self.ended = str(error)
        else:
            # One name for all that is unknown, and only the first of a kind is logged: a
            # front-end must fill neither our memory nor the operator's disk.
            name = message.name if message.request in FRONT_END_TABLE else "unknown request"
            self.refused[name] += 1
            if self.refused[name] == 1:
                log.warning("%s: refused: %s", self.device.name, error)
        if payload is not None:
            yield _reply(message, payload)
        if self.ended:
            try:
                raise error
            finally:
                # No cycle of frame and traceback: fds in the frames are closed at once.
                del error

    def ring_stopped(self, index: int, base: int) -> list[Effect]:
        """A StopRing was carried out; the ring would go on at `base`."""
        ring = self.rings[index]
        reason, ring.stop_reason = ring.stop_reason, None
        if reason is not StopReason.RESET:
            ring.base = base
        if reason is not StopReason.UNMAPPED:
            ring.close_kick()
        if reason is StopReason.GET_BASE:
            request = FrontEndRequest.GET_VRING_BASE
            return [Reply(request, VringState(index, self.base_of(ring)).pack())]
        return []

    def inflight_made(self, made: MakeInflight, fd: OwnedFd) -> list[Effect]:
        """A MakeInflight was carried out; the front-end gets `fd`."""
        payload = Inflight(made.size, 0, made.num_queues, made.queue_size)
        return [Reply(FrontEndRequest.GET_INFLIGHT_FD, payload.pack(), (fd,))]

    def close(self) -> None:
        """Closes all fds; the rings were stopped before."""
        for ring in self.rings:
            ring.close()

    def status(self) -> dict[str, Any]:
        """Where the handshake stands and what it waits for, in words; and the details."""
        return describe(self)

    # Answers ---------------------------------------------------------------------------

    def _wants_ack(self, message: Message) -> bool:
        """ "VHOST_USER_PROTOCOL_F_REPLY_ACK": for messages without an answer of their own."""
        return message.need_reply and bool(self._protocol(ProtocolFeature.REPLY_ACK))

    def _yes(self, message: Message) -> Payload | None:
        if FRONT_END_TABLE[message.request].replies:
            return None  # answered by its handler
        if self._wants_ack(message):
            return U64(0)
        # "Communication": needs a reply with LOG_SHMFD, or QEMU waits for ever.
        if message.request == FrontEndRequest.SET_LOG_BASE:
            return Empty()
        return None

    def _no(self, message: Message) -> Payload | None:
        known = FRONT_END_TABLE.get(message.request, UNKNOWN)
        if known.replies:
            return known.refusal
        return U64(1) if self._wants_ack(message) else None

    # Negotiation -----------------------------------------------------------------------

    def _feature(self, bit: int) -> int:
        return (self.features or 0) >> bit & 1

    def _protocol(self, bit: int) -> int:
        return self.protocol_features >> bit & 1

    @property
    def _packed(self) -> bool | None:
        return None if self.features is None else bool(self._feature(Feature.RING_PACKED))

    def _get_features(self, message: Message) -> list[Effect]:
        return [_reply(message, U64(self.offered))]

    def _set_features(self, message: Message) -> list[Effect]:
        features = message.payload.value
        beyond = features & ~self.offered
        if beyond:
            names = feature_names(beyond, self.device.kind)
            raise Refused(f"SET_FEATURES: not offered: {', '.join(names)}")
        changed = features ^ (self.features or 0)
        running = [ring.index for ring in self.rings if ring.started]
        if running and changed & ~CHANGEABLE_FEATURES:
            names = feature_names(changed & ~CHANGEABLE_FEATURES, self.device.kind)
            raise Refused(
                f"SET_FEATURES: {', '.join(names)} changed while rings {listed(running)} run",
                "the front-end has to stop the rings (GET_VRING_BASE) first",
            )
        self.features = features
        self.logging = self.logging and bool(self._feature(Feature.LOG_ALL))
        effects: list[Effect] = [SetFeatures(features)]
        if not self._feature(Feature.PROTOCOL_FEATURES):
            # "Ring states": without it all rings are enabled at once.
            for ring in self.rings:
                effects += self._enable(ring, True)
        return effects + self._settle_all()

    def _get_protocol_features(self, message: Message) -> list[Effect]:
        return [_reply(message, U64(self.protocol_offered))]

    def _set_protocol_features(self, message: Message) -> list[Effect]:
        beyond = message.payload.value & ~self.protocol_offered
        if beyond:
            names = protocol_feature_names(beyond)
            raise Refused(f"SET_PROTOCOL_FEATURES: not offered: {', '.join(names)}")
        self.protocol_features = message.payload.value
        return []

    def _nothing(self, message: Message) -> list[Effect]:
        return []

    def _reset_owner(self, message: Message) -> list[Effect]:
        # Deprecated: "either ignore this message, or use it to disable all rings". Without
        # PROTOCOL_FEATURES nothing could enable them again.
        if not self._feature(Feature.PROTOCOL_FEATURES):
            return []
        return [effect for ring in self.rings for effect in self._enable(ring, False)]

    def _get_queue_num(self, message: Message) -> list[Effect]:
        return [_reply(message, U64(self.device.queue_number))]

    def _set_backend_req_fd(self, message: Message) -> list[Effect]:
        return [SetBackendChannel(message.fds[0].move())]

    # Memory ----------------------------------------------------------------------------

    def _get_max_mem_slots(self, message: Message) -> list[Effect]:
        return [_reply(message, U64(int(Limit.MEM_SLOTS_MAX)))]

    def _set_mem_table(self, message: Message) -> list[Effect]:
        regions = message.payload.regions
        if not regions:
            raise ProtocolError("SET_MEM_TABLE: no memory regions", SHARE_ON)
        check_regions(message.name, regions)
        return self._replace_memory(
            list(regions), SetMemory(regions, tuple(fd.move() for fd in message.fds))
        )

    def _add_mem_reg(self, message: Message) -> list[Effect]:
        region = message.payload.region
        if self._find_region(region) is not None:
            # QEMU before 8.0 adds, and removes, each region once for every queue pair.
            return []
        regions = [*self.regions, region]
        if len(regions) > Limit.MEM_SLOTS_MAX:
            raise ProtocolError(
                f"ADD_MEM_REG: {len(regions)} regions, at most {int(Limit.MEM_SLOTS_MAX)}"
            )
        check_regions(message.name, regions)
        return self._replace_memory(regions, AddRegion(region, message.fds[0].move()))

    def _rem_mem_reg(self, message: Message) -> list[Effect]:
        index = self._find_region(message.payload.region)
        if index is None:
            return []  # the pair before has removed it
        region = self.regions[index]
        rest = self.regions[:index] + self.regions[index + 1 :]
        return self._replace_memory(rest, RemoveRegion(region))

    def _find_region(self, wanted: MemoryRegion) -> int | None:
        """Which of the regions it is. "The mmap offset is ignored.\""""
        for i, region in enumerate(self.regions):
            if (region.gpa, region.size, region.uva) == (wanted.gpa, wanted.size, wanted.uva):
                return i
        return None

    def _replace_memory(self, regions: list[MemoryRegion], effect: Effect) -> list[Effect]:
        """Rings that would lie in no region stop before and start again when they do."""
        self.regions = regions
        effects: list[Effect] = []
        for ring in self.rings:
            if ring.started and self._unmapped(ring):
                effects += self._advance(ring, RingEvent.UNMAPPED, StopReason.UNMAPPED)
        return [*effects, effect, *self._settle_all()]

    # Dirty log -------------------------------------------------------------------------

    def _set_log_base(self, message: Message) -> list[Effect]:
        where = message.payload
        if not self._protocol(ProtocolFeature.LOG_SHMFD):
            raise Refused("SET_LOG_BASE: a log without a file needs LOG_SHMFD to be negotiated")
        if not isinstance(where, Log) or len(message.fds) != 1:
            raise ProtocolError(
                f"SET_LOG_BASE: {len(message.fds)} fds and {where!r}, expected one and a Log"
            )
        if where.size == 0 or where.offset + where.size > FILE_END:
            raise ProtocolError(
                f"SET_LOG_BASE: {where.size:#x} bytes at offset {where.offset:#x} are no log"
            )
        self.logging = True
        return [SetLog(message.fds[0].move(), where.offset, where.size), *self._settle_all()]

    # Requests under way ----------------------------------------------------------------

    def _check_inflight(self, message: Message) -> Inflight:
        asked: Inflight = message.payload
        if not 1 <= asked.num_queues <= len(self.rings):
            raise ProtocolError(
                f"{message.name}: {asked.num_queues} queues, the device has {len(self.rings)}"
            )
        if not 1 <= asked.queue_size <= Limit.QUEUE_SIZE_MAX:
            raise ProtocolError(
                f"{message.name}: queues of {asked.queue_size}, expected 1 to "
                f"{int(Limit.QUEUE_SIZE_MAX)}"
            )
        return asked

    def _get_inflight_fd(self, message: Message) -> list[Effect]:
        asked = self._check_inflight(message)
        size = area_bytes(asked.num_queues, asked.queue_size)
        return [MakeInflight(size, asked.num_queues, asked.queue_size)]

    def _set_inflight_fd(self, message: Message) -> list[Effect]:
        area = self._check_inflight(message)
        if not area.mmap_size or area.mmap_offset + area.mmap_size > FILE_END:
            raise ProtocolError(
                f"{message.name}: {area.mmap_size:#x} bytes at offset {area.mmap_offset:#x}"
            )
        running = [ring.index for ring in self.rings if ring.started]
        if running:
            raise Refused(f"{message.name}: rings {listed(running)} run")
        return [
            SetInflight(
                message.fds[0].move(),
                area.mmap_offset,
                area.mmap_size,
                area.num_queues,
                area.queue_size,
            )
        ]

    # Rings -----------------------------------------------------------------------------

    def _ring(self, message: Message) -> Ring:
        """The ring that the message names, by the full width of its index."""
        index = message.payload.index
        if index >= len(self.rings):
            raise ProtocolError(
                f"{message.name}: ring {index}, the device has {len(self.rings)} (from 0)"
            )
        return self.rings[index]

    def _set_vring_num(self, message: Message) -> list[Effect]:
        ring, num = self._ring(message), message.payload.num
        if not 1 <= num <= Limit.QUEUE_SIZE_MAX:
            raise ProtocolError(
                f"SET_VRING_NUM: ring {ring.index}: {num} descriptors, expected 1 to "
                f"{int(Limit.QUEUE_SIZE_MAX)}"
            )
        if ring.started:
            if num == ring.num:
                return []
            raise Refused(
                f"SET_VRING_NUM: ring {ring.index}: {num} descriptors while it runs with {ring.num}"
            )
        ring.num = num
        ring.check(self._packed)
        return self._settle(ring)

    def _set_vring_addr(self, message: Message) -> list[Effect]:
        ring, address = self._ring(message), message.payload
        if address.flags & ~VRING_F_LOG:
            raise Refused(f"SET_VRING_ADDR: ring {ring.index}: unknown flags {address.flags:#x}")
        ring.desc_uva = address.desc_uva
        ring.avail_uva = address.avail_uva
        ring.used_uva = address.used_uva
        ring.log_used = bool(address.flags & VRING_F_LOG)
        ring.used_log_gpa = address.used_log_gpa if ring.log_used else 0
        ring.check(self._packed)
        if ring.started:
            self._demand_mapped(ring)
            return [SetRingAddresses(ring.index)]
        return self._settle(ring)

    def _set_vring_base(self, message: Message) -> list[Effect]:
        ring, base = self._ring(message), message.payload.num
        if self._packed is False and base > 0xFFFF:
            raise ProtocolError(f"SET_VRING_BASE: ring {ring.index}: base {base}, at most 65535")
        ring.base = base
        return [SetRingBase(ring.index)] if ring.started else []

    def _get_vring_base(self, message: Message) -> list[Effect]:
        ring = self._ring(message)
        effects = self._advance(ring, RingEvent.STOP, StopReason.GET_BASE)
        if effects:
            return effects  # ring_stopped() answers
        ring.close_kick()
        return [_reply(message, VringState(ring.index, self.base_of(ring)))]

    def base_of(self, ring: Ring) -> int:
        """Where `ring` starts, if it does now."""
        return first_base(self.features or 0) if ring.base is None else ring.base

    def _set_vring_kick(self, message: Message) -> list[Effect]:
        ring = self._ring(message)
        replaced, ring.kick = ring.kick, _moved(message)
        effects = self._advance(ring, RingEvent.KICK, replaced)
        if not effects and replaced is not None:
            replaced.close()
        return effects + self._settle(ring)

    def _set_vring_call(self, message: Message) -> list[Effect]:
        ring = self._ring(message)
        replaced, ring.call = ring.call, _moved(message)
        if ring.started:
            return [SetRingCall(ring.index, replaced)]
        if replaced is not None:
            replaced.close()
        return []

    def _set_vring_err(self, message: Message) -> list[Effect]:
        ring = self._ring(message)
        replaced, ring.err = ring.err, _moved(message)
        if ring.started:
            return [SetRingErr(ring.index, replaced)]
        if replaced is not None:
            replaced.close()
        return []

    def _set_vring_enable(self, message: Message) -> list[Effect]:
        ring, num = self._ring(message), message.payload.num
        if num > 1:
            raise ProtocolError(f"SET_VRING_ENABLE: ring {ring.index}: {num}, expected 0 or 1")
        return self._enable(ring, bool(num))

    def _enable(self, ring: Ring, enabled: bool) -> list[Effect]:
        if ring.enabled == enabled:
            return []
        ring.enabled = enabled
        return [EnableRing(ring.index, enabled)] if ring.started else []

    def _advance(
        self, ring: Ring, event: RingEvent, detail: StopReason | OwnedFd | None = None
    ) -> list[Effect]:
        """Moves `ring` on; `detail` is what the effect needs to know."""
        effect = ring.advance(event)
        if effect is None:
            return []
        if effect is StopRing:
            assert isinstance(detail, StopReason)
            ring.stop_reason = detail
        if effect is SetRingKick:
            assert not isinstance(detail, StopReason)
            return [SetRingKick(ring.index, detail)]
        return [effect(ring.index)]  # type: ignore[call-arg]

    def _settle(self, ring: Ring) -> list[Effect]:
        """Starts `ring` if nothing is missing. Raises where its addresses are not memory."""
        if ring.state is not RingState.WAITING or self._missing_before_memory(ring):
            return []
        if not self.regions:
            return []
        self._demand_mapped(ring)
        return self._start(ring)

    def _settle_all(self) -> list[Effect]:
        """Starts the rings that had only waited for this; others may wait for more regions."""
        return [
            effect
            for ring in self.rings
            if ring.state is RingState.WAITING and not self.missing(ring)
            for effect in self._start(ring)
        ]

    def _start(self, ring: Ring) -> list[Effect]:
        ring.check(self._packed)
        return self._advance(ring, RingEvent.COMPLETE)

    def _missing_before_memory(self, ring: Ring) -> str:
        """What `ring` waits for, in words; "" when it is only memory."""
        if self.features is None:
            return "the features (SET_FEATURES)"
        if ring.state is RingState.STOPPED:
            return "a kick fd (SET_VRING_KICK)"
        if not ring.num:
            return "its size (SET_VRING_NUM)"
        if ring.desc_uva is None:
            return "its addresses (SET_VRING_ADDR)"
        log_comes = self._feature(Feature.LOG_ALL) and self._protocol(ProtocolFeature.LOG_SHMFD)
        if log_comes and not self.logging:
            # QEMU sends it behind the kicks; what we wrote before would not be migrated.
            return "the dirty log (SET_LOG_BASE)"
        return ""

    def missing(self, ring: Ring) -> str:
        """What `ring` waits for, in words; "" for nothing."""
        missing = self._missing_before_memory(ring)
        if missing:
            return missing
        if not self.regions:
            return f"guest memory (SET_MEM_TABLE); {SHARE_ON}"
        unmapped = self._unmapped(ring)
        return f"memory for its {unmapped}" if unmapped else ""

    def _unmapped(self, ring: Ring) -> str:
        """The first part of `ring` that lies in no region, in words; "" for none."""
        part = first_unmapped(ring.parts(bool(self._packed)), self.regions)
        return "" if part is None else f"{part.name} at UVA {part.uva:#x} ({part.size} bytes)"

    def _demand_mapped(self, ring: Ring) -> None:
        unmapped = self._unmapped(ring)
        if unmapped:
            raise ProtocolError(
                f"ring {ring.index}: its {unmapped} is in none of the {len(self.regions)} regions",
                "the front-end must share the memory that its rings lie in; " + SHARE_ON,
            )

    # Device ----------------------------------------------------------------------------

    def _get_config(self, message: Message) -> list[Effect]:
        asked = message.payload
        if not asked.size or asked.offset + asked.size > CONFIG_SIZE_MAX:
            raise Refused(
                f"GET_CONFIG: {asked.size} bytes at {asked.offset}, the config space has "
                f"{CONFIG_SIZE_MAX}"
            )
        # SPDK's initiator asks for 256 bytes whatever the device has, and wants as many.
        space = self.device.config().ljust(CONFIG_SIZE_MAX, b"\0")
        data = space[asked.offset : asked.offset + asked.size]
        return [_reply(message, Config(asked.offset, asked.flags, data))]

    def _set_config(self, message: Message) -> list[Effect]:
        config, size = message.payload, len(self.device.config())
        if config.flags > 1:
            raise ProtocolError(f"SET_CONFIG: flags {config.flags:#x}, expected 0 or 1")
        if not config.size or config.offset + config.size > size:
            raise Refused(
                f"SET_CONFIG: {config.size} bytes at {config.offset}, the config space has {size}"
            )
        return [WriteConfig(config.offset, config.data, migration=bool(config.flags))]

    def _net_set_mtu(self, message: Message) -> list[Effect]:
        mtu = message.payload.value
        if not MTU_MIN <= mtu <= MTU_MAX:
            raise Refused(f"NET_SET_MTU: {mtu}, expected {MTU_MIN} to {MTU_MAX}")
        return [SetMtu(mtu)]

    def _send_rarp(self, message: Message) -> list[Effect]:
        # "The first 6 bytes of the payload contain the mac address of the guest."
        return [SendRarp(message.payload.value.to_bytes(8, sys.byteorder)[:6])]

    def _get_status(self, message: Message) -> list[Effect]:
        return [_reply(message, U64(self.device_status))]

    def _set_status(self, message: Message) -> list[Effect]:
        status = message.payload.value
        if status > 0xFF:
            raise ProtocolError(f"SET_STATUS: {status:#x}, virtio's device status has 8 bits")
        self.device_status = status
        return [SetStatus(status)]

    def _reset_device(self, message: Message) -> list[Effect]:
        effects: list[Effect] = []
        for ring in self.rings:
            stop = self._advance(ring, RingEvent.STOP, StopReason.RESET)
            if not stop:
                ring.close_kick()
            effects += stop
            ring.reset()
        # Memory stays: QEMU sends only what changed since, where slots are negotiated.
        self.features = None
        self.device_status = 0
        return [*effects, ResetDevice()]


# What is served, by whom, and what has to be there first. --------------------------------


@dataclass(frozen=True, slots=True)
class Served:
    """Who handles a request, and the protocol feature that it needs."""

    handler: Callable[[Session, Message], list[Effect]]
    offered: ProtocolFeature | None = None  # "present in GET_PROTOCOL_FEATURES"
    negotiated: ProtocolFeature | None = None  # "successfully negotiated"


_R, _F = FrontEndRequest, ProtocolFeature

SERVED: dict[int, Served] = {
    _R.GET_FEATURES: Served(Session._get_features),
    _R.SET_FEATURES: Served(Session._set_features),
    _R.SET_OWNER: Served(Session._nothing),
    _R.RESET_OWNER: Served(Session._reset_owner),
    _R.SET_MEM_TABLE: Served(Session._set_mem_table),
    _R.SET_LOG_BASE: Served(Session._set_log_base),
    # "May be used to inform the front-end that the log has been modified": it is not.
    _R.SET_LOG_FD: Served(Session._nothing),
    _R.SET_VRING_NUM: Served(Session._set_vring_num),
    _R.SET_VRING_ADDR: Served(Session._set_vring_addr),
    _R.SET_VRING_BASE: Served(Session._set_vring_base),
    _R.GET_VRING_BASE: Served(Session._get_vring_base),
    _R.SET_VRING_KICK: Served(Session._set_vring_kick),
    _R.SET_VRING_CALL: Served(Session._set_vring_call),
    _R.SET_VRING_ERR: Served(Session._set_vring_err),
    _R.GET_PROTOCOL_FEATURES: Served(Session._get_protocol_features),
    _R.SET_PROTOCOL_FEATURES: Served(Session._set_protocol_features),
    _R.GET_QUEUE_NUM: Served(Session._get_queue_num, offered=_F.MQ),
    _R.SET_VRING_ENABLE: Served(Session._set_vring_enable),
    _R.SEND_RARP: Served(Session._send_rarp, offered=_F.RARP),
    _R.NET_SET_MTU: Served(Session._net_set_mtu, offered=_F.MTU),
    _R.SET_BACKEND_REQ_FD: Served(Session._set_backend_req_fd, offered=_F.BACKEND_REQ),
    _R.GET_CONFIG: Served(Session._get_config, negotiated=_F.CONFIG),
    _R.SET_CONFIG: Served(Session._set_config, negotiated=_F.CONFIG),
    _R.RESET_DEVICE: Served(Session._reset_device, offered=_F.RESET_DEVICE),
    _R.GET_MAX_MEM_SLOTS: Served(Session._get_max_mem_slots, negotiated=_F.CONFIGURE_MEM_SLOTS),
    _R.ADD_MEM_REG: Served(Session._add_mem_reg, negotiated=_F.CONFIGURE_MEM_SLOTS),
    _R.REM_MEM_REG: Served(Session._rem_mem_reg, negotiated=_F.CONFIGURE_MEM_SLOTS),
    _R.GET_INFLIGHT_FD: Served(Session._get_inflight_fd, offered=_F.INFLIGHT_SHMFD),
    _R.SET_INFLIGHT_FD: Served(Session._set_inflight_fd, offered=_F.INFLIGHT_SHMFD),
    _R.SET_STATUS: Served(Session._set_status, negotiated=_F.STATUS),
    _R.GET_STATUS: Served(Session._get_status, negotiated=_F.STATUS),
}

# What is not, and the feature that would have to be offered for it.
NOT_SERVED: dict[int, str] = {
    _R.IOTLB_MSG: "feature ACCESS_PLATFORM",
    _R.SET_VRING_ENDIAN: "protocol feature CROSS_ENDIAN",
    _R.CREATE_CRYPTO_SESSION: "protocol feature CRYPTO_SESSION",
    _R.CLOSE_CRYPTO_SESSION: "protocol feature CRYPTO_SESSION",
    _R.POSTCOPY_ADVISE: "protocol feature PAGEFAULT",
    _R.POSTCOPY_LISTEN: "protocol feature PAGEFAULT",
    _R.POSTCOPY_END: "protocol feature PAGEFAULT",
    _R.GPU_SET_SOCKET: "a graphics device",
    _R.VRING_KICK: "protocol feature INBAND_NOTIFICATIONS",
    _R.GET_SHARED_OBJECT: "protocol feature SHARED_OBJECT",
    _R.SET_DEVICE_STATE_FD: "protocol feature DEVICE_STATE",
    _R.CHECK_DEVICE_STATE: "protocol feature DEVICE_STATE",
    _R.GET_SHMEM_CONFIG: "protocol feature SHMEM",
    _R.GET_VRING_BASE_SKIP_DRAIN: "protocol feature GET_VRING_BASE_SKIP_DRAIN",
}


def _why_not(message: Message) -> str:
    needs = NOT_SERVED.get(message.request)
    if needs is None:
        return f"{message.name}: the vhost-user document knows no such request"
    return f"{message.name}: {needs} is not offered"


# Small things --------------------------------------------------------------------------


def _reply(message: Message, payload: Payload) -> Reply:
    return Reply(message.request, payload.pack())


def _moved(message: Message) -> OwnedFd | None:
    return message.fds[0].move() if message.fds else None
