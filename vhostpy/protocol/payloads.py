"""What follows a message's header: one type for each layout of the document.

Types say how many bytes they may have, and turn bytes into fields and back; which message
carries which is `codec.py`'s table, whether the values make sense the session's business.

Source: QEMU, docs/interop/vhost-user.rst, "Payload"; sections are named at the types. All
numbers are in the machine's own byte order.
"""

from dataclasses import dataclass, fields
from struct import Struct
from typing import ClassVar, Protocol, Self

from vhostpy.errors import ProtocolError

# "Multiple Memory regions description": region0 ... region7.
TABLE_REGIONS_MAX = 8
# QEMU's VHOST_USER_MAX_CONFIG_SIZE, and the size that SPDK's initiator asks for.
CONFIG_SIZE_MAX = 256
# For payloads whose layout the document does not give: more than any other message has.
OPAQUE_SIZE_MAX = 4096
# "VIRTIO Shared Memory Region configuration": mem size 0 ... 255.
SHMEM_REGIONS_MAX = 256


class Payload(Protocol):
    """What follows a header."""

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        """The least and the most bytes that it may have."""

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Raises ProtocolError where the bytes are not such a payload."""

    def pack(self) -> bytes:
        """The bytes of this payload."""


class Fixed:
    """A payload of one layout: a dataclass's fields in order."""

    __slots__ = ()
    LAYOUT: ClassVar[Struct]

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.LAYOUT.size, cls.LAYOUT.size

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) != cls.LAYOUT.size:
            raise ProtocolError(f"{cls.__name__}: {len(payload)} bytes, expected {cls.LAYOUT.size}")
        return cls(*cls.LAYOUT.unpack(payload))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(*[getattr(self, field.name) for field in fields(self)])  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Empty(Fixed):
    """No payload."""

    LAYOUT: ClassVar = Struct("=")


@dataclass(frozen=True, slots=True)
class U64(Fixed):
    """One number ("A single 64-bit integer")."""

    LAYOUT: ClassVar = Struct("=Q")
    value: int


@dataclass(frozen=True, slots=True)
class VringState(Fixed):
    """A queue and a number ("A vring state description", "A vring descriptor index")."""

    LAYOUT: ClassVar = Struct("=II")
    index: int  # queue, 0-based
    num: int  # meaning set by the request


@dataclass(frozen=True, slots=True)
class VringAddress(Fixed):
    """Where a ring lies ("A vring address description")."""

    LAYOUT: ClassVar = Struct("=IIQQQQ")
    index: int
    flags: int  # bit 0, VHOST_VRING_F_LOG: log writes to the used ring
    desc_uva: int
    used_uva: int
    avail_uva: int
    used_log_gpa: int


@dataclass(frozen=True, slots=True)
class VringFile:
    """A queue and whether an fd comes for it ("VHOST_USER_SET_VRING_KICK")."""

    NO_FD: ClassVar = 1 << 8
    LAYOUT: ClassVar = Struct("=Q")
    index: int  # the u64 without bit 8: handlers check all of it
    has_fd: bool

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return 8, 8

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        value = U64.unpack(payload).value
        return cls(value & ~cls.NO_FD, not value & cls.NO_FD)

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.index | (0 if self.has_fd else self.NO_FD))


@dataclass(frozen=True, slots=True)
class MemoryRegion(Fixed):
    """Guest memory behind one fd ("Memory region description")."""

    LAYOUT: ClassVar = Struct("=QQQQ")
    gpa: int
    size: int
    uva: int
    offset: int  # in the fd


@dataclass(frozen=True, slots=True)
class SingleRegion:
    """One region ("Single memory region description")."""

    LAYOUT: ClassVar = Struct("=8x32s")
    region: MemoryRegion

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.LAYOUT.size, cls.LAYOUT.size

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) != cls.LAYOUT.size:
            raise ProtocolError(f"SingleRegion: {len(payload)} bytes, expected {cls.LAYOUT.size}")
        return cls(MemoryRegion.unpack(*cls.LAYOUT.unpack(payload)))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.region.pack())


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """All regions at once ("Multiple Memory regions description").

    Some front-ends send room for more regions than they name: the rest of it is ignored.
    """

    LAYOUT: ClassVar = Struct("=I4x")
    regions: tuple[MemoryRegion, ...]

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.LAYOUT.size, cls.LAYOUT.size + TABLE_REGIONS_MAX * MemoryRegion.LAYOUT.size

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        least, size = cls.LAYOUT.size, MemoryRegion.LAYOUT.size
        count = cls.LAYOUT.unpack_from(payload)[0] if len(payload) >= least else 0
        if count > TABLE_REGIONS_MAX:
            raise ProtocolError(f"{count} memory regions, at most {TABLE_REGIONS_MAX} fit a table")
        end = least + count * size
        if len(payload) < end or (len(payload) - end) % size:
            raise ProtocolError(
                f"{count} memory regions in {len(payload)} bytes, expected {end}, or room for "
                "more regions"
            )
        starts = range(least, end, size)
        return cls(tuple(MemoryRegion.unpack(payload[at : at + size]) for at in starts))

    def pack(self) -> bytes:
        regions = b"".join(region.pack() for region in self.regions)
        return self.LAYOUT.pack(len(self.regions)) + regions


