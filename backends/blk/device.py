"""A virtio-blk device behind one socket: features, config space, rings to queues.

Each virtqueue has a DiskQueue, a channel into the storage, and a place on a worker.
"""

import asyncio
import logging
import struct
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from vhostpy._ring import Virtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.backends.blk.clear import MAX_CLEAR_SECTORS, MAX_CLEAR_SEGMENTS
from vhostpy.backends.blk.latency import add_bins, summary
from vhostpy.backends.blk.queue import SEG_MAX, DiskQueue
from vhostpy.backends.storage.storage import Storage
from vhostpy.errors import SHARE_ALL, ConfigError, GuestError, ProtocolError, Refused
from vhostpy.runtime.limits import Limits, Settings
from vhostpy.runtime.pollable import Conduct
from vhostpy.runtime.pool import Workers
from vhostpy.system.aside import aside

log = logging.getLogger("vhostpy")

SECTOR = 512
PHYSICAL_BLOCK = 4096  # what file systems below and SSDs like to be written in
WRITEBACK_OFFSET = 32
WRITE_BACK, WRITE_THROUGH = 1, 2  # notes
QUEUES_MAX = 256
SERIAL_BYTES = 20

# virtio 1.3, "Block Device / Device configuration layout": struct virtio_blk_config,
# zoned fields and all: some front-ends read them whatever was negotiated.
CONFIG = struct.Struct("<QII HBB I BBHI BxH III IIB3x III 24x")
CONFIG_FIELDS = (
    *("capacity", "size_max", "seg_max", "cylinders", "heads", "sectors", "blk_size"),
    *("physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size"),
    *("writeback", "num_queues"),
    *("max_discard_sectors", "max_discard_seg", "discard_sector_alignment"),
    *("max_write_zeroes_sectors", "max_write_zeroes_seg", "write_zeroes_may_unmap"),
    *("max_secure_erase_sectors", "max_secure_erase_seg", "secure_erase_sector_alignment"),
)


@dataclass(slots=True)
class _Ring:
    """A started ring."""

    queue: DiskQueue
    kick_fd: int


