"""Files that move less than they are asked to: a FUSE server with a mind of its own.

`python -m tests.short DIRECTORY SIZE` serves in DIRECTORY, each of SIZE bytes:
`short` moves at most some thousand bytes at a time, `full` takes none in its second half
(ENOSPC), `broken` gives none there (EIO), `ended` says that it ends there.
"""

import contextlib
import ctypes
import errno
import itertools
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# linux/fuse.h
LOOKUP, GETATTR, OPEN, READ, WRITE, INIT = 1, 3, 14, 15, 16, 26
DONE = (18, 20, 25)  # RELEASE, FSYNC, FLUSH
UNANSWERED = (2, 36)  # FORGET, INTERRUPT
DIRECT_IO = 1  # FOPEN_DIRECT_IO: no cache of the kernel's makes up for it
ROOT = 1
FILES = {name.encode(): number for number, name in enumerate(
    ("short", "full", "broken", "ended"), ROOT + 1)}  # fmt: skip


@contextlib.contextmanager
def short_files(directory: Path, size: int) -> Iterator[Path | None]:
    """They are there while the block runs; None where this process may not mount."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.short", str(directory), str(size)], stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    with server, server.stdout:
        if server.stdout.readline() != b"mounted\n":
            yield None
            return
        try:
            yield directory
        finally:
            server.kill()
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


class Server:
    def __init__(self, size: int) -> None:
        self.size = size
        self.contents = {number: bytearray(size) for number in FILES.values()}
        self.limits = itertools.cycle((1, 4096, 77, 512, 5000, 3, 1000))

    def answer(self, operation: int, node: int, body: bytes) -> bytes:
        """Raises OSError where that is the answer."""
        if operation == INIT:
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 1 << 5, 12, 9, 65536, 1, 0, 0, 0)
        if operation == LOOKUP:
            number = FILES.get(body.rstrip(b"\0"))
            if number is None:
                raise OSError(errno.ENOENT, "")
            return struct.pack("<QQQQII", number, 0, 1, 1, 0, 0) + self.attributes(number)
        if operation == GETATTR:
            return struct.pack("<QII", 1, 0, 0) + self.attributes(node)
        if operation == OPEN:
            return struct.pack("<QII", 1, DIRECT_IO, 0)
        if operation in (READ, WRITE):
            return self.transfer(operation, node, body)
        if operation in DONE:
            return b""
        raise OSError(errno.ENOSYS, "")

    def transfer(self, operation: int, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        content = self.contents[node]
        if node == FILES[b"short"]:
            size = min(size, next(self.limits))
        elif offset + size > self.size // 2:
            if operation == WRITE and node == FILES[b"full"]:
                raise OSError(errno.ENOSPC, "")
            if operation == READ and node == FILES[b"broken"]:
                raise OSError(errno.EIO, "")
            if node == FILES[b"ended"]:
                size = max(self.size // 2 - offset, 0)
        if operation == READ:
            return bytes(content[offset : offset + size])
        content[offset : offset + size] = body[40 : 40 + size]
        return struct.pack("<II", size, 0)

    def attributes(self, number: int) -> bytes:
        """struct fuse_attr."""
        mode = 0o40700 if number == ROOT else 0o100600
        return struct.pack("<QQQQQQIIIIIIIIII", number, self.size, *[0] * 7, mode, 1, *[0] * 3,
                           4096, 0)  # fmt: skip


def serve(directory: str, size: int) -> None:
    """Mounts and serves until it is killed."""
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    if ctypes.CDLL(None).mount(b"short", directory.encode(), b"fuse", 0, options):
        sys.exit(1)
    print("mounted", flush=True)
    server = Server(size)
    while True:
        request = os.read(fuse, 1 << 20)
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        if operation in UNANSWERED:
            continue
        error, answer = 0, b""
        try:
            answer = server.answer(operation, node, request[40:])
        except OSError as caught:
            error = -(caught.errno or errno.EIO)
        os.write(fuse, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
