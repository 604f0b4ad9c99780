"""Work that may take long, on a thread of its own: whoever asks for it waits for nothing.

Knows nothing of what it does.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger("vhostpy")


class Background:
    """Does one thing after the other; its thread lives while there is something to do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._work: deque[Callable[[], object]] = deque()  # the first of it is under way
        self._running = False
        self._tell: Callable[[], object] | None = None
        # Only ever held for a moment. A collection may ask for work within: hence the R.
        self._lock = threading.RLock()

    @property
    def left(self) -> int:
        """Things that are not done yet."""
        return len(self._work)

    def do(self, work: Callable[[], object]) -> None:
        """Has `work` done, behind all that was asked for before."""
        with self._lock:
            self._work.append(work)
            self._start()

    def when_idle(self, tell: Callable[[], object]) -> None:
        """Calls `tell` once nothing is left, on whichever thread; forgets who asked before."""
        with self._lock:
            self._tell = tell if self._work else None
            self._start()
            if self._work:
                return
        tell()

    def _start(self) -> None:
        if self._running or not self._work:
            return
        self._running = True
        try:
            threading.Thread(target=self._run, name=self.name, daemon=True).start()
        except RuntimeError:  # the process may have no more threads; whoever asks next tries again
            self._running = False

    def _run(self) -> None:
        while True:
            try:
                # What a close reports has happened to somebody else's file.
                with contextlib.suppress(OSError):
                    self._work[0]()
            except Exception:
                log.exception("%s: internal error", self.name)
            with self._lock:
                self._work.popleft()
                if self._work:
                    continue
                self._running = False
                tell, self._tell = self._tell, None
            if tell is not None:
                tell()
            return
