"""Command line of `bench.peers`: which cases, how often, where to."""

import argparse
import shutil
import sys
import time
from pathlib import Path

from bench.peers import blk, net, readme
from bench.peers.results import Results

RESULTS = Path(__file__).parents[1] / "results"
KINDS = {"net": net, "blk": blk}


def main() -> None:
    options = _options()
    if options.readme:
        text = readme.README.read_text()
        readme.README.write_text(readme.update(text, RESULTS, readme.README.parent))
        return
    for program in ("dpdk-testpmd", "qemu-storage-daemon", "fio"):
        if shutil.which(program) is None:
            sys.exit(f"bench.peers: {program} is missing\n  next: bench/peers/install.sh")
    whole = not (options.only or options.kind or options.devices)
    folder = options.out or (RESULTS if whole or options.save or options.resume else None)
    date = time.strftime("%Y-%m-%d")
    for name, kind in KINDS.items():
        if options.kind in (None, name):
            results = Results(name, date, kind.CASES, folder)
            if folder is not None:
                results.resume()
            cases = [
                case for case in kind.CASES
                if (not options.only or case.name in options.only)
                and not (options.resume and results.has(case))
            ]  # fmt: skip
            if cases:
                try:
                    kind.run(cases, results, options)
                finally:
                    print(results.markdown())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description="vhostpy beside its peers."
    )
    names = [case.name for kind in KINDS.values() for case in kind.CASES]
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=names, help=", ".join(names))
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--pairs", type=int, help="interleaved runs of each device in "
                        "one placement (default: 5, or what a case needs; fewer than 3 are not "
                        "judged)")  # fmt: skip
    parser.add_argument("--seconds", type=int, default=3, help="measured time of a run, at least 2")
    parser.add_argument(
        "--retries", type=int, default=2,
        help="at most so many times the runs more, until enough were undisturbed",
    )  # fmt: skip
    parser.add_argument("--devices", nargs="+", help="only these, e.g. vhostpy ovs")
    parser.add_argument(
        "--save", action="store_true",
        help="a part goes into bench/results too, into the same files as others of the same day "
        "and commit; a whole run always does",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="leave out what bench/results has of this day and commit, and save the rest",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="another folder than that")
    parser.add_argument(
        "--readme", action="store_true",
        help="measure nothing: bring the README's figures up to the latest results",
    )  # fmt: skip
    options = parser.parse_args()
    if options.seconds < 2:
        parser.error("--seconds: at least 2")
    return options


if __name__ == "__main__":
    main()
