"""What `load` shows: a line while it runs, a table at the end, and spreads of latencies."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999, "p99_99": 0.9999}

# A generator that had less than this of its processor was disturbed.
UNDISTURBED = 0.97


class Progress:
    """One line that is written over, on a terminal; nothing elsewhere."""

    def __init__(self, wanted: bool | None = None) -> None:
        self.wanted = sys.stderr.isatty() if wanted is None else wanted
        self._width = 0

    def show(self, text: Callable[[], str]) -> None:
        """`text` is asked only if someone looks."""
        if self.wanted:
            line = text()
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)

    def done(self) -> None:
        """Makes room for what comes next."""
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # the terminal is gone
            self.wanted = False


def spread(bins: Sequence[tuple[int, int]], ticks_per_us: float) -> dict[str, Any]:
    """Microseconds of a histogram of ticks, within 3 %; None where nothing was timed."""
    count = sum(number for _, number in bins)
    result: dict[str, Any] = {"count": count}
    names = ("min", *PERCENTILES, "max", "mean")
    if not count:
        return result | dict.fromkeys(names)
    result["min"] = bins[0][0] / ticks_per_us
    for name, share in PERCENTILES.items():
        seen = 0
        for value, number in bins:
            seen += number
            if seen >= share * count:
                result[name] = value / ticks_per_us
                break
    result["max"] = bins[-1][0] / ticks_per_us
    result["mean"] = sum(value * number for value, number in bins) / count / ticks_per_us
    return result


def net_line(figures: dict[str, Any], elapsed_s: float) -> str:
    """'3 s  27.21 Mpps  13.93 Gbit/s  sent 27.30 Mpps  generator 71 % busy'."""
    return (
        f"{elapsed_s:.0f} s  {figures['received_mpps']:.2f} Mpps  "
        f"{figures['received_gbit_s']:.2f} Gbit/s  sent {figures['sent_mpps']:.2f} Mpps  "
        f"generator {100 * figures['generator_busy_share']:.0f} % busy"
    )


def wrong(result: dict[str, Any]) -> str:
    """What must not happen, of what was looked at; empty where all is well."""
    names = ("corrupt_packets", "disordered_packets", "corrupt_requests", "failed_requests")
    found = [f"{result[name]} {name.replace('_', ' ')}" for name in names if result.get(name)]
    return ", ".join(found)


def lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The final figures, for people."""
    rows = _net_lines(result) if result["kind"] == "net" else _blk_lines(result)
    preempted = ""
    if result["generator_cpu_share"] < UNDISTURBED:
        preempted = f", and something else ran for {1 - result['generator_cpu_share']:.0%} of it"
    interrupted = ", then interrupted" if result["interrupted"] else ""
    return [*rows, ("time", f"{result['seconds']:.2f} s measured{interrupted}{preempted}")]


def _net_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    sizes = sorted(set(result["frame_bytes"]))
    limit = "; the generator is the limit" if result["generator_limited"] else ""
    rows = [
        ("rate", f"{result['received_mpps']:.3f} Mpps, {result['received_gbit_s']:.3f} Gbit/s"),
        ("lost", f"{result['lost_packets']:,} of {result['sent_packets']:,} "
                 f"({100 * result['lost_share']:.3f} %)"),
        ("frames", f"{', '.join(map(str, sizes))} B, {_many(result['mac_pairs'], 'MAC pair')}, "
                   f"{result['layout']} queues of {result['queue_size']}"),
        ("memory", f"{result['touch']} touched, ids {result['ids']}, rx headers "
                   f"{result['rx_headers']}, {'2 MiB' if result['hugepages'] else '4 KiB'} pages"),
        ("generator", f"{100 * result['generator_busy_share']:.0f} % busy, bursts "
                      f"{100 * result['generator_full_share']:.0f} % full{limit}"),
    ]  # fmt: skip
    for name in ("corrupt", "disordered", "stray", "foreign"):
        if count := result[f"{name}_packets"]:
            rows.append((name, f"{count:,} packets"))
    if result["verified"] and not wrong(result):
        rows.append(("verified", "every byte that arrived, in order"))
    return rows + _latency_lines(result)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _latency_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    spread = result.get("latency_us")
    if not spread:
        return []
    if not spread["count"]:
        return [("latency", "nothing was timed")]
    return [("latency us", _latency(spread))]


def _latency(spread: dict[str, Any]) -> str:
    names = ("min", *PERCENTILES, "max")
    return "  ".join(f"{name.replace('_', '.')} {spread[name]:.1f}" for name in names)


def blk_line(figures: dict[str, Any], elapsed_s: float) -> str:
    """'3 s  812.4 kIOPS  3327 MB/s  generator 71 % busy'."""
    return (
        f"{elapsed_s:.0f} s  {figures['kiops']:.1f} kIOPS  {figures['mb_s']:.0f} MB/s  "
        f"generator {100 * figures['generator_busy_share']:.0f} % busy"
    )


def _blk_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    queues = _many(result["queues"], f"{result['layout']} queue")
    rows = [
        ("rate", f"{result['kiops']:.1f} kIOPS, {result['mb_s']:.0f} MB/s"),
        ("requests", f"{result['pattern']}, {result['block_bytes']} B, depth {result['depth']} on "
                     f"{queues} of {result['queue_size']}"),
        ("memory", f"{'2 MiB' if result['hugepages'] else '4 KiB'} pages"),
        ("generator", f"{100 * result['generator_busy_share']:.0f} % busy, "
                      f"{result['generator_cycles_per_request'] or 0:.0f} cycles a request"),
    ]  # fmt: skip
    for name in ("failed", "corrupt"):
        if count := result[f"{name}_requests"]:
            rows.append((name, f"{count:,} requests"))
    if result["verified"] and not wrong(result):
        rows.append(("verified", "every block that was written"))
    for name in ("read", "write"):
        spread = result[f"{name}_latency_us"]
        if spread["count"]:
            rows += [(f"{name}s us", _latency(spread))]
    return rows
