"""Charts as SVG, by hand: lines over an axis of categories. No library for eighty lines."""

import math
from dataclasses import dataclass
from typing import Any

from bench.peers.placement import WORDS, best_known

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 64, 48, 36, 120
COLOURS = {"vhostpy": "#1f77b4", "testpmd": "#ff7f0e", "ovs": "#2ca02c", "qsd": "#d62728"}


@dataclass(frozen=True)
class Panel:
    """One chart of a kind; panels stand below each other."""

    title: str
    unit: str
    axis: str
    value: str = "median"  # the rows' figures, and how far they went where that is known
    low: str = "low"
    high: str = "high"
    decades: bool = False  # a logarithmic scale


PANELS = {
    "net": [Panel("Forwarding rate by frame size, one core, whole frame touched", "Mpps",
                  "frame, B")],
    "blk": [
        Panel("4 KiB random reads by depth, null storage, one core", "kIOPS", "depth",
              decades=True),
        Panel("Their latency: median, and up to the 99th percentile", "us", "depth",
              "latency_p50_us", "latency_p50_us", "latency_p99_us", decades=True),
    ],
}  # fmt: skip


def draw(rows: list[dict[str, Any]], kind: str) -> str:
    """The SVG, of one placement's rows; empty where nothing belongs on the chart."""
    rows = [row for row in rows if row["chart"] is not None and row["median"]]
    rows = best_known(rows)
    drawn = [
        _panel(panel, some)
        for panel in PANELS[kind]
        if (some := [row for row in rows if row.get(panel.value)])
    ]
    if not drawn:
        return ""
    height = HEIGHT * len(drawn)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for index, some in enumerate(drawn):
        parts += [f'<g transform="translate(0 {HEIGHT * index})">', *some, "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, rows: list[dict[str, Any]]) -> list[str]:
    placed = WORDS[rows[0]["cores"]]
    places = sorted({row["chart"] for row in rows})
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    lowest = min(row[panel.low] for row in rows)
    marks = _decades(lowest, _high(panel, rows)) if panel.decades else _fifths(_high(panel, rows))

    def x(place: float) -> float:
        return LEFT + width * (places.index(place) + 0.5) / len(places)

    def y(value: float) -> float:
        if panel.decades:
            span = math.log(marks[-1] / marks[0])
            return TOP + height * (1 - math.log(max(value, marks[0]) / marks[0]) / span)
        return TOP + height * (1 - value / marks[-1])

    parts = [f'<text x="{LEFT}" y="20" font-size="14">{panel.title} ({placed})</text>']
    for value in marks:
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="#ddd"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:g}</text>'
        )
    parts.append(f'<text x="8" y="20">{panel.unit}</text>')
    for place in places:
        parts.append(
            f'<text x="{x(place):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{place:g}</text>'
        )
    parts.append(
        f'<text x="{LEFT + width / 2}" y="{HEIGHT - 8}" text-anchor="middle">{panel.axis}</text>'
    )
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = sorted((row for row in rows if row["device"] == device), key=lambda r: r["chart"])
        colour = COLOURS.get(device, "#777")
        line = " ".join(f"{x(row['chart']):.1f},{y(row[panel.value]):.1f}" for row in mine)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for row in mine:
            at, high = x(row["chart"]), row[panel.high] or row[panel.value]
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(row[panel.low]):.1f}" '
                f'y2="{y(high):.1f}" stroke="{colour}"/>'
                f'<circle cx="{at:.1f}" cy="{y(row[panel.value]):.1f}" r="3" fill="{colour}"/>'
            )
        last = mine[-1]
        parts.append(
            f'<text x="{x(last["chart"]) + 10:.1f}" y="{y(last[panel.value]) + 4:.1f}" '
            f'fill="{colour}">{device}</text>'
        )
    return parts


def _high(panel: Panel, rows: list[dict[str, Any]]) -> float:
    return max(row[panel.high] or row[panel.value] for row in rows)


def _fifths(highest: float) -> list[float]:
    """From 0 to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(highest))
    top = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= highest)
    return [top * step / 5 for step in range(6)]


def _decades(lowest: float, highest: float) -> list[float]:
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]
