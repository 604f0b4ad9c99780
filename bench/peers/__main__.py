"""Command line of `bench.peers`: which cases, how often, where to."""

import argparse
import shutil
import sys
import time
from pathlib import Path

from bench.peers import blk, net
from bench.peers.results import Results

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description="vhostpy beside its peers."
    )
    names = [case.name for case in (*net.CASES, *blk.CASES)]
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=names, help=", ".join(names))
    parser.add_argument("--kind", choices=("net", "blk"))
    parser.add_argument("--pairs", type=int, default=5, help="interleaved runs of each device")
    parser.add_argument("--seconds", type=int, default=3, help="measured time of a run, at least 2")
    parser.add_argument(
        "--retries", type=int, default=2,
        help="at most so many times the runs more, until enough were undisturbed",
    )  # fmt: skip
    parser.add_argument("--devices", nargs="+", help="only these, e.g. vhostpy ovs")
    parser.add_argument(
        "--out", type=Path,
        help="folder of the results (default: bench/results, of a whole run; else none)",
    )  # fmt: skip
    options = parser.parse_args()
    if options.seconds < 2:
        parser.error("--seconds: at least 2")
    for program in ("dpdk-testpmd", "qemu-storage-daemon"):
        if shutil.which(program) is None:
            sys.exit(f"bench.peers: {program} is missing\n  next: bench/peers/install.sh")
    whole = not (options.only or options.kind or options.devices)
    folder = options.out or (RESULTS if whole else None)
    stamp = time.strftime("%Y-%m-%d")
    for kind in (net, blk):
        name = kind.__name__.rpartition(".")[2]
        if options.kind not in (None, name):
            continue
        cases = [case for case in kind.CASES if not options.only or case.name in options.only]
        if not cases:
            continue
        results = Results(name, stamp, options)
        try:
            kind.run(cases, results, options)
        finally:
            if folder is not None:
                results.write(folder)
            print(results.markdown())


if __name__ == "__main__":
    main()
