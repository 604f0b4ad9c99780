"""Other revisions of this tree, built once each below .cache/builds/.

What a revision shares with this tree is not compiled again: files that are alike keep this
tree's times, others are new, and so are what setup.py finds to be older than its sources.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILDS = ROOT / ".cache" / "builds"


def tree_of(revision: str) -> Path:
    """Where a build of it lies, made if need be; without a revision this tree, as it is."""
    if revision in ("", "."):
        return ROOT
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    target = BUILDS / commit[:12]
    if not target.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILDS) as folder:
            tree = Path(folder, "tree")
            print(f"building {revision} ({commit[:12]}) in {target}", file=sys.stderr)
            lay_out(_git("archive", commit), tree, ROOT)
            _build(tree)
            with suppress(FileExistsError):  # somebody else has built it meanwhile
                tree.rename(target)
    return target


def lay_out(archive: bytes, tree: Path, like: Path) -> None:
    """Unpacks a tar to `tree`, and adds what `like` has compiled of the same sources."""
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(tree, filter="fully_trusted")
    now = time.time()
    for path in _files(tree):
        other = like / path.relative_to(tree)
        alike = other.is_file() and filecmp.cmp(path, other, shallow=False)
        changed = other.stat().st_mtime if alike else now
        os.utime(path, (changed, changed))
    if _compiles_alike(tree, like):
        for path in _files(tree):
            source = (like / path.relative_to(tree)).with_suffix(".c")
            if path.suffix == ".pyx" and source.exists():
                shutil.copy2(source, path.parent)
        # Where setup.py has its modules first, and looks for them.
        shutil.copytree(like / "build", tree / "build")


def _compiles_alike(tree: Path, like: Path) -> bool:
    mode = like / ".venv" / ".built"  # the Makefile's
    return (
        mode.is_file() and mode.read_text().strip() == "release"
        and filecmp.cmp(tree / "setup.py", like / "setup.py", shallow=False)
    )  # fmt: skip


def _files(tree: Path) -> list[Path]:
    """Each once: links are left out."""
    return [
        Path(folder, name)
        for folder, _, names in os.walk(tree)
        for name in names
        if not Path(folder, name).is_symlink()
    ]


def _build(tree: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--parallel", "2"],
        cwd=tree, check=True, stdout=sys.stderr,
    )  # fmt: skip


def _git(*words: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"git {' '.join(words)}: {done.stderr.decode().strip()}")
    return done.stdout
