"""Runs of several devices by turns, until each has enough that can be compared.

What disturbs the machine then disturbs all alike; and two things are looked at in each
run, since they change figures by a factor of two: whether both ends had their cores to
themselves, and whether these were two cores at all. On a virtual machine two processors
may be threads of one core for minutes: lines then cost a fifth, and all else twice.
"""

import argparse
import sys
import time
from typing import Any

from bench.peers.devices import DEVICE_CORE, Device
from bench.peers.generators import GENERATOR_CORE
from bench.peers.results import UNDISTURBED, Results
from vhostpy.load._line import line_cost

# Ticks for a line of the other processor, one after the other: 25..40 where both are threads
# of one core, 150..210 where they are not.
APART_TICKS = 80


def interleave(
    case: Any, devices: list[Any], results: Results, options: argparse.Namespace
) -> None:
    """By turns until each has `options.pairs` good runs, or there were too many."""
    good = dict.fromkeys((device.name for device in devices), 0)
    for turn in range(options.pairs * (1 + options.retries)):
        for device in list(devices):
            outcome = attempt(case, device, options)
            results.add(case, device.name, outcome)
            good[device.name] += is_good(outcome)
            print(f"{case.name} {turn + 1}: {device.name} {_said(case, outcome)}", file=sys.stderr)
            if "error" in outcome and turn == 0 and device.name != "vhostpy":
                devices.remove(device)  # it can't do this
                del good[device.name]
        if min(good.values(), default=0) >= options.pairs:
            return


def attempt(case: Any, device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """One run of one device: what it gave, or the error."""
    device.resume()
    try:
        outcome: dict[str, Any] = case.generator(device, options.seconds, **case.plan)
        if case.unit == "us":
            outcome["value"] = outcome["latency_p50_us"]
    except Exception as error:
        outcome = {"error": str(error).splitlines()[0]}
    finally:
        # At once, before a hypervisor finds the processors idle and moves them.
        device.pause()
        lines = line_cost(GENERATOR_CORE, DEVICE_CORE)
        device.resume()
        time.sleep(0.3)  # it notices that the generator has gone
        device.pause()
    apart = lines["line_ticks_dependent"] >= APART_TICKS
    return outcome | lines | {"cores": "apart" if apart else "shared"}


def cpu_share(outcome: dict[str, Any]) -> float:
    """What the two ends had of their processors, the worse of them."""
    names = "generator_cpu_share", "device_cpu_share"
    return min((outcome[name] for name in names if name in outcome), default=0.0)


def is_good(outcome: dict[str, Any]) -> bool:
    """Whether a run tells something about two cores."""
    return (
        "error" not in outcome
        and outcome["cores"] == "apart"
        and cpu_share(outcome) >= UNDISTURBED
    )


def _said(case: Any, outcome: dict[str, Any]) -> str:
    if "error" in outcome:
        return str(outcome["error"])
    disturbed = "" if cpu_share(outcome) >= UNDISTURBED else ", disturbed"
    return f"{outcome['value']:.2f} {case.unit}, cores {outcome['cores']}{disturbed}"
