"""What `make bench` prints beside pytest-benchmark's table."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Each benchmark's figures in its own terms: cycles, shares, sizes."""
    session = getattr(config, "_benchmarksession", None)
    rows = [
        (benchmark.name, name, value)
        for benchmark in (session.benchmarks if session else ())
        for name, value in benchmark.extra_info.items()
    ]
    if not rows:
        return
    terminalreporter.section("figures")
    width = max(len(test) for test, _, _ in rows)
    for test, name, value in rows:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        terminalreporter.write_line(f"{test:{width}}  {name:28} {text:>12}")
