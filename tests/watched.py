"""A call fd that is dear to write to: very many epolls watch it, as a front-end's may."""

import contextlib
import os
import resource
import select
from collections.abc import Iterator

DUPS, EPOLLS = 200, 250
WATCHES = DUPS * EPOLLS  # 4 ms a write


@contextlib.contextmanager
def watched(fd: int) -> Iterator[None]:
    """Within, whoever writes to `fd` wakes so many watches."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    fds: list[int] = []
    epolls: list[select.epoll] = []
    try:
        fds += (os.dup(fd) for _ in range(DUPS))
        epolls += (select.epoll() for _ in range(EPOLLS))
        for epoll in epolls:
            for each in fds:
                epoll.register(each, select.EPOLLIN)
        yield
    finally:
        for epoll in epolls:
            epoll.close()
        for each in fds:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
