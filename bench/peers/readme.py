"""The README's figures: the newest results that hold all of them, between two markers."""

import json
import os
from pathlib import Path
from typing import Any

from bench.peers.placement import WORDS, best_known

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- figures: python -m bench.peers --readme -->"
END = "<!-- end of figures -->"

# What is shown, and in which words.
NET = {
    "64B-header": "64 B, headers touched",
    "64B-packed": "64 B, packed rings, headers touched",
    "1500B-split": "1500 B, whole frame touched",
    "imix": "IMIX, headers touched",
    "dpdk-64B-split": "64 B, DPDK's virtio-user as generator",
}
BLK = {
    "null-1": "null storage, depth 1",
    "null-64": "null storage, depth 64",
    "ram-64": "RAM (the other: a file on tmpfs), depth 64",
    "tmpfs-randread-64": "file on tmpfs, depth 64",
}
TABLES = {
    "net": (NET, {"vhostpy": "vhostpy, a learning switch", "testpmd": "testpmd, switches nothing",
                  "ovs": "OVS-DPDK, a learning switch"},
            "Between two ports, split rings where nothing else is said, device on one core"),
    "blk": (BLK, {"vhostpy": "vhostpy", "qsd": "qemu-storage-daemon"},
            "4 KiB random reads, busy polling, device on one core"),
}  # fmt: skip


def update(text: str, folder: Path, root: Path) -> str:
    """The README's text with the newest figures; as it was where there are none yet."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN} or no {END}")
    blocks = [
        _block(kind, data, path, root)
        for kind, (wanted, _, _) in TABLES.items()
        if (newest := _newest(folder, kind, wanted)) is not None
        for path, data in [newest]
    ]
    if not blocks:
        return text
    return "\n".join([head + BEGIN, *blocks, END]) + tail


def _newest(folder: Path, kind: str, wanted: dict[str, str]) -> tuple[Path, dict[str, Any]] | None:
    """The last that was written of those that hold all that is wanted, from a clean tree."""
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob(f"*-{kind}.json"))]
    whole = [
        (path, data) for path, data in found
        if wanted.keys() <= {row["case"] for row in data["rows"] if row["median"]}
        and not data["commit"].endswith("-dirty")
    ]  # fmt: skip
    return max(whole, key=lambda one: one[1]["written"], default=None)


def _block(kind: str, data: dict[str, Any], path: Path, root: Path) -> str:
    wanted, devices, what = TABLES[kind]
    lines = [
        f"{what} ({data['machine']}); medians of interleaved runs, and how far these lie apart:",
        "",
        "| | " + " | ".join(devices.values()) + " |",
        "|---|" + "---|" * len(devices),
    ]
    for name, text in wanted.items():
        mine = [row for row in data["rows"] if row["case"] == name and row["median"]]
        placed = best_known(mine)
        rows = {row["device"]: row for row in placed}
        cells = [_cell(rows[device]) if device in rows else "" for device in devices]
        text += f" ({WORDS[placed[0]['cores']]})"
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    table = os.path.relpath(path.with_suffix(".md"), root)
    lines += ["", f"All cases of {data['date']}, commit {data['commit']}: [{table}]({table})."]
    picture = path.with_suffix(".svg")
    if picture.exists():
        lines += ["", f"![{kind} beside its peers]({os.path.relpath(picture, root)})"]
    return "\n".join([*lines, ""])


def _cell(row: dict[str, Any]) -> str:
    cycles = row["cycles_per_packet"]
    digits = 1 if row["median"] < 100 else 0
    text = f"{row['median']:,.{digits}f} {row['unit']} ({row['spread']:.0%})"
    return text + (f", {cycles:.0f} cycles a packet" if cycles else "")
