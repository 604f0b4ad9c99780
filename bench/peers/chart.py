"""A chart as SVG, by hand: lines over an axis of categories. No library for forty lines."""

from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 64, 48, 36, 120
COLOURS = {"vhostpy": "#1f77b4", "testpmd": "#ff7f0e", "ovs": "#2ca02c", "qsd": "#d62728"}
TITLES = {
    "net": ("Forwarding rate by frame size, one core, whole frame touched", "Mpps", "frame, B"),
    "blk": ("4 KiB random reads by depth, null storage, one core", "kIOPS", "depth"),
}


def draw(rows: list[dict[str, Any]], kind: str) -> str:
    """The SVG; empty where nothing belongs on the chart."""
    rows = [row for row in rows if row["chart"] is not None and row["median"]]
    apart = [row for row in rows if row["cores"] == "apart"]
    rows = apart or rows
    if not rows:
        return ""
    title, unit, axis = TITLES[kind]
    places = sorted({row["chart"] for row in rows})
    top = _round_up(max(row["high"] for row in rows))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(place: float) -> float:
        return LEFT + width * (places.index(place) + 0.5) / len(places)

    def y(value: float) -> float:
        return TOP + height * (1 - value / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{title}</text>',
    ]
    for step in range(6):
        value = top * step / 5
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="#ddd"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:g}</text>'
        )
    parts.append(f'<text x="8" y="{TOP - 6}">{unit}</text>')
    for place in places:
        parts.append(
            f'<text x="{x(place):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{place:g}</text>'
        )
    parts.append(
        f'<text x="{LEFT + width / 2}" y="{HEIGHT - 8}" text-anchor="middle">{axis}</text>'
    )
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = sorted((row for row in rows if row["device"] == device), key=lambda r: r["chart"])
        colour = COLOURS.get(device, "#777")
        line = " ".join(f"{x(row['chart']):.1f},{y(row['median']):.1f}" for row in mine)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for row in mine:
            at = x(row["chart"])
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(row["low"]):.1f}" '
                f'y2="{y(row["high"]):.1f}" stroke="{colour}"/>'
                f'<circle cx="{at:.1f}" cy="{y(row["median"]):.1f}" r="3" fill="{colour}"/>'
            )
        last = mine[-1]
        parts.append(
            f'<text x="{x(last["chart"]) + 10:.1f}" y="{y(last["median"]) + 4:.1f}" '
            f'fill="{colour}">{device}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= value)
