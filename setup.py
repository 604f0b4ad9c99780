"""Build of vhostpy's Cython modules; everything declarative is in pyproject.toml.

VHOSTPY_ONLY=pattern builds just the modules whose path contains it,
VHOSTPY_DEBUG=1 turns Cython's checks and the sanitizers on, VHOSTPY_BENCH=1 builds what
bench/ and tests/ need too (never installed).
"""

import glob
import os
import platform
import subprocess

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

DEBUG = os.environ.get("VHOSTPY_DEBUG") == "1"
ONLY = os.environ.get("VHOSTPY_ONLY", "")

# The same binary runs on any x86-64-v2 machine; newer vector sets measured no gain.
MARCH = ["-march=x86-64-v2"] if platform.machine() == "x86_64" else []
CFLAGS = ["-O2", "-g1", "-fno-strict-aliasing", "-Wno-unused-function", *MARCH]
LDFLAGS = []
if DEBUG:
    CFLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-strict-aliasing",
              "-fsanitize=address,undefined", "-fno-sanitize=alignment", *MARCH]
    LDFLAGS = ["-fsanitize=address,undefined"]

# Modules that stand on a library which not everybody has: header, and how to link. Left out
# where the header is missing. liburing's static one, so that what is built runs without it.
OPTIONAL = {
    "_uring_setup.pyx": ("liburing.h", "-l:liburing.a"),
    "uring.pyx": ("liburing.h", "-l:liburing.a"),
    "_link.pyx": ("libnbd.h", "-lnbd"),
    "nbd.pyx": ("libnbd.h", "-lnbd"),
    "rbd.pyx": ("rbd/librbd.h", "-lrbd", "-lrados"),
}

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": DEBUG,
    "freethreading_compatible": True,
}


def has_header(name):
    """Whether the compiler finds <name>."""
    try:
        found = subprocess.run(
            [os.environ.get("CC", "cc"), "-E", "-include", name, "-x", "c", os.devnull],
            capture_output=True, check=False)
    except OSError:
        return False
    return found.returncode == 0


def library(path):
    """What the module at `path` is linked with besides; None where that cannot be had."""
    header, *link = OPTIONAL.get(os.path.basename(path), [""])
    if not header or has_header(header):
        return link
    print(f"setup.py: no {header}: {path} is left out")
    return None


def extensions():
    """One extension for each .pyx below vhostpy/, found through the two symlinks."""
    patterns = ["vhostpy/**/*.pyx"]
    if os.environ.get("VHOSTPY_BENCH") == "1":
        patterns += ["bench/*.pyx", "tests/*.pyx"]
    found = [path for pattern in patterns for path in glob.glob(pattern, recursive=True)]
    sources = sorted(path for path in found if ONLY in path)
    return [
        Extension(
            path.removesuffix(".pyx").replace("/", "."),
            [path],
            depends=["vhostpy/_hw.h", "vhostpy/_sigbus.h"],
            include_dirs=["vhostpy"],
            extra_compile_args=CFLAGS,
            extra_link_args=[*LDFLAGS, *needed],
        )
        for path in sources
        if (needed := library(path)) is not None
    ]


setup(
    packages=find_packages(include=["vhostpy*"]),
    package_data={"": ["*.pxd", "*.pyx", "_hw.h", "_sigbus.h"]},
    ext_modules=cythonize(
        extensions(),
        compiler_directives=DIRECTIVES,
        annotate=os.environ.get("VHOSTPY_ANNOTATE") == "1",
        show_all_warnings=False,
    ),
)
