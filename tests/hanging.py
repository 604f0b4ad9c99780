"""Files whose close() hangs: what a front-end may send to stop whoever closes it.

`python -m tests.hanging DIRECTORY` serves a FUSE file there, `DIRECTORY/file`, that can be
opened; fstat and close of it are never answered.
"""

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LINGER_S = 20  # far longer than whoever waits for an answer has patience


@contextlib.contextmanager
def lingering_socket() -> Iterator[socket.socket]:
    """Its last close waits for a peer that reads nothing; the end of the block ends that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    with ours, peer:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
        try:
            yield ours
        finally:
            peer.close()  # with unread data: the connection is reset


@contextlib.contextmanager
def fuse_file(directory: Path) -> Iterator[int | None]:
    """An open file whose server hangs; None where this process may not mount."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.hanging", str(directory)], stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    with server, server.stdout:
        if server.stdout.readline() != b"mounted\n":
            yield None
            return
        try:
            yield os.open(directory / "file", os.O_RDWR)
        finally:
            server.kill()  # whoever waits for it gets an error then
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


# linux/fuse.h
LOOKUP, GETATTR, OPEN, INIT = 1, 3, 14, 26
UNANSWERED = (2, 18, 25, 36)  # FORGET, RELEASE, FLUSH, INTERRUPT
ROOT, FILE = 1, 2


def serve(directory: str) -> None:
    """Mounts and serves until it is killed."""
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    if ctypes.CDLL(None).mount(b"hanging", directory.encode(), b"fuse", 0, options):
        sys.exit(1)
    print("mounted", flush=True)
    while True:
        request = os.read(fuse, 1 << 20)
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        if operation in UNANSWERED or (operation == GETATTR and node == FILE):
            continue
        error, answer = 0, b""
        if operation == INIT:
            answer = struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 9, 65536, 1, 0, 0, 0)
        elif operation == LOOKUP:
            answer = struct.pack("<QQQQII", FILE, 0, 1, 0, 0, 0) + attributes(FILE, 0o100600)
        elif operation == GETATTR:
            answer = struct.pack("<QII", 1, 0, 0) + attributes(ROOT, 0o40700)
        elif operation == OPEN:
            answer = struct.pack("<QII", 1, 0, 0)
        else:
            error = -38  # ENOSYS
        os.write(fuse, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)


def attributes(inode: int, mode: int) -> bytes:
    """struct fuse_attr of 1 MiB."""
    return struct.pack("<QQQQQQIIIIIIIIII", inode, 1 << 20, *[0] * 7, mode, 1, *[0] * 3, 4096, 0)


if __name__ == "__main__":
    serve(sys.argv[1])
