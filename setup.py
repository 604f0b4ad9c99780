"""Build of vhostpy's Cython modules; everything declarative is in pyproject.toml.

VHOSTPY_ONLY=pattern builds just the modules whose path contains it,
VHOSTPY_DEBUG=1 turns Cython's checks and the sanitizers on, VHOSTPY_BENCH=1 builds what
bench/ and tests/ need too (never installed). VHOSTPY_URING=0 builds without io_uring.
"""

import glob
import os
import platform
import subprocess
import sys
import sysconfig

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("VHOSTPY_DEBUG") == "1"
ONLY = os.environ.get("VHOSTPY_ONLY", "")
URING = os.environ.get("VHOSTPY_URING") != "0"

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
    "uring_setup.pyx": ("liburing.h", "-l:liburing.a"),
    "uring.pyx": ("liburing.h", "-l:liburing.a"),
    "nbd_connection.pyx": ("libnbd.h", "-lnbd"),
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


def preprocesses(*flags):
    """Whether the compiler takes an empty file with these flags; None where there is none."""
    compiler = os.environ.get("CC", "cc").split()
    try:
        found = subprocess.run(
            [*compiler, "-E", *flags, "-x", "c", os.devnull], capture_output=True, check=False)
    except OSError:
        return None
    return found.returncode == 0


def has_header(name):
    """Whether the compiler finds <name>."""
    return preprocesses("-include", name)


def want_tools():
    """Ends with one line where something is missing that every build needs."""
    if preprocesses() is None:
        missing = ["gcc", "libc6-dev"]
    else:
        missing = [] if has_header("stdlib.h") else ["libc6-dev"]
    include = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(include, "Python.h")):
        missing.append("python3-dev")
    if URING and not has_header("liburing.h"):
        missing.append("liburing-dev")
    if missing:
        without = " (or VHOSTPY_URING=0)" if missing[-1] == "liburing-dev" else ""
        sys.exit(f"vhostpy cannot be built here; next: apt install {' '.join(missing)}{without}")


def library(path):
    """What the module at `path` is linked with besides; None where that cannot be had."""
    header, *link = OPTIONAL.get(os.path.basename(path), [""])
    if header == "liburing.h" and not URING:
        return None
    if not header or has_header(header):
        return link
    print(f"setup.py: no {header}: {path} is left out")
    return None


class BuildExt(build_ext):
    """On all processors. What goes into a wheel is stripped; `make build` keeps symbols."""

    def finalize_options(self):
        processors = len(os.sched_getaffinity(0))
        keep_symbols = self.inplace or self.editable_mode or DEBUG
        # Others only ask which sources there are.
        if not {"sdist", "egg_info", "dist_info"} & set(self.distribution.commands):
            from Cython.Build import cythonize

            self.distribution.ext_modules = cythonize(
                extensions([] if keep_symbols else ["-s"]),
                compiler_directives=DIRECTIVES,
                annotate=os.environ.get("VHOSTPY_ANNOTATE") == "1",
                show_all_warnings=False,
                nthreads=processors,
                force=bool(self.force),
            )
        super().finalize_options()
        self.parallel = self.parallel or processors


def extensions(strip):
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
            depends=["vhostpy/system/hw.h", "vhostpy/memory/sigbus.h"],
            include_dirs=["vhostpy"],
            extra_compile_args=CFLAGS,
            extra_link_args=[*LDFLAGS, *strip, *needed],
        )
        for path in sources
        if (needed := library(path)) is not None
    ]


want_tools()
setup(
    packages=find_packages(include=["vhostpy*"]),
    package_data={"": ["*.pxd", "*.pyx", "*.h"]},
    # Replaced when they are built; that there are some makes the wheel one of this machine.
    ext_modules=[Extension("vhostpy._ring", ["vhostpy/_ring.pyx"])],
    cmdclass={"build_ext": BuildExt},
)
