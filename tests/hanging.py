"""Files whose close() or write() hangs: what a front-end may send to stop whoever uses it.

`python -m tests.hanging DIRECTORY` serves a FUSE file there, `DIRECTORY/file`, that can be
opened; fstat, close and page faults of it are never answered. `python -m tests.hanging DIRECTORY
FD` writes to FD what is in that file; with `watch`, an epoll of FD hands events out into it.
"""

import contextlib
import ctypes
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

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
    with _server(directory) as said:
        yield os.open(directory / "file", os.O_RDWR) if said is not None else None


@contextlib.contextmanager
def held(directory: Path, fd: int, what: str = "write") -> Iterator[bool]:
    """Somebody writes to `fd` and has its lock, if it has one, until the end of the block;
    False where this process may not mount. `read`: has the lock of its readers. `watch`: has that
    of an epoll that watches it, which its last close waits for, and does not hold `fd` itself."""
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(_server(directory))
        if said is None:
            yield False
            return
        command = [sys.executable, "-m", "tests.hanging", str(directory), str(fd), what]
        writer = subprocess.Popen(command, pass_fds=[fd])
        assert said.readline() == b"page fault\n"
        try:
            yield True
        finally:
            stack.close()  # it ends no sooner, even if killed
            writer.wait()


@contextlib.contextmanager
def _server(directory: Path) -> Iterator[IO[bytes] | None]:
    """What the server says once it has mounted; None where it may not."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.hanging", str(directory)], stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    with server, server.stdout:
        if server.stdout.readline() != b"mounted\n":
            yield None
            return
        try:
            yield server.stdout
        finally:
            server.kill()  # whoever waits for it gets an error then
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


# linux/fuse.h
LOOKUP, GETATTR, OPEN, READ, INIT = 1, 3, 14, 15, 26
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
        if operation == READ:
            print("page fault", flush=True)
        if operation in (*UNANSWERED, READ) or (operation == GETATTR and node == FILE):
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


def write(directory: str, fd: int, what: str) -> None:
    """Not by mmap of Python: that asks for the file's size."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    file = os.open(f"{directory}/file", os.O_RDWR)
    size, offset = ctypes.c_size_t(4096), ctypes.c_long(0)
    where = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file, offset)
    if what == "write":
        libc.write(fd, ctypes.c_void_p(where), ctypes.c_size_t(8))
        return
    if what == "read":
        libc.read(fd, ctypes.c_void_p(where), ctypes.c_size_t(8))
        return
    epoll = select.epoll()
    epoll.register(fd, select.EPOLLIN)
    os.close(fd)
    libc.epoll_wait(epoll.fileno(), ctypes.c_void_p(where), 1, -1)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        write(sys.argv[1], int(sys.argv[2]), sys.argv[3])
