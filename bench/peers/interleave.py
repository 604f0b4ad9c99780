"""Runs of several devices by turns, until each has enough that can be compared.

What disturbs the machine then disturbs all alike; and two things are looked at in each
run, since they change figures by a factor of two: whether both ends had their cores to
themselves, and where these were (`placement.py`).
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.cores import wake_cost
from bench.peers.case import Case
from bench.peers.devices import DEVICE_CORE, Device
from bench.peers.generators import GENERATOR_CORE
from bench.peers.placement import JUDGED, WORDS, costs_of, placement, witness
from bench.peers.results import Results, is_calm

PAIRS = 5


def run_group(
    cases: list[Case],
    devices: list[Device],
    results: Results,
    options: argparse.Namespace,
    ready: Callable[[Device], None] | None = None,
) -> None:
    """Cases that share their devices; `ready` is called once for each that has started."""
    started: list[Device] = []
    try:
        for device in devices:
            if options.devices and device.name not in options.devices:
                continue
            started.append(device)
            if not _comes_up(device, cases, results, ready):
                started.remove(device)
        for number, case in enumerate(cases):
            for device in [each for each in started if each.is_gone]:
                print(f"{device.name}: serves no more, is started again", file=sys.stderr)
                device.close()
                if not _comes_up(device, cases[number:], results, ready):
                    started.remove(device)
            used = [device for device in started if device.name in ("vhostpy", *case.peers)]
            interleave(case, used, results, options)
    finally:
        for device in started:
            device.close()


def _comes_up(
    device: Device,
    cases: list[Case],
    results: Results,
    ready: Callable[[Device], None] | None,
) -> bool:
    """Starts it; if that fails, its cases get the error."""
    try:
        device.start()
        if ready:
            ready(device)
        device.pause()
    except Exception as error:
        device.close()
        for case in cases:
            if device.name in ("vhostpy", *case.peers):
                results.add(case, device.name, _failed(error))
        print(f"{device.name}: {error}", file=sys.stderr)
        return False
    return True


def interleave(
    case: Case, devices: list[Device], results: Results, options: argparse.Namespace
) -> None:
    """By turns until each has as many good runs as are wanted in one placement, or there were
    too many."""
    good = {device.name: Counter[str]() for device in devices}
    if not devices:
        return
    pairs = options.pairs or case.pairs or PAIRS
    for turn in range(pairs * (1 + options.retries)):
        for device in list(devices):
            outcome = attempt(case, device, options)
            results.add(case, device.name, outcome)
            good[device.name][placement(case, outcome)] += is_calm(outcome)
            print(f"{case.name} {turn + 1}: {device.name} {_said(case, outcome)}", file=sys.stderr)
            if "error" in outcome and turn == 0 and device.name != "vhostpy":
                devices.remove(device)  # it can't do this
                del good[device.name]
        if any(all(runs[placed] >= pairs for runs in good.values()) for placed in JUDGED):
            break
    results.done(case)


def attempt(case: Case, device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """One run of one device: what it gave, or the error."""
    device.resume()
    try:
        generator = device.generator or case.generator
        run = partial(generator, device, options.seconds, **case.plan | device.plan)
        outcome = _slept(run) if case.sleeps else _witnessed(run, options.seconds)
        outcome |= {"rate": outcome["value"], "value": outcome[case.figure]}
    except Exception as error:
        outcome = _failed(error)
    finally:
        time.sleep(0.3)  # it notices that the generator has gone
        device.pause()
    return outcome


def _witnessed(run: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    with witness(GENERATOR_CORE, DEVICE_CORE) as seen:
        outcome = run()
    return outcome | costs_of(seen, seconds)


def _slept(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    # No witness: it would be what wakes the processors, and what the tails show.
    return run() | wake_cost(GENERATOR_CORE, DEVICE_CORE)


def _failed(error: Exception) -> dict[str, Any]:
    lines = str(error).splitlines()
    return {"error": lines[0] if lines else type(error).__name__}


def _said(case: Case, outcome: dict[str, Any]) -> str:
    if "error" in outcome:
        return str(outcome["error"])
    disturbed = "" if is_calm(outcome) else ", disturbed"
    return f"{outcome['value']:.2f} {case.unit}, {WORDS[placement(case, outcome)]}{disturbed}"
