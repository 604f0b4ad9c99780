"""A disk image, opened and locked: the file or block device that a storage works on.

Knows how large it is and how O_DIRECT wants its transfers aligned; knows no request.
"""

import errno
import logging
import mmap
import os
import stat
from dataclasses import dataclass

from vhostpy.backends.storage.formats import format_of, how_to_serve
from vhostpy.backends.storage.lock import lock_image, unlock_image
from vhostpy.backends.storage.storage import check_block_size
from vhostpy.errors import ConfigError

log = logging.getLogger("vhostpy")

ALIGNMENT_MAX = 4096  # page size: no kernel asks for more


@dataclass(slots=True)
class Image:
    """An open image; whoever opened it closes it."""

    path: str
    fd: int
    size_bytes: int  # whole blocks
    block_size: int
    is_device: bool
    read_only: bool
    # What O_DIRECT wants: 1 without it.
    offset_alignment: int = 1
    memory_alignment: int = 1

    @property
    def direct(self) -> bool:
        return self.offset_alignment > 1

    @property
    def name(self) -> str:
        return f"{'device' if self.is_device else 'file'} {self.path}"

    def actual_bytes(self) -> int:
        """Its size now, which may be another than when it was opened."""
        return _size(self.fd, self.path)[0] if self.fd >= 0 else self.size_bytes

    def close(self, *, idle: bool = True) -> None:
        """Closes the file; idempotent. Not `idle`: requests hang, and keep the lock."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            if idle:
                unlock_image(fd)
            os.close(fd)


def open_image(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    block_size: int = 512,
    direct: bool = False,
    share_rw: bool = False,
    raw: bool = False,
) -> Image:
    """Opens the image at `path`; raises ConfigError that says what to do.

    `raw`: it is served as it is, whatever it looks like.
    """
    path = os.fspath(path)
    check_block_size(block_size)
    fd = _open(path, read_only, direct)
    try:
        size, is_device = _size(fd, path)
        lock_image(fd, path, read_only=read_only, share_rw=share_rw)
        if not is_device:
            size = os.fstat(fd).st_size  # whoever had it may have changed it
        if not raw:
            _check_raw(fd, path, read_only)
        image = Image(path, fd, size, block_size, is_device, read_only)
        if direct:
            image.offset_alignment, image.memory_alignment = _alignment(fd, path)
            image.block_size = max(block_size, image.offset_alignment)
        image.size_bytes = size // image.block_size * image.block_size
        if image.size_bytes == 0:
            raise ConfigError(
                f"{path}: {size} bytes, less than one block of {image.block_size}",
                f"give it a size: truncate -s 10G {path}",
            )
        if image.size_bytes != size:
            log.warning(
                "%s: the last %d bytes are no whole block and are not shown",
                path,
                size - image.size_bytes,
            )
    except BaseException:
        os.close(fd)
        raise
    return image


def _open(path: str, read_only: bool, direct: bool) -> int:
    flags = os.O_CLOEXEC | os.O_NOCTTY | (os.O_RDONLY if read_only else os.O_RDWR)
    if direct:
        flags |= os.O_DIRECT
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        fd = os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        hint = {
            errno.ENOENT: f"make it: truncate -s 10G {path}",
            errno.EACCES: "see who may read and write it: ls -l, or add --read-only",
            errno.EPERM: "see who may write it: lsattr, or add --read-only",
            errno.EROFS: "its file system is read-only: add --read-only",
            errno.EISDIR: "name a file in it",
            errno.ETXTBSY: "a running program is executed from it",
            errno.ENXIO: "name a regular file or a block device",
            errno.EINVAL: "its file system has no O_DIRECT: leave --direct" if direct else "",
        }.get(error.errno or 0, "")
        text = (error.strerror or str(error)).lower()
        raise ConfigError(f"{path}: {text}", hint) from None
    os.set_blocking(fd, True)
    return fd


def _size(fd: int, path: str) -> tuple[int, bool]:
    """(bytes, whether it is a block device)."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISBLK(mode):
        # What BLKGETSIZE64 says; only opening read-write a read-only device fails later.
        return os.lseek(fd, 0, os.SEEK_END), True
    if stat.S_ISREG(mode):
        return os.fstat(fd).st_size, False
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{path}: a directory", "name a file in it")
    raise ConfigError(f"{path}: neither a regular file nor a block device", "name a disk image")


def _check_raw(fd: int, path: str, read_only: bool) -> None:
    """Raises ConfigError where the image says that it is in another format."""
    with mmap.mmap(-1, ALIGNMENT_MAX) as head:  # aligned, as O_DIRECT wants it
        try:
            os.preadv(fd, [head], 0)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        found = format_of(head[:])
    if found == "luks":
        log.warning("%s: encrypted by LUKS; the guest sees it so, and needs the key", path)
    elif found:
        harm = "could not read" if read_only else "would destroy"
        raise ConfigError(
            f"{path}: a {found} image, which a guest {harm}: we serve raw ones",
            how_to_serve(path, found, read_only),
        )


def _alignment(fd: int, path: str) -> tuple[int, int]:
    """What O_DIRECT wants of (offset and size, memory), found by trying.

    statx tells it since Linux 6.1 only, and not on every file system.
    """
    with mmap.mmap(-1, 2 * ALIGNMENT_MAX) as buffer:
        offset = next(
            (size for size in (512, 1024, 2048, 4096) if _reads(fd, buffer, 0, size)), None
        )
        if offset is None:
            raise ConfigError(f"{path}: O_DIRECT takes no read of 4096 bytes", "leave --direct")
        # Not finer than a guest's buffers are.
        memory = next(
            (size for size in (512, 1024, 2048) if _reads(fd, buffer, size, offset)),
            ALIGNMENT_MAX,
        )
    return offset, memory


def _reads(fd: int, buffer: mmap.mmap, start: int, size: int) -> bool:
    with memoryview(buffer) as whole, whole[start : start + size] as part:
        try:
            os.preadv(fd, [part], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise ConfigError(
                    f"{os.readlink(f'/proc/self/fd/{fd}')}: cannot be read: {error.strerror}"
                ) from None
            return False
    return True