@dataclass(frozen=True, slots=True)
class Log(Fixed):
    """Where the dirty log lies in its fd ("Log description")."""

    LAYOUT: ClassVar = Struct("=QQ")
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Iotlb(Fixed):
    """A translation, or the lack of one ("An IOTLB message")."""

    LAYOUT: ClassVar = Struct("=QQQBB6x")  # padded as the C structure is
    iova: int
    size: int
    uva: int
    permissions: int
    kind: int


@dataclass(frozen=True, slots=True)
class Config:
    """Bytes of the config space ("Virtio device config space")."""

    LAYOUT: ClassVar = Struct("=III")
    offset: int
    flags: int  # 0: writable fields; 1: live migration
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.LAYOUT.size, cls.LAYOUT.size + CONFIG_SIZE_MAX

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) < cls.LAYOUT.size:
            raise ProtocolError(f"config: {len(payload)} bytes, expected at least 12")
        offset, size, flags = cls.LAYOUT.unpack_from(payload)
        data = payload[cls.LAYOUT.size :]
        if size != len(data):
            raise ProtocolError(f"config: size says {size} bytes, {len(data)} came")
        return cls(offset, flags, data)

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.offset, len(self.data), self.flags) + self.data


@dataclass(frozen=True, slots=True)
class VringArea(Fixed):
    """A piece of an fd for a queue ("Vring area description")."""

    LAYOUT: ClassVar = Struct("=QQQ")
    index_and_flags: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Inflight:
    """Where requests under way are kept ("Inflight description").

    The document's fields have 20 bytes, the C structure of QEMU and others 24.
    """

    LAYOUT: ClassVar = Struct("=QQHH")
    PADDING: ClassVar = 4
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.LAYOUT.size, cls.LAYOUT.size + cls.PADDING

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) not in cls.sizes():
            raise ProtocolError(f"inflight: {len(payload)} bytes, expected 20 or 24")
        return cls(*cls.LAYOUT.unpack_from(payload))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size
        ) + bytes(self.PADDING)


@dataclass(frozen=True, slots=True)
class SharedObject(Fixed):
    """A name for a dma-buf ("VhostUserShared")."""

    LAYOUT: ClassVar = Struct("=16s")
    uuid: bytes


@dataclass(frozen=True, slots=True)
class DeviceState(Fixed):
    """How a device's state moves ("Device state transfer parameters")."""

    LAYOUT: ClassVar = Struct("=II")
    direction: int  # 0: save, 1: load
    phase: int  # 0: stopped


@dataclass(frozen=True, slots=True)
class ShmemMap(Fixed):
    """A mapping in a shared memory region ("MMAP request")."""

    LAYOUT: ClassVar = Struct("=B7xQQQQ")
    shmid: int
    fd_offset: int
    shm_offset: int
    length: int
    flags: int  # bit 0: writable


@dataclass(frozen=True, slots=True)
class ShmemConfig:
    """Sizes of a device's own memory ("VIRTIO Shared Memory Region configuration")."""

    LAYOUT: ClassVar = Struct("=I4x")
    regions: tuple[int, ...]

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.LAYOUT.size, cls.LAYOUT.size + 8 * SHMEM_REGIONS_MAX

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        count = cls.LAYOUT.unpack_from(payload)[0] if len(payload) >= cls.LAYOUT.size else 0
        # Some back-ends send room for all 256, filled or not.
        if len(payload) not in (cls.LAYOUT.size + 8 * count, cls.sizes()[1]):
            raise ProtocolError(f"{count} shared memory regions in {len(payload)} bytes")
        if count > SHMEM_REGIONS_MAX:
            raise ProtocolError(f"{count} shared memory regions, at most {SHMEM_REGIONS_MAX}")
        return cls(Struct(f"={count}Q").unpack_from(payload, cls.LAYOUT.size))

    def pack(self) -> bytes:
        count = len(self.regions)
        return self.LAYOUT.pack(count) + Struct(f"={count}Q").pack(*self.regions)


@dataclass(frozen=True, slots=True)
class Opaque:
    """Bytes that the document does not describe (crypto sessions)."""

    data: bytes

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return 0, OPAQUE_SIZE_MAX

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        return cls(payload)

    def pack(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class Unknown(Opaque):
    """The payload of a request with a number that the document does not know."""
