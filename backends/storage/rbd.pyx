"""A disk in a Ceph cluster, by librbd.

librbd has threads of its own; a request comes back on one of them and goes to the worker as
it does with files. Those threads may not touch guest memory: librbd blocks all signals
there, and a fault in memory that a front-end has shrunk would end the process. So data go
through a buffer, and the worker, where such a fault is contained, copies: a piece at a time.

Requests that the cluster does not answer fail after `timeout_s`; none hangs for ever.
"""
cimport cython
from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from vhostpy.backends.storage.completions cimport Done, DoneChannel, put_done
from vhostpy.backends.storage.pieces cimport Position, copy_pieces
from vhostpy.backends.storage.storage cimport REQUEST_UNMAP, Op, Request, Storage

import logging
import os
import re
import threading

from vhostpy.backends.storage.storage import check_block_size
from vhostpy.errors import ConfigError

cdef extern from "<rados/librados.h>" nogil:
    ctypedef void *rados_t
    ctypedef void *rados_ioctx_t
    int rados_create(rados_t *, const char *id)
    int rados_conf_read_file(rados_t, const char *path)
    int rados_conf_set(rados_t, const char *option, const char *value)
    int rados_connect(rados_t)
    void rados_shutdown(rados_t)
    int rados_ioctx_create(rados_t, const char *pool, rados_ioctx_t *)
    void rados_ioctx_set_namespace(rados_ioctx_t, const char *)
    void rados_ioctx_destroy(rados_ioctx_t)

cdef extern from "<rbd/librbd.h>" nogil:
    ctypedef void *rbd_image_t
    ctypedef void *rbd_completion_t
    ctypedef void (*rbd_callback_t)(rbd_completion_t, void *) noexcept nogil
    int rbd_open(rados_ioctx_t, const char *name, rbd_image_t *, const char *snapshot)
    int rbd_open_read_only(rados_ioctx_t, const char *name, rbd_image_t *, const char *snapshot)
    int rbd_close(rbd_image_t)
    int rbd_get_size(rbd_image_t, uint64_t *)
    int rbd_aio_create_completion(void *, rbd_callback_t, rbd_completion_t *)
    ssize_t rbd_aio_get_return_value(rbd_completion_t)
    void rbd_aio_release(rbd_completion_t)
    int rbd_aio_read(rbd_image_t, uint64_t, size_t, char *, rbd_completion_t)
    int rbd_aio_write(rbd_image_t, uint64_t, size_t, const char *, rbd_completion_t)
    int rbd_aio_flush(rbd_image_t, rbd_completion_t)
    int rbd_aio_discard(rbd_image_t, uint64_t, uint64_t, rbd_completion_t)
    int rbd_aio_write_zeroes(rbd_image_t, uint64_t, size_t, rbd_completion_t, int, int)
    int RBD_WRITE_ZEROES_FLAG_THICK_PROVISION

cdef enum:
    PIECE_MAX = 1 << 18     # bytes that one poll copies of one request
    CLEAR_MAX = 1 << 28
    KEEP_MAX = 1 << 16      # a larger buffer is given back after use
    POLL_MAX = 16           # requests that one poll takes back: 4 MiB, where all are large
    CONNECT_S = 10
    JOIN_S = 2
    TIMEOUT_S = 30

log = logging.getLogger("vhostpy")


# --- A request under way -----------------------------------------------------------------------

cdef struct Transfer:
    Request *request
    Transfer *next          # of those that are free
    Done *done
    char *buffer
    uint64_t room           # bytes of `buffer`
    uint64_t progress       # bytes of the request that are done
    uint64_t size           # bytes of the piece under way
    Position position       # of the request's pieces: behind what was copied
    int result


cdef void completed(rbd_completion_t completion, void *user_data) noexcept nogil:
    """librbd's: on a thread of its own, which touches no guest memory."""
    cdef Transfer *transfer = <Transfer *>user_data
    cdef ssize_t result = rbd_aio_get_return_value(completion)
    rbd_aio_release(completion)
    if transfer.request.op == Op.READ and 0 <= result < <ssize_t>transfer.size:
        result = -EIO       # the image has become smaller
    transfer.result = <int>result if result < 0 else 0
    put_done(transfer.done, transfer.request)


