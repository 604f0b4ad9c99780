"""Where the programs and files of our peers are: the system's, and newer ones in .cache/.

The newer ones (install.sh unpacks them) belong to another Debian release: they start
through their own dynamic loader, with their own libraries, and need no chroot.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / ".cache"
TRIXIE = CACHE / "trixie"
BACKPORTS = CACHE / "backports"
LIBRARIES = TRIXIE / "usr/lib/x86_64-linux-gnu"


class PeerMissing(Exception):
    """A peer is not installed; the text says how to get it."""


@dataclass(frozen=True, slots=True)
class Program:
    """How a peer's program starts: its argv so far, and what its environment needs."""

    argv: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def env(self) -> dict[str, str]:
        return {**os.environ, **self.environment}


def trixie(name: str) -> Program:
    """A program of .cache/trixie, e.g. "qemu-io"."""
    return _unpacked(TRIXIE, name, "demo")


def backports(name: str) -> Program:
    """A program of .cache/backports: QEMU 11."""
    return _unpacked(BACKPORTS, name, "long")


def _unpacked(root: Path, name: str, target: str) -> Program:
    for directory in ("usr/bin", "usr/sbin"):
        path = root / directory / name
        if path.exists():
            break
    else:
        raise PeerMissing(f"{name} is not in {root}: run tests/peers/install.sh {target}")
    own = root / "usr/lib/x86_64-linux-gnu"
    loader = own / "ld-linux-x86-64.so.2"
    libraries = f"{own}:{own}/ceph"
    # QEMU looks for its block drivers beside a binary that it believes to be the loader.
    return Program(
        (str(loader), "--library-path", libraries, str(path)),
        {"QEMU_MODULE_DIR": str(own / "qemu")},
    )


def system(name: str) -> Program:
    """A program of this machine, e.g. Debian 12's QEMU 7.2."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise PeerMissing(f"{name} is not installed: run tests/peers/install.sh test")
    return Program((path,))


def vhostpy() -> Program:
    """The `vhostpy` command of the project's venv."""
    path = PROJECT / ".venv/bin/vhostpy"
    if not path.exists():
        raise PeerMissing("vhostpy is not built: run make build")
    return Program((str(path),))
