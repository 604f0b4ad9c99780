"""Medians, spreads and ratios of interleaved runs; written as JSON, table and chart."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from bench.peers import chart, lines
from bench.peers.case import Case
from bench.peers.placement import JUDGED, WORDS, placement

FOLDER = Path(__file__).parents[2]
MEASURED = ("vhostpy", "backends", "vswitch", "setup.py", "bench", ":!bench/results")
DIRTY = "-dirty"

BUSY = 0.95  # a device less busy than that is not what limits the rate
FULL = 0.9  # of the generator's bursts: it never waited for the device
UNDISTURBED = 0.96  # of its core, that each end had
MET = 0.92  # of a goal: what noise leaves of it
ENOUGH = 3  # runs: a median of fewer decides nothing
# What an end had of its processor; of the machine, what was not somebody else's.
SHARES = ("generator_cpu_share", "device_cpu_share", "machine_share")
LATENCIES = {"latency_p50_us": "p50", "latency_p99_us": "p99", "latency_p99_9_us": "p99.9"}
NOTES = {
    "net": "Two workers have both cores, and the generator's thread, of class SCHED_IDLE, what "
    "they leave: it fills all rings, all ports are kicked at once, both workers wake and drain "
    "them at the same time; cycles are the first worker's, beside the same with a process for "
    "each pair of ports. ",
    "blk": "fio runs on the device's core, on the file that vhostpy serves. The generator is busy "
    "while requests come back or go: a device that is busy all the time, beside a generator that "
    "is not, is what limits. ",
}


class Results:
    """All runs of one kind of device: this run's, and those of the same day and commit."""

    def __init__(
        self, kind: str, date: str, cases: Sequence[Case], folder: Path | None = None
    ) -> None:
        self.kind, self.date, self.folder = kind, date, folder
        self.commit = _commit()
        self.cases = {case.name: case for case in cases}
        self.runs: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def resume(self) -> None:
        """Takes up what the folder has of this day and commit."""
        path = self._path(".json")
        # Nobody knows what changed in a tree since its runs.
        if path is not None and path.exists() and not self.commit.endswith(DIRTY):
            self.runs = json.loads(path.read_text())["runs"]

    def has(self, case: Case) -> bool:
        """Whether there is something of ours."""
        return any("value" in run for run in self.runs.get(case.name, {}).get("vhostpy", []))

    def add(self, case: Case, device: str, outcome: dict[str, Any]) -> None:
        """One run."""
        self.cases.setdefault(case.name, case)
        self.runs.setdefault(case.name, {}).setdefault(device, []).append(outcome)

    def done(self, case: Case) -> None:
        """All runs of a case are there: what comes after it may be broken off."""
        if self.folder is not None:
            self.write(self.folder)

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary for each case and device."""
        return [
            row
            for name, case in self.cases.items()
            for cores in WORDS
            for row in self._rows(case, cores, self.runs.get(name, {}))
        ]

    def _rows(
        self, case: Case, cores: str, devices: dict[str, list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Of one case, the runs of one placement; undisturbed ones where there are any."""
        chosen = {
            device: _choose([run for run in runs if placement(case, run) == cores])
            for device, runs in devices.items()
        }
        if not any(chosen.values()):
            return []
        rows = []
        medians = {device: _median(runs, "value") for device, runs in chosen.items()}
        ours = medians.get("vhostpy")
        for device, runs in chosen.items():
            if runs:
                values = [run["value"] for run in runs if "value" in run]
                row: dict[str, Any] = {
                    "case": case.name,
                    "cores": cores,
                    "line_ticks": _median(runs, "line_ticks"),
                    "line_ticks_in_a_row": _median(runs, "line_ticks_in_a_row"),
                    "line_ticks_overwritten": _median(runs, "line_ticks_overwritten"),
                    "wake_us": _median(runs, "wake_us"),
                    "text": case.text,
                    "device": device,
                    "unit": case.unit,
                    "median": medians[device],
                    "low": min(values, default=None),
                    "high": max(values, default=None),
                    "runs": len(values),
                    "spread": _spread(values),
                    "busy_share": _median(runs, "busy_share"),
                    "saturates": case.saturates,
                    "cycles_per_packet": _median(runs, "cycles_per_packet"),
                    "generator_full_share": _median(runs, "generator_full_share"),
                    "generator_busy_share": _median(runs, "generator_busy_share"),
                    "cpu_share": _median(runs, *SHARES),
                    **{name: _median(runs, name) for name in LATENCIES},
                    "error": next((run["error"] for run in runs if "error" in run), None),
                    "chart": case.chart,
                }
                if device == "vhostpy":
                    row |= _bound(case, row)
                    row["most"] = case.most
                    if case.most and row["median"] is not None and _judged(cores, runs):
                        row["met"] = row["median"] <= case.most / MET
                elif ours and row["median"]:
                    ratio = ours / row["median"]
                    row["ratio"] = 1 / ratio if case.lower_is_better else ratio
                    row["goal"] = case.goals.get(device)
                    if row["goal"] and _judged(cores, chosen["vhostpy"]) and _judged(cores, runs):
                        row["met"] = row["ratio"] >= MET * row["goal"]
                rows.append(row)
        return rows

    def markdown(self) -> str:
        """The table, for people."""
        text = [
            f"# vhostpy beside its peers: {self.kind}, {self.date}",
            "",
            "`make bench-peers`: medians of interleaved runs; device on one core, generator on "
            f"another; {_machine()}; commit {self.commit}.",
            "",
            "| case | device | median | low..high | runs | vhostpy is | goal | cycles | bound "
            "| busy | |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        ]
        for row in self.rows():
            text.append("| " + " | ".join(_cells(row)) + " |")
        text += [
            "",
            f"Goals are ratios of medians, met at {MET:.0%}; or a most; judged where {ENOUGH} runs "
            "or more of each had two cores to themselves, or cores that sleep. The percentage is "
            "from the lowest to the highest run, of the median. 'Generator-limited': the device "
            f"was less than {BUSY:.0%} busy, or the generator never had to wait for it. Cycles "
            "are per packet, of the device's polls that found work. The last column says where "
            "the machine had put both processors meanwhile: runs compare only with their like. "
            f"{NOTES[self.kind]}{self._limits()}",
            "",
        ]
        return "\n".join(text)

    def _limits(self) -> str:
        """What the bounds are, and the cost of lines that most of them come from."""
        placed: dict[str, list[dict[str, Any]]] = {cores: [] for cores in WORDS}
        for name, case in self.cases.items():
            for run in chain(*self.runs.get(name, {}).values()):
                placed[placement(case, run)].append(run)
        costs = "; ".join(cost for cores, runs in placed.items() if (cost := _costs(runs, cores)))
        return (
            "The limit: what a cache line costs that the other processor has just written, in a "
            "row, anywhere, where the next depends on it, and to overwrite, of 16 KiB that fit "
            f"its first cache: {costs or 'never measured'}. The bound is that cost of the lines "
            "that a frame brings from the other core, read + overwritten: where both go on at "
            "the same time, and one after the other; or the time in which a thread that the "
            "other processor wakes begins to run, the median of 100."
        )

    def _path(self, suffix: str) -> Path | None:
        return self.folder and self.folder / f"{self.date}-{self.commit}-{self.kind}{suffix}"

    def write(self, folder: Path) -> None:
        """DATE-COMMIT-KIND.json, .md and .svg."""
        if not self.runs:
            return
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{self.date}-{self.commit}-{self.kind}"
        data = {
            "kind": self.kind, "date": self.date, "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "machine": _machine(), "commit": self.commit, "rows": self.rows(), "runs": self.runs,
        }  # fmt: skip
        stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        stem.with_suffix(".md").write_text(self.markdown())
        picture = chart.draw(self.rows(), self.kind)
        if picture:
            stem.with_suffix(".svg").write_text(picture)


def _bound(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """Lines of a frame and what they cost, where that can be said."""
    counted = lines.of_case(case)
    if counted is None or not row["line_ticks_overwritten"]:
        return {}
    # Of a long frame they lie in a row.
    read_ticks = row["line_ticks_in_a_row" if counted.read > 2 else "line_ticks"]
    least, most = lines.bound(counted, read_ticks, row["line_ticks_overwritten"])
    return {"lines": counted, "bound_low": least, "bound_high": most}


def _cells(row: dict[str, Any]) -> list[str]:
    if row["median"] is None:
        return [row["text"], row["device"], "-", *[""] * 7, row["error"] or ""]
    notes = [WORDS[row["cores"]]]
    busy = row["busy_share"]
    full = row["generator_full_share"] or 0.0
    if row["saturates"] and ((busy is not None and busy < BUSY) or full > FULL):
        notes.append("generator-limited")
    if row["generator_busy_share"] is not None:
        notes.append(f"generator {row['generator_busy_share']:.0%} busy")
    if row["cpu_share"] is not None and row["cpu_share"] < UNDISTURBED:
        notes.append(f"disturbed: {row['cpu_share']:.0%} of the cores were ours")
    if row["unit"] == "us":
        notes += [f"{name} {row[key]:.2f}" for key, name in LATENCIES.items() if row[key]]
    if row.get("goal") or row.get("most"):
        # None: of disturbed runs, of few, or of one core, which decide nothing.
        notes.append({True: "met", False: "**missed**", None: "not judged"}[row.get("met")])
    if row["error"]:
        notes.append(row["error"])
    ratio, goal, most = row.get("ratio"), row.get("goal"), row.get("most")
    bound = ""
    if row.get("lines"):
        read, written = row["lines"]
        bound = f"{read:.1f} + {written:.1f}: {row['bound_low']:.0f}..{row['bound_high']:.0f}"
    elif row["device"] == "vhostpy" and row["unit"] == "us" and row["wake_us"]:
        bound = f"to be woken: {row['wake_us']:.0f} us"
    cycles = row["cycles_per_packet"]
    return [
        row["text"],
        row["device"],
        f"{row['median']:.2f} {row['unit']}",
        f"{row['low']:.2f}..{row['high']:.2f} ({row['spread']:.0%})",
        str(row["runs"]),
        f"{ratio:.2f} x" if ratio else "",
        f"{goal:.2f} x" if goal else f"<= {most:g} {row['unit']}" if most else "",
        f"{cycles:.0f}" if cycles else "",
        bound,
        f"{busy:.0%}" if busy is not None else "",
        ", ".join(notes),
    ]


def _choose(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if is_calm(run)] or runs


def _costs(runs: list[dict[str, Any]], cores: str) -> str:
    """Of a line, in the four ways that line_cost() measures; empty where nothing did."""
    names = "in_a_row", "", "dependent", "overwritten"
    costs = [_median(runs, "line_ticks" + (f"_{name}" if name else "")) for name in names]
    known = [f"{cost:.0f}" for cost in costs if cost is not None]
    return f"{', '.join(known)} cycles ({WORDS[cores]})" if len(known) == len(names) else ""


def is_calm(run: dict[str, Any]) -> bool:
    """Whether it gave something, and both ends had their cores to themselves."""
    return "value" in run and all(run.get(name, 1) >= UNDISTURBED for name in SHARES)


def _judged(cores: str, runs: list[dict[str, Any]]) -> bool:
    return cores in JUDGED and len(runs) >= ENOUGH and all(map(is_calm, runs))


def _median(runs: list[dict[str, Any]], *names: str) -> float | None:
    """Over the runs, of the smallest of these."""
    values = [
        min(run[name] for name in names if run.get(name) is not None)
        for run in runs
        if any(run.get(name) is not None for name in names)
    ]
    return statistics.median(values) if values else None


def _spread(values: list[float]) -> float:
    """From the lowest to the highest, as a share of the median."""
    middle = statistics.median(values) if values else 0.0
    return (max(values) - min(values)) / middle if middle else 0.0


def _machine() -> str:
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.machine(),
    )  # fmt: skip
    return f"{model}, Linux {platform.release().partition('-')[0]}"


def _commit() -> str:
    """The last that changed what is measured, or how; with DIRTY where that is not all."""
    run = partial(subprocess.run, cwd=FOLDER, capture_output=True, text=True, check=False)
    commit = run(["git", "log", "-1", "--format=%h", "--", *MEASURED]).stdout.strip()
    changed = run(["git", "status", "--porcelain", "--", *MEASURED]).stdout.strip()
    return (commit or "unknown") + (DIRTY if changed else "")