cdef int start(rbd_image_t image, Transfer *transfer) noexcept nogil:
    """The next piece; a negative errno if it cannot be started."""
    cdef Request *request = transfer.request
    cdef rbd_completion_t completion
    cdef uint64_t offset = request.offset + transfer.progress
    cdef uint64_t rest = request.size - transfer.progress
    cdef bint moves = request.op == Op.READ or request.op == Op.WRITE
    cdef int result
    transfer.size = min(rest, <uint64_t>(PIECE_MAX if moves else CLEAR_MAX))
    if moves and transfer.room < transfer.size:
        free(transfer.buffer)
        # Zeroed: what is not read must not show the guest our memory.
        transfer.buffer = <char *>calloc(1, transfer.size)
        transfer.room = transfer.size if transfer.buffer != NULL else 0
        if transfer.buffer == NULL:
            return -ENOMEM
    if request.op == Op.WRITE:
        copy_pieces(request, &transfer.position, transfer.buffer, transfer.size, False)
    result = rbd_aio_create_completion(transfer, completed, &completion)
    if result < 0:
        return result
    if request.op == Op.READ:
        result = rbd_aio_read(image, offset, transfer.size, transfer.buffer, completion)
    elif request.op == Op.WRITE:
        result = rbd_aio_write(image, offset, transfer.size, transfer.buffer, completion)
    elif request.op == Op.FLUSH:
        result = rbd_aio_flush(image, completion)
    elif request.op == Op.DISCARD:
        result = rbd_aio_discard(image, offset, transfer.size, completion)
    else:
        result = rbd_aio_write_zeroes(
            image, offset, transfer.size, completion,
            0 if request.flags & REQUEST_UNMAP else RBD_WRITE_ZEROES_FLAG_THICK_PROVISION, 0)
    if result < 0:
        rbd_aio_release(completion)
    return result


# --- Storage and channel -------------------------------------------------------------------------

@cython.final
cdef class RbdStorage(Storage):
    """The image that `uri` names: rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][:OPTION=VALUE...].

    As QEMU has it; `id` and `conf` are the user and the configuration file, other options
    are Ceph's own. Raises ConfigError where it cannot be had at once.
    """
    cdef rados_t cluster
    cdef rados_ioctx_t pool
    cdef rbd_image_t image

    def __init__(self, uri: str, read_only: bool = False, block_size: int = 512, *,
                 timeout_s: int = TIMEOUT_S) -> None:
        cdef uint64_t size = 0
        if self.cluster != NULL:
            raise TypeError("made already")
        self.block_size = check_block_size(block_size)
        pool, namespace, image, snapshot, options = parse_uri(uri)
        self.name = uri.partition(":")[0] + ":" + uri.split(":")[1]
        self.read_only = read_only or snapshot is not None
        self.can_discard = self.can_write_zeroes = not self.read_only
        try:
            self.connect(options, timeout_s)
            self.open_image(pool, namespace, image, snapshot)
            self.check(rbd_get_size(self.image, &size), "its size", "")
            self.size_bytes = size // self.block_size * self.block_size
            if self.size_bytes == 0:
                raise ConfigError(f"{self.name}: {size} bytes, less than one block",
                                  hint=f"rbd resize --size 10G {pool}/{image}")
        except BaseException:
            self.release()
            raise

    cdef connect(self, dict options, timeout_s):
        cdef const char *path = NULL
        cdef const char *name = NULL
        cdef int result
        user, conf = options.pop("id", b""), options.pop("conf", b"")
        if user:
            name = user
        if conf:
            path = conf
        self.check(rados_create(&self.cluster, name), "librados", "")
        self.check(rados_conf_read_file(self.cluster, path), "its configuration",
                   "name it: rbd:POOL/IMAGE:conf=/etc/ceph/ceph.conf")
        bounds = {"client_mount_timeout": CONNECT_S, "rados_mon_op_timeout": timeout_s,
                  "rados_osd_op_timeout": timeout_s}
        for option, value in bounds.items():
            rados_conf_set(self.cluster, option.encode(), str(value).encode())
        for option, value in options.items():
            self.check(rados_conf_set(self.cluster, option.encode(), value),
                       f"option {option}", "see Ceph's documentation for its options")
        with nogil:
            result = rados_connect(self.cluster)
        self.check(result, "cannot connect", "see whether the cluster answers: ceph -s")

    cdef open_image(self, bytes pool, bytes namespace, bytes image, bytes snapshot):
        cdef const char *name = image
        cdef const char *at = NULL
        cdef int result
        if snapshot is not None:
            at = snapshot
        self.check(rados_ioctx_create(self.cluster, pool, &self.pool), f"pool {pool.decode()}",
                   "ceph osd pool ls")
        rados_ioctx_set_namespace(self.pool, namespace)
        with nogil:
            if self.read_only:
                result = rbd_open_read_only(self.pool, name, &self.image, at)
            else:
                result = rbd_open(self.pool, name, &self.image, at)
        self.check(result, "cannot open it", f"rbd ls {pool.decode()}")

    def check(self, result, what, hint):
        """Raises ConfigError for a negative errno."""
        if result < 0:
            raise ConfigError(f"{self.name}: {what}: {os.strerror(-result).lower()}", hint)

    cdef release(self):
        # Each may wait for the cluster.
        with nogil:
            if self.image != NULL:
                rbd_close(self.image)
            if self.pool != NULL:
                rados_ioctx_destroy(self.pool)
            if self.cluster != NULL:
                rados_shutdown(self.cluster)
        self.image = self.pool = self.cluster = NULL

    def channel(self) -> RbdChannel:
        if self.image == NULL:
            raise ValueError(f"{self.name}: closed")
        return RbdChannel(self)

    def actual_bytes(self) -> int:
        cdef uint64_t size = 0
        cdef int result = -1
        with nogil:
            if self.image != NULL:
                result = rbd_get_size(self.image, &size)
        return size if result == 0 else self.size_bytes

    def close(self) -> None:
        """Lets go of the image; left to a thread where the cluster hangs. Idempotent."""
        thread = threading.Thread(target=lambda: self.release(), daemon=True)
        thread.start()
        thread.join(JOIN_S)
        if thread.is_alive():
            log.warning("%s: the cluster does not answer", self.name)


