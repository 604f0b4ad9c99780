"""The ways people install vhostpy: from a folder, from an sdist, editable."""

import shutil
import subprocess
import sys
import venv
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
        "import vhostpy.backends.net, vhostpy.backends.blk, vhostpy.vswitch.switch as s;"
        "from vhostpy.worker import Workers;"
        "w = Workers(); w.start(); s.Switch(w).status(); w.stop(); print('served')"
    )
    return run(python, "-c", code, cwd=cwd) == "served\n"


# `make build` installs editable: here it is only done once more, from nothing.
@pytest.mark.parametrize("way", ["sdist", pytest.param("editable", marks=pytest.mark.long)])
def test_installs_in_a_clean_environment(source: Path, tmp_path: Path, way: str) -> None:
    what: list[str | Path] = ["-e", source]
    if way == "sdist":
        run(sys.executable, "-m", "build", "--sdist", "-o", tmp_path, source, cwd=tmp_path)
        (archive,) = tmp_path.glob("vhostpy-*.tar.gz")
        what = [archive]
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean/bin/python"
    run(python, "-m", "pip", "install", *what, cwd=tmp_path)
    assert serves(python, tmp_path)
    assert "example" in run(tmp_path / "clean/bin/vhostpy", "net", "--help", cwd=tmp_path)