class Disk:
    """A disk; see vhostpy.device.device.Device for who calls what when."""

    kind = "blk"
    lossy = False
    positions = None  # INFLIGHT has them

    def __init__(
        self,
        name: str,
        storage: Storage,
        workers: Workers,
        *,
        queues: int = 128,
        serial: str = "",
        block_size: int = 512,
        read_only: bool = False,
    ) -> None:
        if not 1 <= queues <= QUEUES_MAX:
            raise ConfigError(f"{name}: {queues} queues", f"1 to {QUEUES_MAX}")
        if not serial.isascii() or len(serial) > SERIAL_BYTES:
            raise ConfigError(
                f"{name}: serial {serial!r}", f"at most {SERIAL_BYTES} ASCII characters"
            )
        if block_size not in (512, 1024, 2048, 4096):
            raise ConfigError(f"{name}: block size {block_size}", "512, 1024, 2048 or 4096")
        if storage.size_bytes % block_size:
            raise ConfigError(
                f"{name}: {storage.size_bytes} bytes are no multiple of the block size {block_size}"
            )
        self.name = name
        self.storage = storage
        self.workers = workers
        self.queue_limit = self.queue_number = queues
        self.serial = serial
        self.block_size = max(block_size, storage.block_size)
        self.read_only = read_only or storage.read_only
        self._writeback = True
        self._write_through = False
        self._features = 0
        self._rings: dict[int, _Ring] = {}
        self._past: dict[int, dict[str, Any]] = {}  # counters of rings that stopped
        self._past_latency: dict[str, Any] = {}
        self._conduct = Conduct(name)
        self._limits = Limits()
        self._hung: list[DiskQueue] = []
        self._burying = threading.Lock()  # only ever held for a moment
        self._error_told = False
        self._fault_told = False

    # What it is ----------------------------------------------------------------------

    def features(self) -> int:
        bits = [
            *(Feature.VERSION_1, Feature.ANY_LAYOUT, Feature.INDIRECT_DESC, Feature.EVENT_IDX),
            # Not IN_ORDER: requests come back in the order in which the storage is done.
            Feature.RING_PACKED,
            *(Feature.LOG_ALL, Feature.PROTOCOL_FEATURES),
            *(Feature.BLK_SEG_MAX, Feature.BLK_BLK_SIZE, Feature.BLK_TOPOLOGY),
            *(Feature.BLK_FLUSH, Feature.BLK_CONFIG_WCE),
        ]
        if self.queue_limit > 1:
            bits.append(Feature.BLK_MQ)
        if self.read_only:
            bits.append(Feature.BLK_RO)
        else:
            if self.storage.can_discard:
                bits.append(Feature.BLK_DISCARD)
            if self.storage.can_write_zeroes:
                bits.append(Feature.BLK_WRITE_ZEROES)
            if self.storage.can_secure_erase:
                bits.append(Feature.BLK_SECURE_ERASE)
        return sum(1 << bit for bit in bits)

    def protocol_features(self) -> int:
        return 1 << ProtocolFeature.CONFIG | 1 << ProtocolFeature.INFLIGHT_SHMFD

    def config(self) -> bytes:
        sectors = self.storage.size_bytes // SECTOR
        physical = max(PHYSICAL_BLOCK, self.block_size)
        clears = not self.read_only
        discard = clears and self.storage.can_discard
        zeroes = clears and self.storage.can_write_zeroes
        erase = clears and self.storage.can_secure_erase
        values = {
            "capacity": sectors,
            "size_max": 0,  # SIZE_MAX is never offered
            "seg_max": SEG_MAX,
            # What firmware makes of a disk that is asked for cylinders.
            "cylinders": min(16383, sectors // (16 * 63)),
            "heads": 16,
            "sectors": 63,
            "blk_size": self.block_size,
            "physical_block_exp": (physical // self.block_size).bit_length() - 1,
            "alignment_offset": 0,
            "min_io_size": physical // self.block_size,
            "opt_io_size": 0,
            "writeback": int(self._writeback),
            "num_queues": self.queue_limit,
            "max_discard_sectors": MAX_CLEAR_SECTORS if discard else 0,
            "max_discard_seg": MAX_CLEAR_SEGMENTS if discard else 0,
            "discard_sector_alignment": physical // SECTOR if discard else 0,
            "max_write_zeroes_sectors": MAX_CLEAR_SECTORS if zeroes else 0,
            "max_write_zeroes_seg": MAX_CLEAR_SEGMENTS if zeroes else 0,
            "write_zeroes_may_unmap": int(zeroes),
            "max_secure_erase_sectors": MAX_CLEAR_SECTORS if erase else 0,
            "max_secure_erase_seg": MAX_CLEAR_SEGMENTS if erase else 0,
            "secure_erase_sector_alignment": (
                max(self.block_size, self.storage.erase_alignment) // SECTOR if erase else 0
            ),
        }
        return CONFIG.pack(*(values[field] for field in CONFIG_FIELDS))

    def write_config(self, offset: int, data: bytes) -> None:
        if offset != WRITEBACK_OFFSET or len(data) != 1 or data[0] > 1:
            raise ProtocolError(
                f"{self.name}: SET_CONFIG of {len(data)} bytes at offset {offset}",
                "only writeback, one byte 0 or 1 at offset 32, can be written",
            )
        self._writeback = bool(data[0])
        self._choose_write_through()

    def note(self) -> int:
        return WRITE_BACK if self._writeback else WRITE_THROUGH

    def recall(self, note: int) -> None:
        if note not in (WRITE_BACK, WRITE_THROUGH):
            raise ProtocolError(f"{self.name}: inflight: note {note}, expected 1 or 2")
        self._writeback = note == WRITE_BACK
        self._choose_write_through()

    # A session's life ------------------------------------------------------------------

    def opened(self) -> None:
        """The guest's choice of write-back or not stays: QEMU does not repeat it."""

    def closed(self) -> None:
        self._features = 0
        self._bury()

    def negotiated(self, features: int) -> None:
        self._features = features
        self._choose_write_through()

    def ring_started(self, index: int, virtqueue: Virtqueue, kick_fd: int) -> None:
        self._bury()
        if virtqueue.again and self._hung:
            # They may be the same ones. Done twice, side by side, the one that hangs could
            # write what the guest has put into its buffer since the other was done.
            raise GuestError(
                f"{self.name}: ring {index}: {virtqueue.again} requests would be done again, and "
                "requests of a session before still hang",
                "see whether the storage answers; the front-end has to connect again",
            )
        if len(self._hung) >= self.queue_limit:
            # Each has fds and keeps its guest's memory: they belong to other disks, too.
            raise GuestError(
                f"{self.name}: ring {index}: {len(self._hung)} rings of sessions before still hang",
                "see whether the storage answers; the front-end has to connect again",
            )
        queue = DiskQueue(
            virtqueue,
            self.storage,
            serial=self.serial.encode(),
            read_only=self.read_only,
            write_through=self._write_through,
            workers=self.workers,
            limits=self._limits,
            conduct=self._conduct,
        )
        try:
            if self._limits.any:
                queue.open_timer()
            self.workers.add(queue, self._fds(queue, kick_fd))
        except BaseException:
            queue.close()
            raise
        self._rings[index] = _Ring(queue, kick_fd)

    def ring_enabled(self, index: int, enabled: bool) -> None:
        # virtio-blk has no way to throw requests away: a disabled ring just rests, and
        # front-ends enable a disk's rings before its driver uses them.
        pass

    def ring_kick(self, index: int, kick_fd: int) -> None:
        self._rings[index].kick_fd = kick_fd
        self._watch(self._rings[index])

    async def ring_drain(self, index: int, deadline_s: float) -> bool:
        queue = self._rings[index].queue
        queue.drain()
        if self._limits.any:
            self.workers.nudge()  # it may sleep for them
        await aside(self.workers.wait)  # a turn under way may still take something
        live = queue.virtqueue.live
        if not live:
            # The session ends in the middle of a change: nobody can be answered.
            queue.abandon()
            self.workers.nudge()
        deadline = time.monotonic() + deadline_s
        pause_s = 0.0005
        while True:
            # What a killed back-end had under way is taken all the same: the front-end
            # could not tell another one of it.
            again = queue.virtqueue.again if live else 0
            await aside(self.workers.wait)
            if not again and not queue.inflight:
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(pause_s, left))
            pause_s = min(2 * pause_s, 0.02)

    def ring_stopped(self, index: int) -> None:
        ring = self._rings.pop(index)
        past = self._past.get(index)
        self._past[index] = _sum(past, ring.queue.counters()) if past else ring.queue.counters()
        add_bins(self._past_latency, ring.queue.latency_bins())
        self._tell(ring.queue)
        if ring.queue.inflight:
            # They end when the storage answers; until then it is polled, for that alone.
            ring.queue.abandon()
            with self._burying:
                self._hung.append(ring.queue)
            home = ring.queue.worker
            self.workers.remove(ring.queue)
            self.workers.add(ring.queue, self._fds(ring.queue, -1), worker=home)
            self._bury()
        else:
            self.workers.remove(ring.queue)
            ring.queue.close()

    def set_mtu(self, mtu: int) -> None:
        raise Refused(f"{self.name}: NET_SET_MTU for a disk")

    def send_rarp(self, mac: bytes) -> None:
        raise Refused(f"{self.name}: SEND_RARP for a disk")

    # The operator's orders -------------------------------------------------------------

    def set_limits(self, settings: Settings) -> None:
        """Holds from now on, for all queues together. Raises ConfigError for what cannot be."""
        self._limits.set(settings)
        if self._limits.any:
            for ring in list(self._rings.values()):
                if ring.queue.timer_fd < 0:
                    ring.queue.open_timer()
                    self._watch(ring)
        self.workers.nudge()  # a queue may sleep as long as the limits before told it to

    @property
    def limits(self) -> Settings:
        """What set_limits() said last."""
        settings: Settings = self._limits.settings
        return settings

    def grow(self, actual_bytes: int) -> bool:
        """The storage has `actual_bytes` now; True: more than the guest knows of."""
        before = self.storage.size_bytes
        if not self.storage.grow(actual_bytes // self.block_size * self.block_size):
            return False
        log.info("%s: grown from %d to %d bytes", self.name, before, self.storage.size_bytes)
        return True

    # Looks at it -----------------------------------------------------------------------

    def on_bell(self) -> None:
        """The bell was sounded: says the first I/O error and the first fault, once."""
        for ring in list(self._rings.values()):
            self._tell(ring.queue)

    def status(self) -> dict[str, Any]:
        self.on_bell()
        self._bury()
        queues = []
        for index in sorted(self._past.keys() | self._rings.keys()):
            ring = self._rings.get(index)
            counters = ring.queue.counters() if ring else {}
            past = self._past.get(index)
            queues.append(
                {
                    "index": index,
                    "running": ring is not None,
                    "inflight": ring.queue.inflight if ring else 0,
                    "parked": ring.queue.is_parked if ring else False,
                    "worker": ring.queue.worker if ring else None,
                    **(_sum(past, counters) if past and counters else past or counters),
                }
            )
        return {
            "storage": self.storage.name,
            "size_bytes": self.storage.size_bytes,
            "block_size_bytes": self.block_size,
            "read_only": self.read_only,
            "write_cache": not self._write_through,
            "hung_requests": sum(queue.inflight for queue in self._hung),
            "limits": asdict(self.limits),
            "queues": queues,
        }

    def latency(self) -> dict[str, Any]:
        """How long requests took, by operation; rings that stopped included."""
        bins: dict[str, Any] = {}
        add_bins(bins, self._past_latency)
        for ring in list(self._rings.values()):
            add_bins(bins, ring.queue.latency_bins())
        found: dict[str, Any] = summary(bins)
        return found

    # Private ---------------------------------------------------------------------------

    def _watch(self, ring: _Ring) -> None:
        """What wakes a started ring has changed."""
        home = ring.queue.worker
        self.workers.remove(ring.queue)
        self.workers.add(ring.queue, self._fds(ring.queue, ring.kick_fd), worker=home)

    def _fds(self, queue: DiskQueue, kick_fd: int) -> list[int]:
        """What wakes it. Without a kick nobody would: it is looked at by the clock then."""
        completion_fd = queue.channel.completion_fd
        fds = [completion_fd] if completion_fd >= 0 else []
        if queue in self._hung:
            return fds
        if queue.timer_fd >= 0:
            fds.append(queue.timer_fd)
        return [kick_fd, *fds] if kick_fd >= 0 else []

    def _choose_write_through(self) -> None:
        # virtio 1.3, "Block Device / Device Operation": with CONFIG_WCE the driver says;
        # else write-back only for a driver that can flush.
        has_wce = self._features >> Feature.BLK_CONFIG_WCE & 1
        can_flush = self._features >> Feature.BLK_FLUSH & 1
        self._write_through = not (self._writeback if has_wce else can_flush)
        for ring in list(self._rings.values()):
            ring.queue.set_write_through(self._write_through)

    def _tell(self, queue: DiskQueue) -> None:
        if queue.fault is not None and not self._fault_told:
            self._fault_told = True
            log.warning(
                "%s: a request that cannot be done (%s) is answered with an error (further ones "
                "are only counted)\n  next: %s",
                self.name,
                queue.fault,
                SHARE_ALL if queue.fault == "unmapped" else "see what the guest's driver does",
            )
        if queue.error is not None and not self._error_told:
            self._error_told = True
            log.error(
                "%s: %s: %s (further ones are only counted)",
                self.name,
                self.storage.name,
                queue.error,
            )

    def _bury(self) -> None:
        """Lets go of stopped queues whose last request has come back. Any thread."""
        with self._burying:
            ended = [queue for queue in self._hung if not queue.inflight]
            self._hung = [queue for queue in self._hung if queue not in ended]
        for queue in ended:
            self.workers.remove(queue)
            queue.close()
        if ended and not self._hung:
            log.info("%s: %s: the requests that hung have ended", self.name, self.storage.name)


def _sum(past: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _sum(past[key], value) if isinstance(value, dict) else past[key] + value
        for key, value in now.items()
    }
