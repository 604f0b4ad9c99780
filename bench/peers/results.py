"""Medians, spreads and ratios of interleaved runs; written as JSON, table and chart."""

import argparse
import json
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

from bench.peers import chart

BUSY = 0.95  # a device less busy than that is not what limits the rate
FULL = 0.9  # of the generator's bursts: it never waited for the device
UNDISTURBED = 0.96  # of its core, that each end had
MET = 0.92  # of a goal: what noise leaves of it


class Results:
    """All runs of one kind of device."""

    def __init__(self, kind: str, date: str, options: argparse.Namespace) -> None:
        self.kind, self.date = kind, date
        self.pairs, self.seconds = options.pairs, options.seconds
        self.cases: dict[str, Any] = {}
        self.runs: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def add(self, case: Any, device: str, outcome: dict[str, Any]) -> None:
        """One run."""
        self.cases[case.name] = case
        self.runs.setdefault(case.name, {}).setdefault(device, []).append(outcome)

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary for each case and device."""
        return [
            row
            for name, devices in self.runs.items()
            for cores in ("apart", "shared")
            for row in self._rows(self.cases[name], cores, devices)
        ]

    def _rows(
        self, case: Any, cores: str, devices: dict[str, list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Of one case, the runs of one placement; undisturbed ones where there are any."""
        chosen = {device: _choose(runs, cores) for device, runs in devices.items()}
        if not any(chosen.values()):
            return []
        rows = []
        medians = {device: _median(runs, "value") for device, runs in chosen.items()}
        ours = medians.get("vhostpy")
        for device, runs in chosen.items():
            if runs:
                values = [run["value"] for run in runs if "value" in run]
                row = {
                    "case": case.name,
                    "cores": cores,
                    "line_ticks": _median(runs, "line_ticks"),
                    "line_ticks_in_a_row": _median(runs, "line_ticks_in_a_row"),
                    "text": case.text,
                    "device": device,
                    "unit": case.unit,
                    "median": medians[device],
                    "low": min(values, default=None),
                    "high": max(values, default=None),
                    "runs": len(values),
                    "busy_share": _median(runs, "busy_share"),
                    "cycles_per_packet": _median(runs, "cycles_per_packet"),
                    "generator_full_share": _median(runs, "generator_full_share"),
                    "cpu_share": _median(runs, "generator_cpu_share", "device_cpu_share"),
                    "error": next((run["error"] for run in runs if "error" in run), None),
                    "chart": case.chart,
                }
                if device != "vhostpy" and ours and row["median"]:
                    ratio = ours / row["median"]
                    row["ratio"] = 1 / ratio if case.lower_is_better else ratio
                    row["goal"] = case.goals.get(device)
                    both = [_calm(chosen[name]) for name in ("vhostpy", device)]
                    if row["goal"] and cores == "apart" and all(both):
                        row["met"] = row["ratio"] >= MET * row["goal"]
                rows.append(row)
        return rows

    def markdown(self) -> str:
        """The table, for people."""
        lines = [
            f"# vhostpy beside its peers: {self.kind}, {self.date}",
            "",
            f"`make bench-peers`: medians of {self.pairs} interleaved runs of {self.seconds} s; "
            f"device on one core, generator on another; {_machine()}.",
            "",
            "| case | device | median | low..high | runs | vhostpy is | goal | cycles | busy | |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
        ]
        for row in self.rows():
            lines.append("| " + " | ".join(_cells(row)) + " |")
        lines += [
            "",
            f"Goals are ratios of medians, met at {MET:.0%}. 'Generator-limited': the device was "
            f"less than {BUSY:.0%} busy, or the generator never had to wait for it. Cycles are per "
            "packet, of the device's polls that found work. Where a line says 'two threads of "
            "one core' the machine had put both processors there: such runs compare only with "
            f"their like. {self._limit()}",
            "",
        ]
        return "\n".join(lines)

    def _limit(self) -> str:
        """The cost of lines, which bounds all copying."""
        runs = [run for devices in self.runs.values() for some in devices.values() for run in some
                if run["cores"] == "apart"]  # fmt: skip
        if not runs:
            return "The processors were never two cores."
        near, far = _median(runs, "line_ticks_in_a_row"), _median(runs, "line_ticks")
        return (
            "The limit: a cache line that another core has just written costs "
            f"{near:.0f} cycles in a row, {far:.0f} anywhere, "
            f"{_median(runs, 'line_ticks_dependent'):.0f} where the next depends on it."
        )

    def write(self, folder: Path) -> None:
        """DATE-KIND.json, .md and .svg."""
        if not self.runs:
            return
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{self.date}-{self.kind}"
        data = {
            "kind": self.kind, "date": self.date, "machine": _machine(), "commit": _commit(),
            "rows": self.rows(), "runs": self.runs,
        }  # fmt: skip
        stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        stem.with_suffix(".md").write_text(self.markdown())
        picture = chart.draw(self.rows(), self.kind)
        if picture:
            stem.with_suffix(".svg").write_text(picture)


def _cells(row: dict[str, Any]) -> list[str]:
    if row["median"] is None:
        return [row["text"], row["device"], "-", *[""] * 6, row["error"] or ""]
    notes = [] if row["cores"] == "apart" else ["two threads of one core"]
    busy = row["busy_share"]
    full = row["generator_full_share"] or 0.0
    if row["unit"] != "us" and ((busy is not None and busy < BUSY) or full > FULL):
        notes.append("generator-limited")
    if row["cpu_share"] is not None and row["cpu_share"] < UNDISTURBED:
        notes.append(f"disturbed: {row['cpu_share']:.0%} of the cores were ours")
    if row.get("goal"):
        # None: of disturbed runs, or of one core, which decide nothing.
        notes.append({True: "met", False: "**missed**", None: "not judged"}[row.get("met")])
    if row["error"]:
        notes.append(row["error"])
    ratio, goal = row.get("ratio"), row.get("goal")
    cycles = row["cycles_per_packet"]
    return [
        row["text"],
        row["device"],
        f"{row['median']:.2f} {row['unit']}",
        f"{row['low']:.2f}..{row['high']:.2f}",
        str(row["runs"]),
        f"{ratio:.2f} x" if ratio else "",
        f"{goal:.2f} x" if goal else "",
        f"{cycles:.0f}" if cycles else "",
        f"{busy:.0%}" if busy is not None else "",
        ", ".join(notes),
    ]


def _choose(runs: list[dict[str, Any]], cores: str) -> list[dict[str, Any]]:
    placed = [run for run in runs if run["cores"] == cores]
    return [run for run in placed if _calm([run])] or placed


def _calm(runs: list[dict[str, Any]]) -> bool:
    """Whether all gave something, and had their cores to themselves."""
    names = "generator_cpu_share", "device_cpu_share"
    return bool(runs) and all(
        "value" in run and all(run.get(name, 1) >= UNDISTURBED for name in names) for run in runs
    )


def _median(runs: list[dict[str, Any]], *names: str) -> float | None:
    """Over the runs, of the smallest of these."""
    values = [
        min(run[name] for name in names if run.get(name) is not None)
        for run in runs
        if any(run.get(name) is not None for name in names)
    ]
    return statistics.median(values) if values else None


def _machine() -> str:
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.machine(),
    )  # fmt: skip
    return f"{model}, Linux {platform.release().partition('-')[0]}"


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip()
