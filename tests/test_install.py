"""The ways people install vhostpy: from a folder, from an sdist, editable."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*argv: str | Path, cwd: Path) -> str:
    result = subprocess.run(argv, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git would give somebody else, as they are now."""
    folder = tmp_path_factory.mktemp("source")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard",
                    cwd=ROOT).splitlines():  # fmt: skip
        path = ROOT / name
        if path.exists() or path.is_symlink():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)
    return folder


def serves(python: Path, cwd: Path) -> bool:
    """Whether the installed package starts a switch; run where the source is not."""
    code = (
        "import vhostpy.backends.net.port, vhostpy.backends.blk.queue, vhostpy.vswitch.switch as s;"
        "from vhostpy.runtime.pool import Workers;"
        "w = Workers(); w.start(); s.Switch(w).status(); w.stop(); print('served')"
    )
    return run(python, "-c", code, cwd=cwd) == "served\n"


def assert_no_products(names: Iterable[str]) -> None:
    """Neither generated C, of which there would be five times as much as of all else, nor what
    was compiled somewhere else."""
    assert [name for name in names if name.endswith((".c", ".so", ".html"))] == []


@pytest.mark.parametrize(
    ("compiler", "packages"),
    [
        ("exit 127", "libc6-dev liburing-dev"),
        ('case "$*" in *liburing.h*) exit 1; esac; exec cc "$@"', "liburing-dev"),
        ("", "gcc libc6-dev"),
    ],
    ids=["headers", "liburing", "compiler"],
)
def test_a_build_that_cannot_be_says_so_in_one_line(
    source: Path, tmp_path: Path, compiler: str, packages: str
) -> None:
    script = tmp_path / "compiler"
    if compiler:
        script.write_text(f"#!/bin/sh\n{compiler}\n")
        script.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=source, capture_output=True, text=True,
        env={**os.environ, "CC": str(script)},
    )  # fmt: skip
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"vhostpy cannot be built here; next: apt install {packages}")


# `make build` installs editable: here it is only done once more, from nothing.
@pytest.mark.parametrize("way", ["sdist", pytest.param("editable", marks=pytest.mark.long)])
def test_installs_in_a_clean_environment(source: Path, tmp_path: Path, way: str) -> None:
    what: list[str | Path] = ["-e", source]
    if way == "sdist":
        run(sys.executable, "-m", "build", "--sdist", "-o", tmp_path, source, cwd=tmp_path)
        (archive,) = tmp_path.glob("vhostpy-*.tar.gz")
        with tarfile.open(archive) as files:
            assert_no_products(files.getnames())
        what = [archive]
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean/bin/python"
    said = run(python, "-m", "pip", "install", "-v", *what, cwd=tmp_path)
    assert re.findall(r".*\.c:\d+:\d+: warning: .*", said) == []
    assert serves(python, tmp_path)
    if way == "sdist":
        (packages,) = (tmp_path / "clean/lib").glob("python*/site-packages")
        modules = list((packages / "vhostpy").rglob("*.so"))
        assert modules and not any(b".symtab" in module.read_bytes() for module in modules)
        others = set((packages / "vhostpy").rglob("*")) - set(modules)
        assert_no_products(map(str, others))
        (facts,) = packages.glob("vhostpy-*.dist-info")
        assert "License-Expression: Apache-2.0\n" in (facts / "METADATA").read_text()
        assert list(facts.rglob("LICENSE"))
    assert "example" in run(tmp_path / "clean/bin/vhostpy", "net", "--help", cwd=tmp_path)
