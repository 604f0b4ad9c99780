"""What happens around a generator's loop: its thread, samples, the measured time."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from vhostpy.errors import LEAVE_NON_BLOCKING, ProtocolError, VhostpyError
from vhostpy.frontend.frontend import FrontEnd
from vhostpy.load.report import Progress
from vhostpy.load.target import hung_up


@dataclass(slots=True)
class Sample:
    """A generator's counters at a moment."""

    at_s: float
    ran_s: float  # processor time of the generator's thread
    counts: list[dict[str, int]]  # of each queue, or pair of queues
    ticks: dict[str, float]

    def total(self, name: str) -> int:
        """Of all of them together."""
        return sum(count[name] for count in self.counts)


def seconds_between(a: Sample, b: Sample) -> float:
    """More than 0."""
    return max(b.at_s - a.at_s, 1e-9)


def shares(a: Sample, b: Sample) -> dict[str, float]:
    """What the generator had of its processor, and how much of that it used."""
    busy = b.ticks["busy"] - a.ticks["busy"]
    return {
        # Below 1 something else ran on its processor.
        "generator_cpu_share": (b.ran_s - a.ran_s) / seconds_between(a, b),
        "generator_busy_share": busy / max(b.ticks["total"] - a.ticks["total"], 1),
    }


def thread_time_s(thread: threading.Thread) -> float:
    """Processor time of a thread so far."""
    if thread.ident is None or not thread.is_alive():
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


class Runner:
    """One run of a generator, in a thread of its own, on the back-ends that it loads.

    Its loop runs within `with`; what it raised is raised again at the end. `sockets` name
    the back-ends of `front_ends` in errors.
    """

    def __init__(
        self,
        generator: Any,
        sockets: Sequence[str],
        front_ends: Sequence[FrontEnd],
        *,
        cpu: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.generator = generator
        self.sockets = sockets
        self.front_ends = front_ends
        self.cpu = cpu
        self.progress = progress or Progress()
        self.interrupted = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.generator.stop()
        self._thread.join()
        self.progress.done()
        if self._failure is not None:
            raise self._failure

    def _loop(self) -> None:
        try:
            # A signal has to find the main thread, where Python looks at it.
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
            if self.cpu is not None:
                os.sched_setaffinity(0, {self.cpu})
            self.generator.run()
        except BaseException as error:
            self._failure = error

    @property
    def hugepages(self) -> bool:
        """Whether all memory of the guests is in hugepages."""
        return all(front_end.shared.page_bytes > 4096 for front_end in self.front_ends)

    def sample(self) -> Sample:
        """What has been done so far."""
        ran_s = thread_time_s(self._thread)
        generator = self.generator
        return Sample(time.monotonic(), ran_s, generator.counters(), generator.ticks())

    def measure(
        self, warmup_s: float, seconds: float, line: Callable[[Sample, Sample, float], str]
    ) -> tuple[Sample, Sample]:
        """The first and the last moment of the measured time; latencies are of it alone.

        `line` tells people of what was done between two moments, so many seconds after the
        first. Ctrl-C ends the measured time, and only a second one the run.
        """
        self.wait(warmup_s)
        self.generator.forget_latencies()
        first = previous = self.sample()
        try:
            while (left := first.at_s + seconds - time.monotonic()) > 0:
                self.wait(min(left, 1.0), step=1.0)
                now = self.sample()
                self.progress.show(partial(line, previous, now, now.at_s - first.at_s))
                previous = now
        except KeyboardInterrupt:
            self.interrupted = True
        return first, self.sample()

    def wait(
        self, seconds: float, done: Callable[[], bool] = lambda: False, step: float = 0.01
    ) -> bool:
        """Until `done`, at most `seconds`; raises where a back-end or the loop has ended."""
        end = time.monotonic() + seconds
        while not done():
            self.want_alive()
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, step))
        return True

    def want_alive(self) -> None:
        """Raises where a back-end or the loop has ended."""
        for path, front_end in zip(self.sockets, self.front_ends, strict=True):
            if front_end.memory.poisoned:
                raise ProtocolError(
                    f"{path}: the guest's memory is gone, or was cut short",
                    "the back-end is at fault: it must not shrink memory that it is sent",
                )
        broken = self.generator.broken_pair
        if broken is not None:
            path = self.sockets[self.generator.counters()[broken].get("port", 0)]
            if self.generator.deaf:
                raise ProtocolError(
                    f"{path}: the back-end makes us wait at its kick fd", LEAVE_NON_BLOCKING
                )
            raise ProtocolError(
                f"{path}: the back-end gave back a chain that it does not have",
                "the back-end is at fault: see what it says itself",
            )
        if not self._thread.is_alive():
            raise VhostpyError("the generator ended early")
        gone = hung_up(self.front_ends)
        if gone is not None:
            raise ProtocolError(
                f"{self.sockets[gone]}: the back-end closed the connection",
                "see what it says itself",
            )
