"""A device and its generator that run by turns with others of the same processors.

The generator is a process of its own, so that SIGSTOP holds all of it: this module, run with
its plan. It measures a turn when it is told to by a line.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from bench.peers.core import prefer
from bench.peers.devices import Vhostpy, cpu_s
from bench.peers.generators import GENERATOR_CORE
from vhostpy.load import blk, net
from vhostpy.load.blk_loop import BlkPhase
from vhostpy.load.net_loop import Phase, Touch
from vhostpy.load.runner import Runner, Sample, seconds_between, shares

SETTLE_S = 0.05  # of a turn, before what counts
COUNTED_S = 0.25
DRAIN_S = 0.002  # until a device has done all that its generator has left


class Pair:
    """A device of some tree, and its generator of this one; both stopped but for turns."""

    def __init__(self, folder: Path, name: str, tree: Path, verb: str, flags: Sequence[str],
                 plan: dict[str, Any]) -> None:  # fmt: skip
        count = 2 if verb == "net" else 1
        self.device = Vhostpy(folder, count, verb, *flags, name=name, tree=tree)
        self.plan = {"verb": verb, "sockets": self.device.sockets, "plan": plan}
        self.generator: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.device.start()
            assert self.device.process is not None
            prefer(self.device.process.pid)
            argv = [sys.executable, "-m", "bench.turns", str(self.device.process.pid),
                    json.dumps(self.plan)]  # fmt: skip
            self.generator = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            prefer(self.generator.pid)
            self._answer()
            self._pause()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.generator is not None:
            self.generator.kill()
            self.generator.wait()
        self.device.close()

    def turn(self) -> dict[str, float]:
        """What `_turn` says of one."""
        assert self.generator is not None and self.generator.stdin is not None
        self.device.resume()
        self._signal(signal.SIGCONT)
        self.generator.stdin.write(b"turn\n")
        self.generator.stdin.flush()
        answer: dict[str, float] = self._answer()
        self._pause()
        return answer

    def work(self) -> tuple[int, int]:
        """Of all turns: ticks in polls that found work, and packets or requests. `resume` of
        its device has to be a second ago: it counts no oftener."""
        load = self.device.mark()
        return load["busy_ticks"], load["items"]

    def _pause(self) -> None:
        self._signal(signal.SIGSTOP)
        # Stopped in a poll that finds work, the device would count the time until its next turn.
        time.sleep(DRAIN_S)
        self.device.pause()

    def _signal(self, number: int) -> None:
        assert self.generator is not None
        self.generator.send_signal(number)

    def _answer(self) -> Any:
        assert self.generator is not None and self.generator.stdout is not None
        line = self.generator.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.device.name}: its generator ended")
        return json.loads(line)


# The generator's process. ------------------------------------------------------------------


def _serve(pid: int, verb: str, sockets: list[str], plan: dict[str, Any]) -> None:
    """Answers each line with a turn's figures."""
    with ExitStack() as stack:
        runner = stack.enter_context(MAKE[verb](stack, sockets, plan))
        START[verb](runner)
        print("{}", flush=True)
        for _ in sys.stdin:
            print(json.dumps(_turn(runner, pid)), flush=True)


def _turn(runner: Runner, pid: int) -> dict[str, float]:
    time.sleep(SETTLE_S)
    first, first_s = runner.sample(), cpu_s(pid)
    time.sleep(COUNTED_S)
    last, last_s = runner.sample(), cpu_s(pid)
    runner.want_alive()
    seconds = seconds_between(first, last)
    return {
        "rate": (_items(last) - _items(first)) / seconds / 1e6,
        "device_share": (last_s - first_s) / seconds,
        "generator_share": shares(first, last)["generator_cpu_share"],
    }


def _items(sample: Sample) -> int:
    """Packets that came, or requests that were done."""
    names = {"received", "reads", "writes"}.intersection(sample.counts[0])
    return sum(map(sample.total, names))


def _net(stack: ExitStack, sockets: list[str], plan: dict[str, Any]) -> Runner:
    touch = Touch[plan["touch"]]
    wanted = net.NetPlan(tuple(sockets), cpu=GENERATOR_CORE, **plan | {"touch": touch})
    generator, front_ends = net.prepare(wanted, stack)
    return Runner(generator, sockets, front_ends, cpu=GENERATOR_CORE)


def _send(runner: Runner) -> None:
    net.teach(runner)
    runner.generator.enter(Phase.SEND)


def _blk(stack: ExitStack, sockets: list[str], plan: dict[str, Any]) -> Runner:
    # With EVENT_IDX, as guests have it.
    wanted = blk.BlkPlan(sockets[0], cpu=GENERATOR_CORE, event_idx=True, **plan)
    generator, front_end = blk.prepare(wanted, stack)[:2]
    return blk.DiskRunner(generator, sockets, [front_end], cpu=GENERATOR_CORE)


def _read(runner: Runner) -> None:
    runner.generator.enter(BlkPhase.RUN)


MAKE = {"net": _net, "blk": _blk}
START = {"net": _send, "blk": _read}

if __name__ == "__main__":
    _serve(int(sys.argv[1]), **json.loads(sys.argv[2]))
