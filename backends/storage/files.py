"""Which storage serves a file or block device: io_uring, or threads where there is none."""

import logging

from vhostpy.backends.storage.file import FileStorage
from vhostpy.backends.storage.storage import Storage
from vhostpy.errors import ConfigError

log = logging.getLogger("vhostpy")


def open_file(
    path: str,
    *,
    read_only: bool = False,
    block_size: int = 512,
    direct: bool = False,
    share_rw: bool = False,
    raw: bool = False,
) -> Storage:
    """The image at `path`. Raises ConfigError where it cannot be served."""
    try:
        from vhostpy.backends.storage.uring import UringStorage
        from vhostpy.backends.storage.uring_setup import UringUnavailable
    except ImportError:
        why = "vhostpy was built without liburing"
        hint = "install liburing's headers (Debian: liburing-dev) and build it again"
    else:
        try:
            return UringStorage(path, read_only, block_size, direct, share_rw, raw)
        except UringUnavailable as error:
            why = f"io_uring: {str(error).lower()}"
            hint = "see the sysctl kernel.io_uring_disabled, or a container's seccomp profile"
    if direct:
        raise ConfigError(f"{path}: O_DIRECT needs io_uring; {why}", f"{hint}; or leave --direct")
    storage = FileStorage(path, read_only, block_size, share_rw, raw)
    log.warning("%s: served by threads, which is slower: %s\n  next: %s", path, why, hint)
    return storage
