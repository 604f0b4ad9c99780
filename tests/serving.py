"""Servers in a thread of this process, for tests that need a real socket."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

from vhostpy.server.listen import Server


class Loop:
    """An asyncio loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="servers")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 20) -> Any:
        """Runs `work` there and waits for its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextlib.contextmanager
def serving(*servers: Server) -> Iterator[Loop]:
    """Listens with all `servers` while the block runs."""
    loop = Loop()
    try:
        for server in servers:
            loop.run(server.start())
        try:
            yield loop
        finally:
            for server in servers:
                loop.run(server.close())
    finally:
        loop.close()