def parse_uri(uri):
    """(pool, namespace, image, snapshot or None, options), the parts as bytes."""
    where, *pairs = re.split(r"(?<!\\):", uri.removeprefix("rbd:"))
    match = re.fullmatch(r"([^/@]+)/(?:([^/@]+)/)?([^/@]+)(?:@([^/@]+))?", where)
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if not uri.startswith("rbd:") or not match or not all(options.values()):
        raise ConfigError(f"{uri}: not an RBD image",
                          hint="rbd:POOL/IMAGE, or rbd:POOL/IMAGE:id=USER:conf=FILE")
    pool, namespace, image, snapshot = (
        part if part is None else part.encode(errors="surrogateescape")
        for part in match.groups())
    values = {name: value.replace("\\:", ":").encode(errors="surrogateescape")
              for name, value in options.items()}
    return pool, namespace or b"", image, snapshot, values


@cython.final
cdef class RbdChannel(DoneChannel):
    cdef RbdStorage storage
    cdef Transfer *free_transfers

    def __cinit__(self, RbdStorage storage not None):
        self.storage = storage

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        cdef Transfer *transfer
        cdef int i, result
        for i in range(count):
            transfer = self.take_transfer()
            if transfer == NULL:
                return i
            burst[i].home = transfer
            transfer.request = burst[i]
            transfer.progress = transfer.position.at = 0
            transfer.position.piece = 0
            if burst[i].size == 0 and burst[i].op != Op.FLUSH:
                transfer.size = 0
                transfer.result = 0
                put_done(self.done, burst[i])
                continue
            result = start(self.storage.image, transfer)
            if result < 0:
                transfer.result = result
                put_done(self.done, burst[i])
        return count

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        cdef Transfer *transfer
        cdef int i, count, result, ended = 0
        count = DoneChannel.poll(self, done, min(limit, <int>POLL_MAX))
        for i in range(count):
            transfer = <Transfer *>done[i].home
            if transfer.result == 0 and done[i].op == Op.READ:
                copy_pieces(transfer.request, &transfer.position, transfer.buffer, transfer.size,
                            True)
            transfer.progress += transfer.size
            if transfer.result == 0 and transfer.progress < done[i].size:
                result = start(self.storage.image, transfer)
                if result == 0:
                    continue
                transfer.result = result
            done[i].result = transfer.result
            done[ended] = done[i]
            ended += 1
            self.keep(transfer)
        return ended

    cdef Transfer *take_transfer(self) noexcept nogil:
        cdef Transfer *transfer = self.free_transfers
        if transfer == NULL:            # a few times in its life
            transfer = <Transfer *>calloc(1, sizeof(Transfer))
            if transfer != NULL:
                transfer.done = self.done
            return transfer
        self.free_transfers = transfer.next
        return transfer

    cdef void keep(self, Transfer *transfer) noexcept nogil:
        if transfer.room > KEEP_MAX:
            free(transfer.buffer)
            transfer.buffer = NULL
            transfer.room = 0
        transfer.next = self.free_transfers
        self.free_transfers = transfer

    def close(self) -> None:
        """Called when no request is under way; idempotent."""
        cdef Transfer *transfer
        while self.free_transfers != NULL:
            transfer = self.free_transfers
            self.free_transfers = transfer.next
            free(transfer.buffer)
            free(transfer)
        DoneChannel.close(self)
