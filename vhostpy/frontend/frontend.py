"""The other end: a synchronous front-end, for `load` and the tests.

Speaks to any vhost-user back-end as QEMU does: negotiates, shares memory, starts queues
and drives them by `DriverVirtqueue`. It sends nonsense just as well (`send_raw`).

    with FrontEnd("/tmp/vu0") as guest:
        guest.negotiate(FEATURES, PROTOCOL_FEATURES)
        guest.set_mem_table()
        queue = guest.start_queue(0, 256)
        queue.ring.add([(guest.allocate(64), 64)], [])
        queue.ring.kick()
"""

import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from vhostpy._ring import DriverVirtqueue
from vhostpy._spec import Feature, ProtocolFeature
from vhostpy.errors import ProtocolError, Refused
from vhostpy.frontend.sharedmemory import PAGE, UVA_BASE, SharedMemory
from vhostpy.memory.guest import GuestMemory
from vhostpy.protocol.codec import (
    FRONT_END_TABLE,
    REPLIES_TO_FRONT_END,
    UNKNOWN,
    Decoder,
    FrontEndRequest,
    Message,
    encode,
)
from vhostpy.protocol.payloads import (
    U64,
    Config,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostpy.ring.parts import first_base
from vhostpy.system.fds import OwnedFd, close_all, receive, send

DEFAULT_LAYOUT = ((0x10_0000, 32 << 20),)


@dataclass(slots=True)
class Queue:
    """A started queue: the driver's ring and its three eventfds."""

    index: int
    size: int
    features: int
    desc_gpa: int
    avail_gpa: int
    used_gpa: int
    ring: DriverVirtqueue
    kick: OwnedFd | None  # None: the back-end polls
    call: OwnedFd
    err: OwnedFd

    def wait(self, timeout_s: float = 5.0) -> bool:
        """Waits for a call and takes it; False where none came."""
        return _wait_eventfd(self.call.fileno(), timeout_s)

    def wait_err(self, timeout_s: float = 5.0) -> bool:
        """Waits for the ring's error event and takes it; False where none came."""
        return _wait_eventfd(self.err.fileno(), timeout_s)

    def wait_used(self, count: int = 1, timeout_s: float = 5.0) -> list[tuple[int, int]]:
        """(id, bytes written) of at least `count` chains. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        used = list(self.ring.used())
        while len(used) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"queue {self.index}: {len(used)} of {count} chains came back in {timeout_s} s"
                )
            if not self.ring.arm():
                # Short slices: a back-end that loses a call is found, but does not hang us.
                self.wait(min(left, 0.1))
            used += self.ring.used()
        return used

    def close(self) -> None:
        """Closes the eventfds; the ring's memory stays its front-end's."""
        close_all([fd for fd in (self.kick, self.call, self.err) if fd is not None])


class FrontEnd:
    """One front-end, connected to a back-end's socket. Waits at most `timeout_s` for it."""

    def __init__(
        self,
        target: str | socket.socket,
        *,
        timeout_s: float = 5.0,
        layout: Sequence[tuple[int, int]] = DEFAULT_LAYOUT,
        hugepages: bool = False,
    ) -> None:
        if isinstance(target, str):
            self.sock = _connect(target, timeout_s)
        else:
            self.sock = target
        self.sock.settimeout(timeout_s)
        self.timeout_s = timeout_s
        self.features = 0
        self.protocol_features = 0
        self.queues: dict[int, Queue] = {}
        self.layout = layout  # read once, when `shared` is first looked at
        self.hugepages = hugepages
        self._shared: SharedMemory | None = None
        self.inflight: tuple[Inflight, OwnedFd] | None = None
        self._decoder = Decoder(REPLIES_TO_FRONT_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up and closes every fd; memory goes when nobody uses it any more."""
        self.sock.close()
        self._decoder.close()
        for queue in self.queues.values():
            queue.close()
        self.queues.clear()
        if self._shared is not None:
            self._shared.fd.close()
            self._shared = None
        if self.inflight is not None:
            self.inflight[1].close()
            self.inflight = None

    def connect_again(self, path: str) -> None:
        """A session with the next back-end, for the same guest: its rings go on.

        As QEMU does it: of a split ring it knows where used entries stand, of a packed one
        where it once started.
        """
        self.sock.close()
        self._decoder.close()
        self.sock = _connect(path, self.timeout_s)
        self.sock.settimeout(self.timeout_s)
        self._decoder = Decoder(REPLIES_TO_FRONT_END)
        features, protocol_features = self.features, self.protocol_features
        self.features = self.protocol_features = 0
        self.negotiate(features, protocol_features)
        self.set_mem_table()
        if self.inflight is not None:
            self.set_inflight()
        for queue in self.queues.values():
            base = first_base(features)
            if not features >> Feature.RING_PACKED & 1:
                base = int.from_bytes(self.memory.read(queue.used_gpa + 2, 2), "little")
            self.announce(queue, base=base)

    # Messages --------------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: Sequence[OwnedFd | int] = ()) -> None:
        """Sends any bytes with any fds."""
        rest = memoryview(data)
        while rest:
            sent = send(self.sock, rest, fds)
            rest, fds = rest[sent:], ()

    def receive(self) -> Message:
        """The next reply. TimeoutError where none comes, ConnectionError at the end."""
        deadline = time.monotonic() + self.timeout_s
        try:
            while (left := deadline - time.monotonic()) > 0:
                # Of all of it: a back-end may send a byte at a time.
                self.sock.settimeout(left)
                data, fds = receive(self.sock, self._decoder.wanted)
                if not data:
                    raise ConnectionResetError("the back-end closed the connection")
                messages = self._decoder.feed(data, fds)
                if messages:
                    return messages[0]
        finally:
            self.sock.settimeout(self.timeout_s)
        raise TimeoutError(f"no whole reply in {self.timeout_s:g} s")

    def request(
        self,
        request: int,
        payload: Payload | bytes = b"",
        fds: Sequence[OwnedFd | int] = (),
        *,
        need_reply: bool | None = None,
    ) -> Any:
        """Sends a request; returns the payload of its answer, None where it has none.

        `need_reply` None: asks for an ack where REPLY_ACK is negotiated. Raises Refused
        where the ack says no. The fds of an answer are closed: use `receive` to get them.
        """
        known = FRONT_END_TABLE.get(request, UNKNOWN)
        answered = bool(known.replies)
        if need_reply is None:
            need_reply = not answered and self.negotiated(ProtocolFeature.REPLY_ACK)
        logs = self.negotiated(ProtocolFeature.LOG_SHMFD)
        answered |= request == FrontEndRequest.SET_LOG_BASE and logs
        self.send_raw(encode(request, payload, need_reply=need_reply), fds)
        if not answered and not need_reply:
            return None
        reply = self.receive()
        reply.close()
        if reply.request != request:
            raise ProtocolError(f"{reply.name} was answered, {request!r} had been asked")
        if not known.replies and isinstance(reply.payload, U64) and reply.payload.value:
            raise Refused(f"{reply.name}: refused with {reply.payload.value}")
        return reply.payload

    def hung_up(self, timeout_s: float | None = None) -> bool:
        """Whether the back-end closes the connection in time; drops what it still says."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self.sock], [], [], left)[0]:
                return False
            try:
                if not self.sock.recv(65536):
                    return True
            except ConnectionError:
                return True
        return False

    # Handshake -------------------------------------------------------------------------

    def negotiated(self, bit: ProtocolFeature) -> bool:
        """Whether this protocol feature is."""
        return bool(self.protocol_features >> bit & 1)

    def get_features(self) -> int:
        """What the back-end offers."""
        return int(self.request(FrontEndRequest.GET_FEATURES).value)

    def get_protocol_features(self) -> int:
        """What the back-end offers."""
        return int(self.request(FrontEndRequest.GET_PROTOCOL_FEATURES).value)

    def set_features(self, features: int) -> None:
        """Sends exactly these."""
        self.request(FrontEndRequest.SET_FEATURES, U64(features))
        self.features = features

    def set_protocol_features(self, features: int) -> None:
        """Sends exactly these."""
        self.request(FrontEndRequest.SET_PROTOCOL_FEATURES, U64(features))
        self.protocol_features = features

    def negotiate(self, features: int, protocol_features: int = 0) -> int:
        """As QEMU begins: takes what is offered of what is asked; returns the features.

        PROTOCOL_FEATURES is taken where it is offered and any protocol feature is asked.
        """
        offered = self.get_features()
        if protocol_features and offered >> Feature.PROTOCOL_FEATURES & 1:
            features |= 1 << Feature.PROTOCOL_FEATURES
            self.set_protocol_features(self.get_protocol_features() & protocol_features)
        self.request(FrontEndRequest.SET_OWNER)
        self.set_features(offered & features)
        return self.features

    def get_config(self, offset: int = 0, size: int = 256) -> bytes:
        """Bytes of the config space. Raises Refused on the empty answer that says no."""
        answer = self.request(FrontEndRequest.GET_CONFIG, Config(offset, 0, bytes(size)))
        if not isinstance(answer, Config):
            raise Refused(f"GET_CONFIG: {size} bytes at {offset} were refused")
        if answer.size != size:
            raise ProtocolError(
                f"GET_CONFIG: {answer.size} bytes were answered, {size} had been asked"
            )
        return answer.data

    def set_config(self, offset: int, data: bytes, *, migration: bool = False) -> None:
        """Writes to the config space."""
        self.request(FrontEndRequest.SET_CONFIG, Config(offset, int(migration), data))

    # Memory ----------------------------------------------------------------------------

    @property
    def shared(self) -> SharedMemory:
        """The guest's memory, made at the first look."""
        if self._shared is None:
            self._shared = SharedMemory.create(self.layout, hugepages=self.hugepages)
        return self._shared

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory by guest addresses."""
        return self.shared.map

    def allocate(self, size: int, alignment: int = PAGE) -> int:
        """A guest address for `size` bytes of the guest's memory."""
        return self.shared.allocate(size, alignment)

    def set_mem_table(self) -> None:
        """Shares all regions at once; ADD_MEM_REG for each where slots are negotiated."""
        if self.negotiated(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            for region in self.shared.regions:
                self.add_mem_reg(region)
        else:
            regions = self.shared.regions
            self.request(
                FrontEndRequest.SET_MEM_TABLE,
                MemoryTable(regions),
                [self.shared.fd] * len(regions),
            )

    def add_mem_reg(self, region: MemoryRegion, fd: OwnedFd | int | None = None) -> None:
        """Shares one region more, of our memory unless another fd is given."""
        fds = [self.shared.fd if fd is None else fd]
        self.request(FrontEndRequest.ADD_MEM_REG, SingleRegion(region), fds)

    def rem_mem_reg(self, region: MemoryRegion) -> None:
        """Takes one region back."""
        self.request(FrontEndRequest.REM_MEM_REG, SingleRegion(region))

    def set_log(self, fd: OwnedFd | int, size: int, offset: int = 0) -> None:
        """Where dirty pages are to be marked; LOG_ALL starts it."""
        self.request(FrontEndRequest.SET_LOG_BASE, Log(size, offset), [fd])

    # Queues ----------------------------------------------------------------------------

    def get_inflight(self, num_queues: int, queue_size: int) -> None:
        """Has the back-end make memory for requests under way, and keeps it."""
        asked = Inflight(0, 0, num_queues, queue_size)
        self.send_raw(encode(FrontEndRequest.GET_INFLIGHT_FD, asked))
        reply = self.receive()
        area = reply.payload
        if reply.request != FrontEndRequest.GET_INFLIGHT_FD or len(reply.fds) != 1:
            raise ProtocolError(f"{reply.name}: {len(reply.fds)} fds, expected 1")
        file_size = os.fstat(reply.fds[0].fileno()).st_size
        if not area.mmap_size or area.mmap_offset + area.mmap_size > file_size:
            raise ProtocolError(
                f"{reply.name}: {area.mmap_size} bytes at offset {area.mmap_offset} of a file of "
                f"{file_size}"
            )
        if self.inflight is not None:
            self.inflight[1].close()
        # The sizes that were asked for, as QEMU keeps them.
        made = Inflight(area.mmap_size, area.mmap_offset, num_queues, queue_size)
        self.inflight = made, reply.fds[0].move()

    def set_inflight(self) -> None:
        """Hands that memory over; rings started after it use it."""
        assert self.inflight is not None, "get_inflight comes first"
        area, fd = self.inflight
        self.request(FrontEndRequest.SET_INFLIGHT_FD, area, [fd])

    def start_queue(
        self,
        index: int,
        size: int = 256,
        features: int | None = None,
        *,
        base: int | None = None,
        poll: bool = False,
        enable: bool = True,
        fifo: bool = False,
    ) -> Queue:
        """A new ring in the guest's memory, started at `base`, and enabled.

        `base` None: where a new ring starts. `poll`: gives the back-end no kick fd.
        `fifo`: the driver uses its descriptors in order, not the last that came back.
        `features` None: the negotiated ones.
        """
        features = self.features if features is None else features
        base = first_base(features) if base is None else base
        desc_bytes, avail_bytes, used_bytes = DriverVirtqueue.ring_bytes(size)
        desc_gpa = self.allocate(desc_bytes)
        avail_gpa = self.allocate(avail_bytes, 64)
        used_gpa = self.allocate(used_bytes, 64)
        kick = None if poll else _eventfd()
        ring = DriverVirtqueue(
            self.memory,
            size,
            features,
            desc_gpa=desc_gpa,
            avail_gpa=avail_gpa,
            used_gpa=used_gpa,
            base=base,
            kick_fd=-1 if kick is None else kick.fileno(),
            fifo=fifo,
        )
        queue = Queue(
            index,
            size,
            features,
            desc_gpa,
            avail_gpa,
            used_gpa,
            ring,
            kick,
            _eventfd(),
            _eventfd(),
        )
        old = self.queues.pop(index, None)
        if old is not None:
            old.close()
        self.queues[index] = queue
        self.announce(queue, base=base, enable=enable)
        return queue

    def announce(self, queue: Queue, *, base: int, enable: bool = True) -> None:
        """Tells the back-end all of a queue, in QEMU's order: it starts (again) at `base`."""
        index = queue.index
        self.request(FrontEndRequest.SET_VRING_NUM, VringState(index, queue.size))
        self.request(FrontEndRequest.SET_VRING_BASE, VringState(index, base))
        self.set_addresses(queue)
        self.set_ring_file(FrontEndRequest.SET_VRING_KICK, index, queue.kick)
        self.set_ring_file(FrontEndRequest.SET_VRING_CALL, index, queue.call)
        self.set_ring_file(FrontEndRequest.SET_VRING_ERR, index, queue.err)
        if enable and self.features >> Feature.PROTOCOL_FEATURES & 1:
            self.enable(index, True)

    def set_addresses(self, queue: Queue, used_log_gpa: int | None = None) -> None:
        """Where the ring lies; with a GPA, writes to its used ring are logged there."""
        self.request(
            FrontEndRequest.SET_VRING_ADDR,
            VringAddress(
                queue.index,
                0 if used_log_gpa is None else 1,
                UVA_BASE + queue.desc_gpa,
                UVA_BASE + queue.used_gpa,
                UVA_BASE + queue.avail_gpa,
                used_log_gpa or 0,
            ),
        )

    def set_ring_file(self, request: FrontEndRequest, index: int, fd: OwnedFd | None) -> None:
        """SET_VRING_KICK, CALL or ERR; None says that there is no fd."""
        file = VringFile(index, fd is not None)
        self.request(request, file, [] if fd is None else [fd])

    def stop_queue(self, index: int) -> int:
        """Stops it; returns its base. Its ring stays in `queues`, to be announced again."""
        answer = self.request(FrontEndRequest.GET_VRING_BASE, VringState(index, 0))
        return int(answer.num)

    def enable(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE."""
        self.request(FrontEndRequest.SET_VRING_ENABLE, VringState(index, int(enabled)))


def _connect(path: str, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                # The listener's queue is full, and nothing tells when it has room.
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path}: not accepted in {timeout_s} s") from None
                time.sleep(0.005)
    except BaseException:
        sock.close()
        raise


def _eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def _wait_eventfd(fd: int, timeout_s: float) -> bool:
    if not select.select([fd], [], [], timeout_s)[0]:
        return False
    # The back-end holds it too: it may have taken the event, and O_NONBLOCK.
    with contextlib.suppress(BlockingIOError):
        os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
        return True
    return False
