"""The package builds from its sdist and installs into clean environments: with a compiler, without, with a broken one.

Needs the package index for hatchling; torch is not downloaded but borrowed from the environment that runs the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

import pomona

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the paths of environments are those of POSIX"),
]

ROOT = Path(__file__).parents[2]
Build = Callable[..., Path]
needs_compiler = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no CMake or no C++")

USE = """
import torch, pomona
from pomona.native import core
model = torch.nn.Linear(20, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(0.9))
model(torch.ones(1, 20)).sum().backward()
optimizer.step()
print(pomona.__version__, pruner.harden().nonzero, core.is_available(), pomona.__file__)
"""


def run(*command: str | Path, cwd: str | Path = sys.prefix, fails: bool = False, **environment: str) -> str:
    """Run a command and return what it prints; by default not in the root, whose src would be found first."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=inherited | environment, cwd=cwd, capture_output=True, text=True)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_venv(folder: Path) -> Path:
    """Make a clean environment that sees torch and numpy, but not pomona; returns its Python."""
    run(sys.executable, "-m", "venv", folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(str(Path(numpy.__file__).parent.parent))
    return folder / "bin/python"


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = make_venv(tmp_path_factory.mktemp("builder") / "venv")
    run(python, "-m", "pip", "install", "--quiet", "hatchling>=1.26")
    return python


@pytest.fixture(scope="module")
def sdist(builder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(builder, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=ROOT)
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture
def build(builder: Path, sdist: Path, tmp_path: Path) -> Build:
    """Builds a wheel from the sdist; the output is in ``tmp_path / "log"``."""

    def build_wheel(*, fails: bool = False, **environment: str) -> Path:
        with tarfile.open(sdist) as archive:
            archive.extractall(tmp_path / "source", filter="data")
        (source,) = (tmp_path / "source").iterdir()
        printed = run(
            builder, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=source, fails=fails, **environment
        )
        (tmp_path / "log").write_text(printed)
        return next(iter(tmp_path.glob("*.whl")), Path())

    return build_wheel


def use(wheel: Path, folder: Path) -> list[str]:
    """Install the wheel into a fresh environment and return what a program prints there."""
    python = make_venv(folder / "venv")
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel)
    printed = run(python, "-c", USE).split()
    assert str(folder) in printed[3]
    assert re.search(r"selection +(compiled core|numpy)", run(python, "-m", "pomona", "env"))
    assert "lenet300-gsm-60x" in run(python, "-m", "pomona", "recipes")
    return printed[:3]


def without_tools(tmp_path: Path) -> dict[str, str]:
    """Environment variables with which no program is found."""
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty"), "CXX": "", "CC": ""}


def test_the_sdist_holds_what_is_tracked(sdist: Path) -> None:
    tracked = run("git", "ls-files", cwd=ROOT).split()
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert inside - {"PKG-INFO"} == {name for name in tracked if not name.startswith((".ci/", ".github/"))}


@needs_compiler
def test_a_wheel_with_the_core(build: Build, tmp_path: Path) -> None:
    wheel = build(POMONA_CORE="1")
    assert re.fullmatch(rf"pomona-{re.escape(pomona.__version__)}-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        ours = {
            f"pomona/{path.relative_to(ROOT / 'src/pomona').as_posix()}" for path in (ROOT / "src/pomona").rglob("*.*")
        }
        ours = {name for name in ours if "__pycache__" not in name and "/_core." not in name}
        metadata = next(archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    cores = {name for name in names if name.startswith("pomona/native/_core.")}
    assert len(cores) == 1
    assert {name for name in names if name.startswith("pomona/")} - cores == ours >= {"pomona/py.typed"}
    assert f"\nVersion: {pomona.__version__}\n" in metadata
    assert use(wheel, tmp_path) == [pomona.__version__, "20", "True"]


@pytest.mark.parametrize("core", ["", "0"])
def test_without_a_compiler_it_is_pure_python_and_works(core: str, build: Build, tmp_path: Path) -> None:
    environment = without_tools(tmp_path) if not core else {}
    wheel = build(POMONA_CORE=core, **environment)
    assert wheel.name == f"pomona-{pomona.__version__}-py3-none-any.whl"
    warned = "installed without its compiled core: it works, but slower" in (tmp_path / "log").read_text()
    assert warned == (not core)  # with POMONA_CORE=0 it was asked for
    assert use(wheel, tmp_path) == [pomona.__version__, "20", "False"]


@needs_compiler
def test_a_compiler_that_fails_is_no_obstacle(build: Build, tmp_path: Path) -> None:
    wheel = build(CXX=shutil.which("false") or "false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "without its compiled core" in (tmp_path / "log").read_text()
    assert use(wheel, tmp_path) == [pomona.__version__, "20", "False"]


def test_a_core_that_was_asked_for_and_cannot_be_built_is_an_error(build: Build, tmp_path: Path) -> None:
    build(fails=True, POMONA_CORE="1", **without_tools(tmp_path))
    assert "cmake" in (tmp_path / "log").read_text()
    assert not list(tmp_path.glob("*.whl"))
